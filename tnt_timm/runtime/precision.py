"""Autocast, TF32, CPU threads and determinism, as the settings ask for."""

import contextlib
import functools
import os
from typing import Callable, ContextManager

import torch

from tnt_timm.settings.schema import Compute


def autocast(compute: Compute, device: torch.device) -> Callable[[], ContextManager]:
    """Makes the precision context of a forward pass."""
    if not compute.amp:
        return contextlib.nullcontext
    dtype = torch.float16 if compute.amp_dtype == "float16" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)


@functools.cache
def _default_threads() -> int:
    """PyTorch's number of CPU threads before a config set another."""
    return torch.get_num_threads()


def set_up_torch(compute: Compute, device: torch.device) -> None:
    """Set CPU threads, the precision of float32 products on CUDA, and determinism. Call it before the first computation.

    PyTorch's defaults differ between linears (exact) and convolutions (TF32).
    """
    default = _default_threads()
    torch.set_num_threads(compute.threads or default)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if compute.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = compute.tf32
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False  # which picks by the clock
    torch.backends.cudnn.deterministic = compute.deterministic
    torch.use_deterministic_algorithms(compute.deterministic)
