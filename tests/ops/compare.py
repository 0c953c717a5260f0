"""How far a backend of the inner transformer is from the reference in float64. It also runs alone, in another environment:

TRITON_INTERPRET=1 python tests/ops/compare.py triton
TNT_MARCH=x86-64-v3 python tests/ops/compare.py native

It prints one line of JSON: for every case, the errors by name.
"""

import json
import sys
from typing import Callable, Dict, List, NamedTuple, Optional

import torch

from tnt_timm.ops import reference
from tnt_timm.ops.custom_op import inner_transformer

NAMES = (
    "norm1 norm1_bias qk qk_bias v v_bias proj proj_bias norm2 norm2_bias fc1 fc1_bias fc2 fc2_bias".split()
)  # of the parameters, in the reference's order


class Case(NamedTuple):
    sentences: int
    words: int
    width: int
    heads: int
    dtype: str = "float32"
    biased: bool = False  # q, k and v have biases
    drop_path: bool = False
    words_dtype: str = "float32"

    @property
    def name(self) -> str:
        return "-".join(str(x) for x in self)


TRITON_CASES = [
    *(
        Case(*sizes, "float32", True, True)
        for sizes in ((3, 16, 24, 4), (1, 16, 12, 2), (5, 16, 40, 4), (19, 16, 24, 3))
    ),
    *(Case(*sizes) for sizes in ((3, 4, 24, 1), (1, 64, 24, 8), (3, 4, 12, 6), (2, 64, 40, 5), (5, 16, 24, 8))),
    *(Case(3, 16, width, 2, dtype, False, True) for width in (12, 24, 40) for dtype in ("bfloat16", "float16")),
    Case(3, 16, 24, 4, "bfloat16", True, True, "bfloat16"),
    Case(0, 16, 24, 4),
]

NATIVE_CASES = [
    *(
        Case(R, 16, C, H, "float32", biased, True)
        for R, C, H in ((1, 12, 2), (7, 24, 4), (40, 40, 4))
        for biased in (False, True)
    ),
    *(Case(3, 16, C, H) for C, H in ((24, 1), (24, 8), (16, 4), (32, 2), (4, 2), (28, 4))),
    Case(0, 16, 24, 4),
]


class Inputs(NamedTuple):
    """What a case computes with, in float64."""

    words: torch.Tensor  # (R, M, C)
    grad: torch.Tensor  # of the output
    parameters: Dict[str, Optional[torch.Tensor]]
    scales: List[Optional[torch.Tensor]]  # of attention and MLP, (R, 1, 1)


def make_inputs(case: Case, mlp_ratio: int = 4) -> Inputs:
    torch.manual_seed(0)
    C, F = case.width, mlp_ratio * case.width
    shapes = [(C,), (C,), (2 * C, C), (2 * C,), (C, C), (C,), (C, C), (C,), (C,), (C,), (F, C), (F,), (C, F), (C,)]
    parameters = {name: 0.2 * torch.randn(shape, dtype=torch.float64) for name, shape in zip(NAMES, shapes)}
    parameters["norm1"] += 1
    parameters["norm2"] += 1
    if not case.biased:
        parameters["qk_bias"] = parameters["v_bias"] = None
    words = torch.randn(case.sentences, case.words, C, dtype=torch.float64)
    grad = torch.randn_like(words)
    scales = [None, None]
    if case.drop_path:
        scales = [torch.rand(case.sentences, 1, 1).gt(0.3).double() / 0.7 for _ in range(2)]
    return Inputs(words, grad, parameters, scales)


def results(case: Case, inputs: Inputs, dtype: torch.dtype, call: Callable) -> Dict[str, torch.Tensor]:
    """The output and each gradient by `call(leaves, scales)`, which gets words and parameters of `dtype` by name."""
    leaves = {"words": inputs.words.to(dtype, copy=True).requires_grad_()}
    leaves |= {
        name: None if x is None else x.to(dtype, copy=True).requires_grad_() for name, x in inputs.parameters.items()
    }
    out = call(leaves, [None if x is None else x.to(dtype) for x in inputs.scales])
    assert out.dtype == dtype
    present = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(out, list(present.values()), inputs.grad.to(dtype))
    return {"out": out.detach(), **dict(zip(present, gradients))}


def wanted(case: Case, inputs: Inputs) -> Dict[str, torch.Tensor]:
    """By the reference, in float64."""

    def by_reference(leaves, scales):
        return reference.inner_transformer(
            *leaves.values(), num_heads=case.heads, attn_scale=scales[0], mlp_scale=scales[1]
        )

    return results(case, inputs, torch.float64, by_reference)


def errors(case: Case, backend: str, mlp_ratio: int = 4) -> Dict[str, float]:
    """The largest difference of the output and of each gradient, as a part of the largest value."""
    inputs = make_inputs(case, mlp_ratio)

    def by_backend(leaves, scales):
        first, *rest = (x for x in leaves.values() if x is not None)
        return inner_transformer(first, rest, case.heads, 1e-5, *scales, getattr(torch, case.dtype), backend)

    return differences(wanted(case, inputs), results(case, inputs, getattr(torch, case.words_dtype), by_backend))


def differences(wanted: Dict[str, torch.Tensor], found: Dict[str, torch.Tensor]) -> Dict[str, float]:
    """The largest difference of each tensor, as a part of the largest value."""
    return {name: _difference(wanted[name], found[name]) for name in wanted}


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    assert wanted.shape == found.shape
    if wanted.numel() == 0:
        return 0.0
    largest: Optional[float] = wanted.abs().max().item()
    return (wanted - found).abs().max().item() / max(largest, 1e-3)


if __name__ == "__main__":
    (backend,) = sys.argv[1:]
    cases = {"triton": TRITON_CASES, "native": NATIVE_CASES}[backend]
    json.dump({case.name: errors(case, backend) for case in cases}, sys.stdout)
