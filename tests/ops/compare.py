"""How far a backend of the inner transformer is from the reference in float64; run alone, Triton's under its interpreter.

TRITON_INTERPRET=1 python tests/ops/compare.py        (a line of JSON: for every case, the errors by name)
"""

import json
import sys
from typing import Dict, NamedTuple, Optional

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


def errors(case: Case, backend: str, mlp_ratio: int = 4) -> Dict[str, float]:
    """The largest difference of the output and of each gradient, as a part of the largest value."""
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

    def run(dtype: torch.dtype, call) -> Dict[str, torch.Tensor]:
        leaves = {"words": words.to(dtype).requires_grad_()}
        leaves |= {name: None if x is None else x.to(dtype).requires_grad_() for name, x in parameters.items()}
        out = call(leaves, [None if x is None else x.to(dtype) for x in scales])
        assert out.dtype == dtype
        present = {name: x for name, x in leaves.items() if x is not None}
        return {
            "out": out.detach(),
            **dict(zip(present, torch.autograd.grad(out, list(present.values()), grad.to(dtype)))),
        }

    def by_reference(leaves, scales):
        return reference.inner_transformer(
            *leaves.values(), num_heads=case.heads, attn_scale=scales[0], mlp_scale=scales[1]
        )

    def by_backend(leaves, scales):
        first, *rest = (x for x in leaves.values() if x is not None)
        return inner_transformer(first, rest, case.heads, 1e-5, *scales, getattr(torch, case.dtype), backend)

    wanted, found = run(torch.float64, by_reference), run(getattr(torch, case.words_dtype), by_backend)
    return {name: _difference(wanted[name], found[name]) for name in wanted}


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    assert wanted.shape == found.shape
    if wanted.numel() == 0:
        return 0.0
    largest: Optional[float] = wanted.abs().max().item()
    return (wanted - found).abs().max().item() / max(largest, 1e-3)


if __name__ == "__main__":
    json.dump({case.name: errors(case, "triton") for case in TRITON_CASES}, sys.stdout)
