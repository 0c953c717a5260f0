#!/usr/bin/env python3
"""Run the tests as other processors would compute them: `python tests/processors.py`, for a table of rows that pass or fail.

Each row limits the instruction sets of PyTorch, oneDNN, MKL and the native backend, or changes the number of threads. By
default it runs the tests in which arithmetic matters; `--whole` runs all of them, other arguments go to pytest.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Sequence

REPO = Path(__file__).parent.parent
ARITHMETIC = ["tests/ops", "tests/models", "tests/export", "tests/figures/test_attention.py"]
ARITHMETIC += ["--ignore=tests/ops/test_triton.py", "--ignore=tests/ops/test_self_check.py"]  # the GPU's kernels
AVX2 = dict(
    ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2", TNT_MARCH="x86-64-v3"
)
# None of PyTorch's vector kernels, and the reference instead of the native backend
BASELINE = dict(
    ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_ENABLE_INSTRUCTIONS="SSE4_2", TNT_MARCH="x86-64-v2"
)
ROWS: Dict[str, Dict[str, str]] = {
    "avx2": AVX2,
    "baseline": BASELINE,
    "mkl-compatible": dict(MKL_CBWR="COMPATIBLE"),
    "2-threads": dict(TNT_TEST_THREADS="2", OMP_NUM_THREADS="2"),
    "3-threads-avx2": dict(AVX2, TNT_TEST_THREADS="3", OMP_NUM_THREADS="3"),
}


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0 if every row passes, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="default: all")
    parser.add_argument("--turn", type=int, help="run one row only: number TURN, counted round and round (for CI)")
    parser.add_argument("--whole", action="store_true", help="the whole suite instead of the arithmetic part")
    parser.add_argument("--python", default=sys.executable, help="an interpreter with other versions of torch or timm")
    own, rest = parser.parse_known_args(argv)
    rows = own.rows if own.turn is None else [own.rows[own.turn % len(own.rows)]]
    failed: List[str] = []
    for name in rows:
        status = run(name, own.python, [] if own.whole else ARITHMETIC, rest)
        failed += [name] if status else []
    print(f"failed: {' '.join(failed)}" if failed else f"all {len(rows)} rows pass")
    return 1 if failed else 0


def run(name: str, python: str, tests: Sequence[str], rest: Sequence[str]) -> int:
    """Run the tests under one row; prints what failed and a line of its own. Returns pytest's exit status."""
    start = time.perf_counter()
    # Two workers, but not where each has several threads, which would wait for each other
    spread = [] if "TNT_TEST_THREADS" in ROWS[name] else ["-n", "2"]
    command = [python, "-m", "pytest", "-q", "--no-header", "--tb=short", "-W", "ignore", *spread, *tests, *rest]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, **ROWS[name]}, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-10_000:], done.stderr[-2_000:], sep="\n")
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
    settings = " ".join(f"{key}={value}" for key, value in ROWS[name].items())
    print(f"{name}: {summary}; {time.perf_counter() - start:.0f} s ({settings})", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
