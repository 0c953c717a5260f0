"""Compare a backend of the inner transformer with the reference: before its first use on a GPU, and in tests.

The reference computes in float64 on the CPU. Random inputs come from a generator of their own, so that a check leaves the
random state of a run alone.
"""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils import deterministic

from tnt_timm.errors import one_line
from tnt_timm.ops import reference
from tnt_timm.ops.custom_op import inner_transformer

NAMES = (
    "norm1 norm1_bias qk qk_bias v v_bias proj proj_bias norm2 norm2_bias fc1 fc1_bias fc2 fc2_bias".split()
)  # of the parameters, in the reference's order
SENTENCES = {"cuda": 301, "cpu": 5}  # so that the last tile is not full; on CPU, Triton's interpreter is slow
# by type of the products' operands: about three times what rounding them gives
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 3e-6}
INTERPRETED_BFLOAT16 = 0.1  # Triton's interpreter truncates where hardware rounds


class Case(NamedTuple):
    """Sizes and types of one comparison."""

    sentences: int  # R
    words: int  # M, per sentence
    width: int  # C
    heads: int
    dtype: str = "float32"  # of the products' operands
    biased: bool = False  # q, k and v have biases
    drop_path: bool = False  # both residuals have factors, some of them zero
    words_dtype: str = "float32"
    mlp_width: int = 0  # F; 0 means 4 * width

    @property
    def name(self) -> str:
        return "-".join(str(x) for x in self)


class Inputs(NamedTuple):
    """What a case computes with, in float64 on the CPU."""

    words: Tensor  # (R, M, C)
    grad: Tensor  # (R, M, C), of the output
    parameters: Dict[str, Optional[Tensor]]
    scales: List[Optional[Tensor]]  # of attention and MLP, (R, 1, 1)


def make_inputs(case: Case) -> Inputs:
    """Return random inputs, the same ones for the same case."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)

    C, F = case.width, case.mlp_width or 4 * case.width
    shapes = [(C,), (C,), (2 * C, C), (2 * C,), (C, C), (C,), (C, C), (C,), (C,), (C,), (F, C), (F,), (C, F), (C,)]
    parameters: Dict[str, Optional[Tensor]] = {name: 0.2 * normal(*shape) for name, shape in zip(NAMES, shapes)}
    parameters["norm1"] += 1
    parameters["norm2"] += 1
    if not case.biased:
        parameters["qk_bias"] = parameters["v_bias"] = None
    words, grad = (normal(case.sentences, case.words, C) for _ in range(2))
    scales: List[Optional[Tensor]] = [None, None]
    if case.drop_path:
        scales = [normal(case.sentences, 1, 1).gt(-0.5).double() / 0.7 for _ in range(2)]
    return Inputs(words, grad, parameters, scales)


def results(inputs: Inputs, dtype: torch.dtype, device: str, call: Callable) -> Dict[str, Tensor]:
    """Return the output and each gradient of `call(leaves, scales)`, which gets words and parameters of `dtype` by name."""

    def copied(x: Tensor) -> Tensor:
        return x.to(device, dtype, copy=True)

    leaves = {"words": inputs.words, **inputs.parameters}
    leaves = {name: None if x is None else copied(x).requires_grad_() for name, x in leaves.items()}
    out = call(leaves, [None if x is None else copied(x) for x in inputs.scales])
    assert out.dtype == dtype
    present = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(out, list(present.values()), copied(inputs.grad))
    return {"out": out.detach(), **dict(zip(present, gradients))}


def wanted(case: Case, inputs: Inputs) -> Dict[str, Tensor]:
    """Return output and gradients by the reference, in float64 on the CPU."""

    def by_reference(leaves, scales):
        return reference.inner_transformer(
            *leaves.values(), num_heads=case.heads, attn_scale=scales[0], mlp_scale=scales[1]
        )

    return results(inputs, torch.float64, "cpu", by_reference)


def found(case: Case, inputs: Inputs, backend: str, device: str = "cpu") -> Dict[str, Tensor]:
    """Return output and gradients by a backend, whose new tensors hold NaN until they are written."""

    def by_backend(leaves, scales):
        first, *rest = (x for x in leaves.values() if x is not None)
        return inner_transformer(first, rest, case.heads, 1e-5, *scales, getattr(torch, case.dtype), backend)

    with _new_tensors_hold_nan():
        return results(inputs, getattr(torch, case.words_dtype), device, by_backend)


def differences(wanted: Dict[str, Tensor], found: Dict[str, Tensor]) -> Dict[str, float]:
    """Return |found - wanted| / |wanted| of each tensor, in the Euclidean norm; NaN where anything is NaN."""
    return {name: _difference(wanted[name], found[name].cpu().double()) for name in wanted}


def errors(case: Case, backend: str, device: str = "cpu") -> Dict[str, float]:
    """Return the relative error of a backend's output and of each of its gradients, by name."""
    inputs = make_inputs(case)
    return differences(wanted(case, inputs), found(case, inputs, backend, device))


def _difference(wanted: Tensor, found: Tensor) -> float:
    assert wanted.shape == found.shape
    if wanted.numel() == 0:
        return 0.0
    return ((wanted - found).norm() / wanted.norm().clamp(min=1e-12)).item()


@contextlib.contextmanager
def _new_tensors_hold_nan() -> Iterator[None]:
    """PyTorch fills what it allocates with NaN where algorithms are deterministic and this is asked for."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled


def failure(backend: str, device: torch.device, case: Case) -> Optional[str]:
    """Run a backend forward and backward, with and without stochastic depth, beside the reference.

    Args:
        backend: its name.
        device: that it runs on.
        case: sizes and types.

    Returns:
        None where output and gradients are right. Else what is wrong, in one line without the name of the device.

    Raises:
        torch.OutOfMemoryError: the device is full.
        RuntimeError: the kernel has left the device unusable, so that nothing else can compute on it either.
    """
    try:
        for drop_path in (False, True):
            # a new thread has none of the caller's modes: autocast, inference, compilation, counting, default device
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(errors, case._replace(drop_path=drop_path), backend, str(device)).result()
            wrong = _worst(found, tolerance(case, device.type))
            if wrong is not None:
                return wrong
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compiler, driver and launcher have many exceptions of their own
        why = f"{type(error).__name__}: {one_line(error, 200)}"
        try:
            torch.ones(1, device=device).add_(1).item()
        except RuntimeError:
            raise RuntimeError(f"the {backend} kernel left {device} unusable ({why})") from error
        return why
    return None


def tolerance(case: Case, device: str) -> float:
    """Return the relative error that a right kernel stays below, on "cuda" or, interpreted, on "cpu"."""
    dtype = getattr(torch, case.dtype)
    return INTERPRETED_BFLOAT16 if (device, dtype) == ("cpu", torch.bfloat16) else TOLERANCES[dtype]


def _worst(errors: Dict[str, float], tolerance: float) -> Optional[str]:
    name, error = max(errors.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if error <= tolerance:
        return None
    what = "output" if name == "out" else f"gradient of {name}"
    return f"the {what} differs from the reference by {error:.2g} of its norm; {tolerance:g} is allowed"
