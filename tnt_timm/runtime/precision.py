"""Set up autocast, TF32, CPU threads and determinism from the settings."""

import contextlib
import functools
import os
from typing import Callable, ContextManager

import torch

from tnt_timm.settings.schema import Compute

_default_threads = functools.cache(torch.get_num_threads)  # PyTorch's default, before a config changes it


def autocast(compute: Compute, device: torch.device) -> Callable[[], ContextManager]:
    """Return a function that makes the precision context of a forward pass."""
    if not compute.amp:
        return contextlib.nullcontext
    dtype = torch.float16 if compute.amp_dtype == "float16" else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)


def set_up_torch(compute: Compute, device: torch.device) -> None:
    """Set CPU threads, the precision of float32 products on CUDA, and determinism. Call this before any computation."""
    default = _default_threads()
    torch.set_num_threads(compute.threads or default)
    if device.type == "cuda":  # PyTorch's defaults differ: exact in linear layers, TF32 in convolutions
        torch.set_float32_matmul_precision("high" if compute.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = compute.tf32
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False  # it picks algorithms by measured time
    torch.backends.cudnn.deterministic = compute.deterministic
    torch.use_deterministic_algorithms(compute.deterministic)
