"""The cases in which backends of the inner transformer are compared with the reference. It is also a command:

TRITON_INTERPRET=1 python tests/ops/compare.py triton
TNT_MARCH=x86-64-v3 python tests/ops/compare.py native

It prints one line of JSON: for every case, the relative errors by name of the tensor.
"""

import json
import sys
from typing import Dict, Tuple

import torch

from tnt_timm.ops.self_check import Case, computed, differences, errors, expected, make_inputs

MODELS = {"tnt_ti": (12, 2), "tnt_s": (24, 4), "tnt_b": (40, 4)}  # width of words, heads
LOW = ("bfloat16", "float16")

# under the interpreter, which is slow
FLOAT32_SIZES = (3, 16, 24, 4), (1, 16, 12, 2), (5, 16, 40, 4), (19, 16, 24, 3)
TRITON_CASES = [
    *(Case(*sizes, "float32", True, True) for sizes in FLOAT32_SIZES),
    *(Case(*sizes) for sizes in ((3, 4, 24, 1), (1, 64, 24, 8), (3, 4, 12, 6), (2, 64, 40, 5), (5, 16, 24, 8))),
    *(Case(3, 16, width, 2, dtype, False, True) for width in (12, 24, 40) for dtype in LOW),
    Case(3, 16, 24, 4, "bfloat16", True, True, "bfloat16"),
    Case(0, 16, 24, 4),
]

# on a GPU. The last tile is never full, and programs of the backward kernels take several tiles each
CUDA_CASES = [
    *(Case(1000, 16, *sizes, dtype, False, True) for sizes in MODELS.values() for dtype in LOW),
    *(Case(37, 16, *sizes, "bfloat16", True, False) for sizes in MODELS.values()),
    *(Case(1, 16, *sizes, "float16", False, False) for sizes in MODELS.values()),
    *(Case(77, words, 24, 4, "bfloat16", False, True) for words in (1, 2, 4, 8, 32, 64)),
    *(Case(33, words, 40, 4, "float16", True, True) for words in (1, 64)),
    *(Case(50, 16, 24, 4, dtype, True, True, dtype) for dtype in LOW),
    *(Case(50, 16, width, heads, "bfloat16") for width, heads in ((18, 3), (24, 1), (24, 8), (63, 7), (5, 5))),
    Case(50, 16, 20, 2, "bfloat16", True, True, mlp_width=255),
    Case(50, 16, 20, 2, "bfloat16", True, True, mlp_width=7),
    Case(0, 16, 24, 4, "bfloat16"),
]

NATIVE_SIZES = (1, 16, 12, 2), (7, 16, 24, 4), (40, 16, 40, 4)
PYRAMID_SIZES = (7, 16, 5, 1), (40, 16, 8, 2), (3, 16, 20, 4), (3, 16, 48, 8), (2, 16, 64, 8)
NATIVE_CASES = [
    *(Case(*sizes, "float32", biased, True) for sizes in NATIVE_SIZES for biased in (False, True)),
    *(Case(3, 16, C, H) for C, H in ((24, 1), (24, 8), (16, 4), (32, 2), (4, 2), (28, 4), (7, 7), (9, 3))),
    Case(3, 16, 10, 2, mlp_width=13),
    *(Case(*sizes, "float32", drop_path=True, sentence_norm=True) for sizes in PYRAMID_SIZES),
    Case(40, 16, 10, 2, "float32", biased=True, sentence_norm=True),
    Case(0, 16, 24, 4),
]


def errors_twice(case: Case, backend: str, device: str) -> Tuple[Dict[str, float], bool]:
    """Return a backend's errors, and whether a second call gives the same bits."""
    inputs = make_inputs(case)
    one, two = (computed(case, inputs, backend, device) for _ in range(2))
    return differences(expected(case, inputs), one), all(torch.equal(one[name], two[name]) for name in one)


if __name__ == "__main__":
    (backend,) = sys.argv[1:]
    cases = {"triton": TRITON_CASES, "native": NATIVE_CASES}[backend]
    json.dump({case.name: errors(case, backend) for case in cases}, sys.stdout)
