"""Check, measure and tune this project on a GPU: `python benchmarks/gpu --minutes 8 --output DIR`.

The most valuable stages run first, each in its own process with its own share of the time:

    machine   hardware and versions, memory bandwidth, matrix throughput
    kernels   output and every gradient compared with float64; the recorded losses; the check before the first use
    product   the suite's CUDA tests, train.py in each precision, validate.py, export.py
    speed     TNT compared with timm's TNT and DeiT; parts of a step; the slowest kernels
    tuning    launch sizes of the three kernels; the best ones as source code for `triton_launches`
    loading   train.py from JPEG files, compared with the loader alone, with augmentation in workers and on the GPU

Results are written to DIR/results.jsonl and DIR/report.md as soon as they exist, and the output of the stages to DIR/log.txt, so
that an interrupted run keeps its results. `--device cpu` is a dry run with tiny sizes and the kernels under Triton's interpreter.
Only the dependencies must be installed, not this package.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests/ops")]
sys.path[:0] = PATHS

import report  # noqa: E402
import torch  # noqa: E402

from tnt_timm.commands.entry_point import run  # noqa: E402
from tnt_timm.errors import ConfigError, UserError  # noqa: E402

# shares of the time; unused time goes to later stages
SHARES = {"machine": 12, "kernels": 16, "product": 22, "speed": 28, "tuning": 14, "loading": 16}
GRACE_S = 5  # seconds before a late stage is killed


class Run:
    """The processes of the stages, and their common options."""

    def __init__(self, options: argparse.Namespace, work: str):
        self.options = options
        self.work = work
        self.end = time.monotonic() + 60 * options.minutes
        self.log = (options.output / "log.txt").open("a")
        self.env = dict(
            os.environ, PYTHONPATH=os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        )
        # one cache for all stages: torch.compile would use another one for its processes
        self.env |= {"TRITON_CACHE_DIR": f"{work}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor"}
        if options.device == "cpu":  # interpreted and without compilation
            self.env |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        self.known = ""

    def start(self, stage: str, until: float, *more: str) -> subprocess.Popen:
        command = [sys.executable, str(Path(__file__).with_name(f"{stage}.py")), "--device", self.options.device]
        command += ["--until", f"{until:.1f}", "--output", str(self.options.output), "--work", self.work, *more]
        env = self.env | ({"OMP_NUM_THREADS": "1"} if stage == "kernels" else {})  # its processes fill the cores
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def finish(self, stage: str, process: subprocess.Popen, until: float) -> str:
        """Update the report until a stage ends or times out. Record and return the error, or an empty string."""
        log = self.options.output / "log.txt"
        begun_at = log.stat().st_size
        try:
            while process.poll() is None and time.monotonic() < until + GRACE_S:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                self.write()
        finally:
            cut = process.poll() is None
            kill(process)
        wrong = "timed out" if cut else ""
        if not cut and process.returncode != 0:
            said = log.read_bytes()[begun_at:].decode(errors="replace").strip().splitlines() or ["it wrote nothing"]
            wrong = f"exit status {process.returncode}: {said[-1][:200]}"
        if wrong:
            row = {"stage": stage, "what": "the stage", "ok": False, "detail": wrong}
            with (self.options.output / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.write()
        return wrong

    def write(self) -> None:
        text = report.markdown(report.read(self.options.output))
        if text != self.known:
            new = self.options.output / "report.md.new"
            new.write_text(text)
            os.replace(new, self.options.output / "report.md")
            self.known = text


def kill(process: subprocess.Popen) -> None:
    """Kill a stage with all its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 if all results are right."""
    return run(prove, argv)


def prove(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: there is no GPU, the output folder cannot be used, or a result is not right.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for all stages together (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.jsonl, log.txt and report.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a dry run with tiny sizes")
    parser.add_argument("--stages", nargs="+", choices=SHARES, default=list(SHARES), metavar="STAGE")
    parser.add_argument("--commit", default="", help="commit for the report if the checkout has no .git")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: this machine has no usable CUDA GPU; pass --device cpu for a dry run")
    options.output = options.output.absolute()
    if (options.output / "results.jsonl").exists():
        raise ConfigError(f"output: {options.output} holds the results of an earlier run; name another folder")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: {options.output}: {error.strerror}; name a folder that can be written") from None
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the summary is still printed
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        try:
            run_stages(Run(options, work))
        finally:
            rows = report.read(options.output)
            print(report.short(rows), end="", flush=True)
    failed = sum(not row["ok"] for row in rows)
    if failed or not rows:
        raise UserError(f"{failed} of {len(rows)} results are not right; see {options.output / 'report.md'}")


def run_stages(run: Run) -> None:
    """Run the stages one after the other. Compile the models of `speed` during the stages that measure nothing."""
    stages = [stage for stage in SHARES if stage in run.options.stages]
    compiling: Optional[subprocess.Popen] = None
    try:
        for number, stage in enumerate(stages):
            if compiling is None and "speed" in stages and stage in ("kernels", "product"):
                compiling = run.start("speed", run.end, "--warm-up")
            if compiling is not None and stage not in ("kernels", "product"):
                kill(compiling)
            share = SHARES[stage] / sum(SHARES[other] for other in stages[number:])
            until = time.monotonic() + share * (run.end - time.monotonic())
            more = ["--commit", run.options.commit] if stage == "machine" else []
            wrong = run.finish(stage, run.start(stage, until, *more), until)
            print(f"{stage}: {wrong or 'done'}", flush=True)
    finally:
        if compiling is not None:
            kill(compiling)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
