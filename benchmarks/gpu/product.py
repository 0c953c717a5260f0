"""Stage 3: the commands work on a GPU: the suite's CUDA tests, training in each precision, validation, export.

Jobs run side by side. Each is a chain of commands, and fails with the last line that a command wrote.
"""

import subprocess
import sys
import threading
from pathlib import Path
from typing import List, NamedTuple, Sequence

from stage import ROOT, Stage

SIDE_BY_SIDE = 4
DIGITS = """--config configs/digits.yaml --epochs 2 --warmup-epochs 0 --model-ema --mixup 0.8 --cutmix 1.0 --reprob 0.25
    --aug-repeats 3 --workers 2""".split()
PRECISIONS = {
    "bfloat16": ["--amp", "--amp-dtype", "bfloat16"],
    "float16": ["--amp", "--amp-dtype", "float16"],
    "float32": ["--no-amp"],
}
CUDA_TESTS = ["tests/ops", "tests/training", "tests/cli/test_interruption.py", "tests/test_export.py"]


class Job(NamedTuple):
    what: str
    commands: List[Sequence[str]]
    expected: str = ""  # in the output of the first command


def jobs(stage: Stage) -> List[Job]:
    """The most telling ones first."""
    python, pytest = sys.executable, [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    backend = {"float32": "reference", "bfloat16": "triton", "float16": "triton"}

    def digits(name: str, *more: str) -> List[str]:
        return [*DIGITS, "--output", str(stage.work), "--experiment", name, "--device", stage.device, *more]

    def training(precision: str, compiled: bool) -> Job:
        name = f"{precision}-compiled" if compiled else precision
        more = [*PRECISIONS[precision], *(["--torchcompile", "inductor"] if compiled else [])]
        return Job(f"train.py, {name}", [[python, "train.py", *digits(name, *more)]], f"backend: {backend[precision]}")

    def validated(job: Job, folder: str, times: int) -> Job:
        files = [f"{folder}/{number}.json" for number in range(times)]
        command = [python, "validate.py", folder, "--device", stage.device, "--results-file"]
        return Job(job.what, [*job.commands, *([*command, file] for file in files), ["cmp", files[0], files[-1]]])

    if stage.dry:
        short = ["--no-amp", "--train-num-samples", "96", "--val-num-samples", "32"]
        trained = Job("train.py, validate.py", [[python, "train.py", *digits("dry", *short)]], "backend: native")
        return [
            validated(trained, str(stage.work / "dry"), 1),
            Job("tests", [[*pytest, "--collect-only", *CUDA_TESTS]]),
        ]
    folder = str(stage.work / "bfloat16")
    first = validated(training("bfloat16", compiled=False), folder, 2)
    export = [python, "scripts/export.py", folder, "--output", f"{folder}/exported", "--formats", "timm", "onnx"]
    first = Job("train.py, bfloat16; validate.py twice; export.py", [*first.commands, export], "backend: triton")
    launcher = [python, "-m", "torch.distributed.run", "--nproc-per-node", "1", "train.py"]
    torchrun = Job("torchrun train.py", [[*launcher, *digits("torchrun", *PRECISIONS["bfloat16"])]], "backend: triton")
    rest = [("bfloat16", True), ("float16", False), ("float32", False), ("float16", True), ("float32", True)]
    suite = Job("pytest -m cuda", [[*pytest, "-n", "4", *CUDA_TESTS]])
    return [first, suite, torchrun, *(training(*which) for which in rest)]


def run(stage: Stage, job: Job, log: Path) -> None:
    """Run a job's commands one after the other."""

    def work():
        for number, command in enumerate(job.commands):
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(stage.left(), 1),
            )
            with log.open("a") as file:
                file.write(f"$ {' '.join(command)}\n{done.stdout}\n")
            lines = done.stdout.strip().splitlines() or ["no output"]
            if done.returncode != 0:
                wrong = [line for line in lines if line.startswith(("error", "FAILED", "E  "))] or lines
                return {"ok": False, "detail": f"exit status {done.returncode}: {wrong[-1][:200]}"}
            if number == 0 and job.expected not in done.stdout:
                return {"ok": False, "detail": f"its output lacks {job.expected!r}"}
        return {"detail": lines[-1][:100]}

    stage.attempt(job.what, work)


def main() -> None:
    stage = Stage("product")
    waiting = iter(jobs(stage))
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                job = next(waiting, None)
            if job is None or stage.left() < 5:
                return
            run(stage, job, stage.options.output / "log.txt")

    workers = [threading.Thread(target=worker) for _ in range(2 if stage.dry else SIDE_BY_SIDE)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()


if __name__ == "__main__":
    main()
