"""Stage 3: run the commands on a GPU: the suite's CUDA tests, training in each precision, validation, export.

Chains of commands run in parallel. If a command fails, its chain ends, and its last line is recorded.
"""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

from stage import ROOT, Stage

SIDE_BY_SIDE = 4
DIGITS = """--config configs/digits.yaml --epochs 2 --warmup-epochs 0 --model-ema --mixup 0.8 --cutmix 1.0 --reprob 0.25
    --aug-repeats 3 --workers 2""".split()
PRECISIONS = {
    "bfloat16": ["--amp", "--amp-dtype", "bfloat16"],
    "float16": ["--amp", "--amp-dtype", "float16"],
    "float32": ["--no-amp"],
}
BACKENDS = {"bfloat16": "triton", "float16": "triton", "float32": "reference"}
KILLED_AND_RESUMED = "tests/cli/test_interruption.py"
CUDA_TESTS = ["tests/ops", "tests/training", "tests/export"]


class Command(NamedTuple):
    what: str
    argv: List[str]
    expected: str = ""  # in its output


def chains(stage: Stage) -> List[List[Command]]:
    """Return the chains of commands, the most informative ones first."""
    python, folder = sys.executable, str(stage.work / "bfloat16")
    pytest = [python, "-m", "pytest", "-v", "-m", "cuda", "-p", "no:cacheprovider"]
    if stage.dry:
        argv = [python, "train.py", *digits(stage, "bfloat16"), "--no-amp", "--epochs", "1"]
        trained = Command("train.py", argv, "backend: native")
        collected = Command("tests", [*pytest, "--collect-only", KILLED_AND_RESUMED, *CUDA_TESTS])
        return [[trained, validated(stage, folder, "1")], [collected]]
    trained = training(stage, "bfloat16", compiled=False)
    same = Command("validate.py gives the same twice", ["cmp", f"{folder}/1.json", f"{folder}/2.json"])
    export = [python, "scripts/export.py", folder, "--output", f"{folder}/exported", "--formats", "timm", "onnx"]
    first = [trained, validated(stage, folder, "1"), validated(stage, folder, "2"), same, Command("export.py", export)]
    resumed = Command("killed and resumed, deterministic", [*pytest, "-n", "0", KILLED_AND_RESUMED])
    suite = Command("the suite's CUDA tests", [*pytest, "-n", "3", *CUDA_TESTS])
    launcher = [python, "-m", "torch.distributed.run", "--nproc-per-node", "1", "train.py"]
    argv = [*launcher, *digits(stage, "torchrun"), *PRECISIONS["bfloat16"]]
    rest = [("bfloat16", True), ("float16", False), ("float32", False), ("float16", True), ("float32", True)]
    more = [[training(stage, *which)] for which in rest]
    return [first, [resumed], [suite], *more, [Command("torchrun train.py", argv, "backend: triton")]]


def digits(stage: Stage, name: str) -> List[str]:
    return [*DIGITS, "--output", str(stage.work), "--experiment", name, "--device", stage.device]


def training(stage: Stage, precision: str, compiled: bool) -> Command:
    name = f"{precision}-compiled" if compiled else precision
    argv = [sys.executable, "train.py", *digits(stage, name), *PRECISIONS[precision]]
    argv += ["--torchcompile", "inductor"] if compiled else []
    return Command(f"train.py, {name}", argv, f"backend: {BACKENDS[precision]}")


def validated(stage: Stage, folder: str, number: str) -> Command:
    argv = [
        sys.executable,
        "validate.py",
        folder,
        "--device",
        stage.device,
        "--results-file",
        f"{folder}/{number}.json",
    ]
    return Command(f"validate.py, {number}", argv, "each counted once")


def run(stage: Stage, command: Command, log: Path) -> Dict[str, Any]:
    """Run a command. Its output goes to its own file, so that a command that times out leaves its output."""
    try:
        with log.open("w") as file:
            status = subprocess.run(
                command.argv, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(stage.left(), 1)
            ).returncode
    except subprocess.TimeoutExpired:
        status = None
    text = log.read_text()
    with (stage.options.output / "log.txt").open("a") as file:
        file.write(f"$ {' '.join(command.argv)}\n{text}\n")
    lines = text.strip().splitlines() or ["no output"]
    if status is None:
        return {"ok": False, "detail": f"not finished: {lines[-1][:200]}"}
    if status != 0:
        wrong = [line for line in lines if line.startswith(("error", "FAILED", "ERROR", "E  "))] or lines
        return {"ok": False, "detail": f"exit status {status}: {wrong[-1][:200]}"}
    if command.expected not in text:
        return {"ok": False, "detail": f"its output lacks {command.expected!r}"}
    return {"detail": lines[-1][:100]}


def main() -> None:
    stage = Stage("product")
    waiting = iter(enumerate(chains(stage)))
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                number, chain = next(waiting, (0, []))
            if not chain or stage.left() < 5:
                return
            for command in chain:
                log = stage.work / f"command-{number}.log"
                if not stage.attempt(command.what, lambda command=command, log=log: run(stage, command, log)):
                    break

    workers = [threading.Thread(target=worker) for _ in range(2 if stage.dry else SIDE_BY_SIDE)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()


if __name__ == "__main__":
    main()
