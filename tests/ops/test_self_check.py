"""Kernels that are wrong or do not run are detected before they compute a result that is used."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from tnt_timm import ops
from tnt_timm.ops import dispatch, native, self_check
from tnt_timm.ops.self_check import Case
from tnt_timm.runtime.backend_agreement import agree_on_backends
from tnt_timm.runtime.distributed import World

triton = pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent))
from broken_kernels import WAYS  # noqa: E402

CPU, CASE = torch.device("cpu"), Case(5, 16, 12, 2)
needs_native = pytest.mark.skipif(native.library(12, 2, 48).functions is None, reason="needs the native backend")


@pytest.fixture(scope="module")
def found(interpreted):
    return interpreted("broken_kernels.py")


def test_right_kernels_compute(found):
    way = found["ways"]["nothing"]
    assert way["log"] == ["INFO inner transformer backend: triton"]
    assert way["reference"] == [False, False] and way["raised"] == []


@pytest.mark.parametrize("name", WAYS)
def test_broken_kernels_give_way_to_the_reference_with_one_warning(found, name):
    """With TNT_BACKEND=triton, each call raises an error instead."""
    way = found["ways"][name]
    (line,) = way["log"]
    failed = "the CUDA kernels failed the self-check on a CPU"
    assert line.startswith(f"WARNING inner transformer backend: reference ({failed}")
    assert f"(Triton {triton.__version__}, bfloat16, 16 words of width 12, 2 heads, MLP of width 48): " in line
    assert way["reference"] == [True, True]
    error, again = way["raised"]
    assert error == again and error.startswith(f"TNT_BACKEND=triton: {failed}")
    assert error.endswith("unset TNT_BACKEND to compute with the reference")
    assert WAYS[name][0] in line and WAYS[name][0] in error


def test_random_state_is_not_changed(found):
    assert all(way["undisturbed"] for way in found["ways"].values())


def test_the_first_call_may_be_inside_any_context(found):
    """The script itself compares the results."""
    assert set(found["modes"]) == {"inference mode", "counted", "compiled", "default device"}
    assert all(log == ["INFO inner transformer backend: triton"] for log in found["modes"].values())


@needs_native
def test_a_kernel_that_makes_the_device_unusable_is_an_error(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert self_check.check("native", CPU, CASE) is None
    monkeypatch.setattr(native, "forward", crash)
    assert "illegal memory access" in self_check.check("native", CPU, CASE)
    monkeypatch.setattr(torch, "ones", crash)
    message = r"cpu is unusable after a crash in the native kernels \(RuntimeError: CUDA err"
    with pytest.raises(RuntimeError, match=message):
        self_check.check("native", CPU, CASE)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Error: out of memory")])
def test_out_of_memory_is_raised_instead_of_a_fallback(error, monkeypatch):
    def full(*args):
        raise error

    monkeypatch.setattr(native, "forward", full)
    with pytest.raises(type(error), match="out of memory"):
        self_check.check("native", CPU, CASE)


def test_unwritten_results_are_nan():
    with self_check._NewTensorsHoldNan():
        assert torch.empty_like(torch.ones(3)).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_gradient_whose_true_value_is_zero_may_be_almost_zero():
    case = Case(5, 1, 12, 2)  # with one word, attention does not depend on q and k
    right = self_check.expected(case, self_check.make_inputs(case))
    assert right["qk"].norm() < 1e-12
    almost, wrong = ({**right, "qk": right["qk"] + error} for error in (1e-9, 1e-3))
    assert max(self_check.differences(right, almost).values()) < 1e-6
    assert self_check.differences(right, wrong)["qk"] > 0.1


def test_tolerance_is_that_of_the_coarser_dtype():
    assert self_check.tolerance(Case(1, 16, 12, 2, "float16", words_dtype="bfloat16"), "cuda") == 3e-2
    assert self_check.tolerance(Case(1, 16, 12, 2, "float16"), "cuda") == 4e-3


class TwoRanks(World):
    """The other rank has no Triton, and so has chosen no backend."""

    def gather(self, value):
        return [value, {}] if isinstance(value, dict) else [value, value]


def test_a_rank_without_the_backend_makes_all_ranks_use_the_reference(monkeypatch):
    layer = ops.Layer("triton", torch.float32, torch.bfloat16, 16, 12, 2, 48, False, False)
    monkeypatch.setattr(dispatch, "_reasons", {layer: None})
    monkeypatch.setattr(dispatch, "_forced", {})
    agree_on_backends([], (3, 32, 32), contextlib.nullcontext, TwoRanks(0, 2, CPU))
    assert dispatch._forced == {layer: "rank 1: no triton backend"}
