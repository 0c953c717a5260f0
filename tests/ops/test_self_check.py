"""Kernels that are wrong, or do not run, are found out before they compute anything that counts."""

import contextlib

import pytest
import torch

from tnt_timm import ops
from tnt_timm.ops import native, self_check
from tnt_timm.ops.self_check import Case
from tnt_timm.runtime.backends import agree_on_backends
from tnt_timm.runtime.distributed import World

triton = pytest.importorskip("triton")

WAYS = {  # and what the warning says about each
    "compile error": "no such instruction",
    "shared memory": "Required: 294912, Hardware limit: 101376",
    "registers": "Required: 70000, Hardware limit: 65536",
    "launch": "Triton Error [CUDA]: invalid argument",
    "no C compiler": "Failed to find C compiler",
    "unwritten output": "the relative error of the output is nan",
    "wrong output": "the relative error of the output is 0.2",
    "NaN": "the relative error of the output is nan",
    "one wrong word": "the relative error of the output is",
    "one wrong word in a gradient": "the relative error of the gradient of words is",
    "stochastic depth": "the relative error of the output is",
    "wrong gradient": "the relative error of the gradient of words is 0.2",
    "wrong parameters' gradients": "the relative error of the gradient of",
    "MLP gradients of the last tile only": "the relative error of the gradient of",
    "attention gradients of the last tile only": "the relative error of the gradient of",
}


@pytest.fixture(scope="module")
def found(interpreted):
    return interpreted("broken_kernels.py")


def test_every_way_is_tried(found):
    assert set(found["ways"]) == {"nothing", *WAYS}


def test_right_kernels_compute(found):
    way = found["ways"]["nothing"]
    assert way["log"] == ["INFO inner transformer backend: triton"]
    assert way["reference"] == [False, False] and way["raised"] == []


@pytest.mark.parametrize("name", WAYS)
def test_the_reference_computes_instead_with_one_warning(found, name):
    way = found["ways"][name]
    (line,) = way["log"]
    assert line.startswith(
        "WARNING inner transformer backend: reference (the CUDA kernels failed the self-check on a CPU"
    )
    assert f"(Triton {triton.__version__}, bfloat16, 16 words of width 12, 2 heads, MLP of width 48): " in line
    assert WAYS[name] in line
    assert way["reference"] == [True, True]


@pytest.mark.parametrize("name", WAYS)
def test_tnt_backend_triton_raises_each_time(found, name):
    raised = found["ways"][name]["raised"]
    assert len(raised) == 2 and raised[0] == raised[1]
    assert raised[0].startswith("TNT_BACKEND=triton: the CUDA kernels failed the self-check on ")
    assert WAYS[name] in raised[0]
    assert raised[0].endswith("unset TNT_BACKEND to compute with the reference")


def test_random_state_is_left_alone(found):
    assert all(way["undisturbed"] for way in found["ways"].values())


def test_the_first_call_may_come_in_the_middle_of_anything(found):
    """The script itself compares the results."""
    assert set(found["modes"]) == {"inference mode", "counted", "compiled", "default device"}
    assert all(log == ["INFO inner transformer backend: triton"] for log in found["modes"].values())


needs_native = pytest.mark.skipif(native.library(12, 2, 48).why_not is not None, reason="needs the native backend")
CPU = torch.device("cpu")


@needs_native
def test_a_kernel_that_makes_the_device_unusable_is_an_error(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    case = Case(5, 16, 12, 2)
    assert self_check.check("native", CPU, case) is None
    monkeypatch.setattr(native, "forward", crash)
    assert "illegal memory access" in self_check.check("native", CPU, case)
    monkeypatch.setattr(torch, "ones", crash)
    with pytest.raises(
        RuntimeError, match=r"cpu is unusable after a crash in the native kernels \(RuntimeError: CUDA err"
    ):
        self_check.check("native", CPU, case)


@needs_native
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error: out of memory")]
)
def test_out_of_memory_is_raised_and_not_a_fallback(error, monkeypatch):
    def full(*args):
        raise error

    monkeypatch.setattr(native, "forward", full)
    with pytest.raises(type(error), match="out of memory"):
        self_check.check("native", CPU, Case(5, 16, 12, 2))


def test_unwritten_results_are_nan():
    with self_check._NewTensorsHoldNan():
        assert torch.empty_like(torch.ones(3)).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gradient_that_ought_to_be_zero_may_be_almost_zero():
    case = Case(5, 1, 12, 2)  # with one word, attention does not depend on q and k
    right = self_check.expected(case, self_check.make_inputs(case))
    assert right["qk"].norm() < 1e-12
    almost = {**right, "qk": right["qk"] + 1e-9}
    assert max(self_check.differences(right, almost).values()) < 1e-6
    wrong = {**right, "qk": right["qk"] + 1e-3}
    assert self_check.differences(right, wrong)["qk"] > 0.1


def test_tolerance_is_that_of_the_coarser_type():
    assert self_check.tolerance(Case(1, 16, 12, 2, "float16", words_dtype="bfloat16"), "cuda") == 3e-2
    assert self_check.tolerance(Case(1, 16, 12, 2, "float16"), "cuda") == 4e-3


class TwoRanks(World):
    """The other rank has no Triton, and so has chosen nothing."""

    def gather(self, value):
        return [value, {}] if isinstance(value, dict) else [value, value]


def test_a_rank_without_a_backend_is_noticed(monkeypatch):
    layer = ops.Layer("triton", torch.float32, torch.bfloat16, 16, 12, 2, 48, False)
    monkeypatch.setattr(ops, "_reasons", {layer: None})
    monkeypatch.setattr(ops, "_forced", {})
    agree_on_backends([], (3, 32, 32), contextlib.nullcontext, TwoRanks(0, 2, CPU))
    assert ops._forced == {layer: "rank 1: no triton backend"}
