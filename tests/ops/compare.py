"""The cases in which backends of the inner transformer are compared with the reference. Also a command, for other environments:

TRITON_INTERPRET=1 python tests/ops/compare.py triton
TNT_MARCH=x86-64-v3 python tests/ops/compare.py native

It prints one line of JSON: for every case, the errors by name.
"""

import json
import sys

from tnt_timm.ops.self_check import Case, errors

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


if __name__ == "__main__":
    (backend,) = sys.argv[1:]
    cases = {"triton": TRITON_CASES, "native": NATIVE_CASES}[backend]
    json.dump({case.name: errors(case, backend) for case in cases}, sys.stdout)
