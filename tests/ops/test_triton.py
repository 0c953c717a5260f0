"""The CUDA kernels where there is no GPU: right under Triton's interpreter, and buildable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from compare import TRITON_CASES  # noqa: E402

# the interpreter rounds to bfloat16 by cutting off, twice the error of the hardware's rounding
BOUNDS = {"float32": 3e-6, "float16": 4e-3, "bfloat16": 8e-2}


@pytest.fixture(scope="module")
def found():
    """The errors of every case, from one process: the interpreter is chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, str(HERE / "compare.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: case.name)
def test_output_and_gradients_equal_the_references(found, case):
    wrong = {name: error for name, error in found[case.name].items() if not error < BOUNDS[case.dtype]}
    assert not wrong


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_build_without_a_gpu(capability):
    script = HERE.parents[1] / "scripts/kernel_resources.py"
    command = [sys.executable, str(script), "--models", "tnt_s", "--capability", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[1] for row in rows] == ["forward", "mlp_backward", "attention_backward"]
    for row in rows:
        assert int(row[row.index("shared") + 2]) <= 99 * 1024, "more shared memory than every GPU since 8.0 has"
    assert "spilled bytes 0 " in done.stdout.splitlines()[0]
