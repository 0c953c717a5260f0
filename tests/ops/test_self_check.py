"""Kernels that are wrong, or do not run, are found out before they compute anything that counts."""

import pytest
import torch

from tnt_timm.ops import native, self_check
from tnt_timm.ops.self_check import Case

WAYS = {  # and what the warning says of it
    "compile error": "no such instruction",
    "shared memory": "Required: 294912, Hardware limit: 101376",
    "registers": "Required: 70000, Hardware limit: 65536",
    "launch": "Triton Error [CUDA]: invalid argument",
    "no C compiler": "Failed to find C compiler",
    "unwritten output": "the output differs from the reference by nan of its norm",
    "wrong output": "the output differs from the reference by 0.2 of its norm",
    "NaN": "the output differs from the reference by nan of its norm",
    "stochastic depth": "the output differs",
    "wrong gradient": "the gradient of words differs from the reference by 0.2 of its norm",
    "wrong parameters' gradients": "the gradient of",
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
    assert line.startswith("WARNING inner transformer backend: reference (the CUDA kernels fail their check (")
    assert "interpreted on CPU, Triton " in line and "bfloat16, widths 12 and 48" in line and WAYS[name] in line
    assert way["reference"] == [True, True]


@pytest.mark.parametrize("name", WAYS)
def test_who_asks_for_the_kernels_gets_an_error_each_time(found, name):
    raised = found["ways"][name]["raised"]
    assert len(raised) == 2 and raised[0] == raised[1]
    assert raised[0].startswith("TNT_BACKEND=triton: the CUDA kernels fail their check (") and WAYS[name] in raised[0]
    assert raised[0].endswith("unset TNT_BACKEND to compute with the reference")


def test_random_state_is_left_alone(found):
    assert all(way["undisturbed"] for way in found["ways"].values())


def test_the_first_call_may_come_in_the_middle_of_anything(found):
    """The script itself compares the results."""
    assert set(found["modes"]) == {"inference mode", "counted", "compiled", "default device"}
    assert all(log == ["INFO inner transformer backend: triton"] for log in found["modes"].values())


needs_native = pytest.mark.skipif(native.library(12, 2, 48).why_not is not None, reason="needs the native backend")


@needs_native
def test_a_kernel_that_ruins_the_device_is_an_error(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    case = Case(5, 16, 12, 2)
    assert self_check.failure("native", torch.device("cpu"), case) is None
    monkeypatch.setattr(native, "forward", crash)
    assert "illegal memory access" in self_check.failure("native", torch.device("cpu"), case)
    monkeypatch.setattr(torch, "ones", crash)
    with pytest.raises(RuntimeError, match=r"left cpu unusable \(RuntimeError: CUDA error: an illegal memory access"):
        self_check.failure("native", torch.device("cpu"), case)


@needs_native
def test_a_full_gpu_is_no_fault_of_the_kernels(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(native, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        self_check.failure("native", torch.device("cpu"), Case(5, 16, 12, 2))


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_mode_is_as_before(warn_only):
    torch.use_deterministic_algorithms(warn_only, warn_only=warn_only)
    try:
        with self_check._new_tensors_hold_nan():
            assert torch.empty(3).isnan().all()
        assert torch.are_deterministic_algorithms_enabled() is warn_only
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    finally:
        torch.use_deterministic_algorithms(False)
