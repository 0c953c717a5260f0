"""The CUDA kernels where there is no GPU: right under Triton's interpreter, and buildable."""

import sys
from pathlib import Path

import pytest
import torch

from tnt_timm.ops.self_check import tolerance

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from compare import CUDA_CASES, TRITON_CASES, errors_twice  # noqa: E402
from twenty_steps import error, losses  # noqa: E402


@pytest.fixture(scope="module")
def found(interpreted):
    """The errors of every case."""
    return interpreted("compare.py", "triton")


@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: case.name)
def test_output_and_gradients_equal_the_references(found, case):
    assert not {name: error for name, error in found[case.name].items() if not error < tolerance(case, "cpu")}


def test_twenty_training_steps_have_the_recorded_losses(interpreted):
    """In bfloat16 they may differ as the reference's do; the interpreter's rounding has twice the error."""
    found = interpreted("twenty_steps.py", "triton", "float32", "bfloat16")
    assert error(found["float32"]) < 1e-5
    assert 1e-5 < error(found["bfloat16"]) < 2 * error(losses("reference", torch.bfloat16))


@pytest.mark.cuda
@pytest.mark.parametrize("case", CUDA_CASES, ids=lambda case: case.name)
def test_output_and_gradients_equal_the_references_on_a_gpu(case):
    found, same_bits = errors_twice(case, "triton", "cuda")
    assert not {name: error for name, error in found.items() if not error < tolerance(case, "cuda")}
    assert same_bits


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_twenty_training_steps_have_the_recorded_losses_on_a_gpu(dtype):
    assert error(losses("triton", dtype, device="cuda")) < 2 * error(losses("reference", dtype, device="cuda"))


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_build_without_a_gpu(run_script, capability):
    done = run_script("kernel_resources", "--models", "tnt_s", "--capability", capability)
    assert done.status == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert [row[1] for row in rows] == ["forward", "mlp_backward", "attention_backward"]
    for row in rows:
        assert int(row[row.index("shared") + 2]) <= 99 * 1024, "more shared memory than every GPU since 8.0 has"
    assert "spilled bytes 0 " in done.out.splitlines()[0]
