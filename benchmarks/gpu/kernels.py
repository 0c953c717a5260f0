"""Stage 2: compare the kernels with the reference in float64.

Several processes share the cases, because compilation takes longer than computation.
"""

import os
import subprocess
import sys
import time
from typing import Any, Dict

import torch
from compare import CUDA_CASES, MODELS, TRITON_CASES, errors_twice
from stage import Stage
from twenty_steps import STEPS, error, losses

from tnt_timm.ops import self_check
from tnt_timm.ops.self_check import Case, tolerance

PROCESSES = 10


def main() -> None:
    stage = Stage("kernels", lambda parser: parser.add_argument("--part", type=int))
    count = 1 if stage.dry else min(PROCESSES, os.cpu_count() or 1)
    if stage.options.part is None:
        parts = [subprocess.Popen([*sys.orig_argv, "--part", str(part)]) for part in range(count)]
        for number, part in enumerate(parts):
            if part.wait() != 0:  # the rest of its cases are missing
                stage.record(f"part {number}", ok=False, detail=f"exit status {part.returncode}; see log.txt")
        return
    cases = [TRITON_CASES[3], TRITON_CASES[-2]] if stage.dry else CUDA_CASES
    if stage.options.part == 0:  # one at a time, because they are timed
        for model in ["tnt_ti"] if stage.dry else MODELS:
            stage.attempt(f"self-check of {model}", lambda model=model: check_itself(model, stage.device))
        dtypes = ["bfloat16"] if stage.dry else ["bfloat16", "float16"]
        for dtype in dtypes:
            stage.attempt(f"training steps, {dtype}", lambda dtype=dtype: training_steps(dtype, stage.device))
    for number, case in enumerate(cases):
        if number % count == stage.options.part:
            stage.attempt(case.name, lambda case=case: compare(case, stage.device))
            if not usable(stage.device):
                stage.record(f"part {stage.options.part}", ok=False, detail=f"{case.name} left the GPU unusable")
                return


def compare(case: Case, device: str) -> Dict[str, Any]:
    found, same_bits = errors_twice(case, "triton", device)
    worst = max(found, key=lambda name: (found[name] != found[name], found[name]))  # NaN is the worst
    allowed = tolerance(case, device)
    figures = {"case": case.name, "dtype": case.dtype, "worst": worst, "error": found[worst], "allowed": allowed}
    detail = ""
    if not found[worst] <= allowed:
        detail = f"{worst} has a relative error of {found[worst]:.2g}"
    elif not same_bits:
        detail = "not deterministic: the second run gave different bits"
    return {"ok": not detail, "detail": detail, "same_bits": same_bits, **figures}


def training_steps(dtype: str, device: str) -> Dict[str, Any]:
    """Check that the losses differ from the recorded float64 losses at most twice as much as those of the reference."""
    steps = 2 if device == "cpu" else STEPS
    ours, reference = (
        error(losses(name, getattr(torch, dtype), device=device, steps=steps)) for name in ("triton", "reference")
    )
    detail = "" if ours < max(2 * reference, 1e-3) else f"error {ours:.2g}, the reference's is {reference:.2g}"
    return {"ok": not detail, "detail": detail, "error": ours, "reference_error": reference}


def check_itself(model: str, device: str) -> Dict[str, Any]:
    """Time the check before the first use, without compilation."""
    case = Case(self_check.SENTENCES[device], 16, *MODELS[model], "bfloat16")
    self_check.check("triton", torch.device(device), case)  # compiles
    begun = time.monotonic()
    reason = self_check.check("triton", torch.device(device), case)
    return {"ok": reason is None, "detail": reason or "", "check_s": time.monotonic() - begun}


def usable(device: str) -> bool:
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
