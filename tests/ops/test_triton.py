"""The CUDA kernels: right under Triton's interpreter, compilable without a GPU, and right on a GPU if there is one."""

import subprocess
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

from tnt_timm.ops import triton_backend, triton_launches  # noqa: E402
from tnt_timm.ops.triton_launches import Launch  # noqa: E402

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(interpreted):
    """The errors of every case."""
    return interpreted("compare.py", "triton")


@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: case.name)
def test_output_and_gradients_equal_the_references(found, case):
    assert not {name: error for name, error in found[case.name].items() if not error < tolerance(case, "cpu")}


def test_training_steps_have_the_recorded_losses(interpreted):
    """Only eight steps, because the interpreter is slow. Its rounding to bfloat16 doubles the error of the reference."""
    found = interpreted("twenty_steps.py", "triton", "8", "float32", "bfloat16")
    assert len(found["float32"]) == 8 and error(found["float32"]) < 1e-5
    assert 1e-5 < error(found["bfloat16"]) < 2 * error(losses("reference", torch.bfloat16, steps=8))


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
def test_kernels_compile_without_a_gpu(capability):
    command = [sys.executable, REPO / "benchmarks" / "kernel_resources.py", "--models", "tnt_s"]
    done = subprocess.run([*command, "--capability", str(capability)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines]
    assert [row[1] for row in rows] == ["forward", "mlp_backward", "attention_backward"]
    for row in rows:
        assert int(row[row.index("shared") + 2]) <= 99 * 1024, "more shared memory than compute capability 8.6 has"
        assert 1000 < int(row[row.index("instructions") + 1]) < 6000
    assert "spilled bytes 0 " in lines[0]


def test_launch_sizes_are_those_of_the_capability_or_the_default(monkeypatch):
    tuned = {"forward": {32: Launch(128, 8, 2)}}
    monkeypatch.setitem(triton_launches.LAUNCHES, 89, tuned)
    assert triton_launches.launch(89, "forward", 32) == (128, 8, 2)
    default = triton_launches.DEFAULT
    for capability, kernel, width in ((89, "forward", 64), (89, "mlp_backward", 32), (75, "forward", 32)):
        assert triton_launches.launch(capability, kernel, width) == default[kernel][width]
    assert triton_launches.launch(None, "forward", 32) == default["forward"][32]


def test_launch_sizes_can_be_overridden(monkeypatch):
    monkeypatch.setitem(triton_launches.OVERRIDES, "forward", Launch(256, 8, 3))
    wanted = {"forward": (256, 8, 3), "mlp_backward": triton_launches.LAUNCHES[90]["mlp_backward"][32]}
    for kernel, launch in wanted.items():
        sizes = triton_backend.launch_sizes(kernel, 90, 24, 4, 16, 96)
        assert (sizes["T"], sizes["num_warps"], sizes["num_stages"]) == launch


@pytest.mark.parametrize("capability", triton_launches.LAUNCHES)
def test_an_entry_of_the_table_is_printed_as_its_source(capability):
    printed = triton_launches.source(capability, triton_launches.LAUNCHES[capability])
    assert printed in Path(triton_launches.__file__).read_text()
    assert eval("{" + printed + "}", {"Launch": Launch}) == {capability: triton_launches.LAUNCHES[capability]}


def test_a_tile_holds_at_least_a_sentence():
    assert triton_backend.launch_sizes("attention_backward", None, 12, 2, 64, 48)["T"] == 64
