"""The inner transformer on CPU, in C++: `inner_transformer.cpp`, compiled at its first use for the sizes at hand.

This takes a compiler (as torch.compile does on CPU) and some seconds; the result is kept in the user's cache folder, by
the content of the source and the kind of processor. Where there is no compiler, the reference computes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional, Sequence

import torch
from torch import Tensor

from tnt_timm import machine

SOURCE = Path(__file__).with_name("inner_transformer.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC"]
MAX_WIDTH = 128
WORDS = (16,)  # per sentence
PARTS = 32  # shares of the sentences in backward, whose sums are added in one order for any number of threads


def why_not(
    device: str, words_dtype: torch.dtype, dtype: torch.dtype, C: int, num_heads: int, mlp_dim: int
) -> Optional[str]:
    """What keeps this from a case; None when it can take it."""
    if device != "cpu":
        return f"words on {device}"
    if (words_dtype, dtype) != (torch.float32, torch.float32):
        return f"words of {words_dtype} with products of {dtype}"
    if C % 4 or mlp_dim % 4 or C > MAX_WIDTH or mlp_dim > 4 * MAX_WIDTH:
        return f"widths of {C} and {mlp_dim}, which are not multiples of 4 up to {MAX_WIDTH} and {4 * MAX_WIDTH}"
    return library(C, num_heads, mlp_dim).why_not


class Library:
    """The compiled functions, or why there are none."""

    def __init__(self, C: int, num_heads: int, mlp_dim: int):
        self.why_not: Optional[str] = None
        try:
            self.functions = ctypes.CDLL(str(_built(C, num_heads, mlp_dim)))
        except (OSError, subprocess.SubprocessError) as trouble:
            said = getattr(trouble, "stderr", None) or str(trouble)
            self.why_not = (
                f"anything: its compiler failed ({said.strip().splitlines()[-1] if said.strip() else trouble})"
            )
            return
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.functions.inner_forward.argtypes = [pointer] * 5 + [number, ctypes.c_float, ctypes.c_int]
        self.functions.inner_backward.argtypes = [pointer] * 7 + [number, number, ctypes.c_float, ctypes.c_int]
        self.functions.gradients_size.restype = number


@functools.cache
def library(C: int, num_heads: int, mlp_dim: int) -> Library:
    return Library(C, num_heads, mlp_dim)


def _built(C: int, num_heads: int, mlp_dim: int) -> Path:
    """The compiled file, made where it is missing.

    Raises:
        OSError: no compiler, or no place to write to.
        subprocess.SubprocessError: the compiler failed.
    """
    defines = [f"-DC={C}", f"-DH={num_heads}", f"-DF={mlp_dim}"]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no g++ or clang++ here; install one, or name one in CXX")
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *defines, *FLAGS, compiler, _processor()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tnt_timm"
    path = folder / f"inner_{C}_{num_heads}_{mlp_dim}_{key[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # several processes may build at once; the last one wins
            new = Path(work) / path.name
            subprocess.run(
                [compiler, *FLAGS, *defines, str(SOURCE), "-o", str(new)], check=True, capture_output=True, text=True
            )
            os.replace(new, path)
    return path


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by machines."""
    return machine.cpu_info("flags") or machine.cpu_info("Features") or platform.processor()


def _pointers(parameters: Sequence[Optional[Tensor]]):
    return (ctypes.c_void_p * len(parameters))(*(None if x is None else x.data_ptr() for x in parameters))


def _pointer(x: Optional[Tensor]) -> Optional[int]:
    return None if x is None else x.data_ptr()


def forward(
    words: Tensor,
    parameters: Sequence[Optional[Tensor]],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The inner transformer; arguments as in `ops.custom_op`."""
    R, _, C = words.shape
    out = torch.empty_like(words)
    library(C, num_heads, len(parameters[10])).functions.inner_forward(
        words.data_ptr(), out.data_ptr(), _pointers(parameters), _pointer(attn_scale), _pointer(mlp_scale),
        R, eps, torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward(
    grad_out: Tensor,
    words: Tensor,
    parameters: Sequence[Optional[Tensor]],
    grads: Sequence[Optional[Tensor]],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The words' gradient, while those of the parameters go into `grads`; arguments as in `ops.custom_op`."""
    R, _, C = words.shape
    F = len(parameters[10])
    functions = library(C, num_heads, F).functions
    grad_words = torch.empty_like(words)
    sums = words.new_zeros(PARTS, functions.gradients_size())
    functions.inner_backward(
        grad_out.data_ptr(), words.data_ptr(), grad_words.data_ptr(), sums.data_ptr(), _pointers(parameters),
        _pointer(attn_scale), _pointer(mlp_scale), R, PARTS, eps, torch.get_num_threads(),
    )  # fmt: skip
    # the layout of `Gradients` in the source
    columns = (C + 16) // 16 * 16
    vectors, matrices = sums.sum(0).split([5 * C * 16, (4 * C + 2 * F) * columns])
    norm1, norm1_bias, norm2, norm2_bias, fc2_bias = vectors.view(5, C, 16).sum(-1)
    q, k, v, proj, fc1, fc2 = matrices.view(-1, columns).split([C, C, C, C, F, F])
    qk = torch.cat([q, k])
    found = [
        norm1, norm1_bias, qk[:, :C], qk[:, C], v[:, :C], v[:, C], proj[:, :C], proj[:, C],
        norm2, norm2_bias, fc1[:, :C], fc1[:, C], fc2[:, :C].t(), fc2_bias,
    ]  # fmt: skip
    for grad, x in zip(grads, found):
        if grad is not None:
            grad.copy_(x)
    return grad_words
