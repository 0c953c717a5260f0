"""The inner transformer on CPU, in C++: `inner_transformer.cpp`, compiled at first use for the sizes at hand.

The vector width is that of the processor's instruction set: AVX-512, AVX2 with FMA, or NEON. TNT_MARCH sets the compiler's
-march instead (such as x86-64-v3, which is AVX2). On other processors, or without a compiler, the reference computes.
Compiling takes some seconds; the result is cached by source, flags and processor.
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
from typing import List, Optional, Sequence

import torch
from torch import Tensor

from tnt_timm import machine

SOURCE = Path(__file__).with_name("inner_transformer.cpp")
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC"]
INSTRUCTION_SETS = {16: "AVX-512", 8: "AVX2", 4: "NEON"}  # by floats per vector
X86_FLAGS = {"AVX-512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "AVX2": {"avx2", "fma"}}
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
    """The compiled functions and their instruction set, or why there are none."""

    def __init__(self, C: int, num_heads: int, mlp_dim: int):
        self.why_not: Optional[str] = None
        self.instruction_set: Optional[str] = None
        try:
            self.functions = ctypes.CDLL(str(_built(C, num_heads, mlp_dim)))
        except (OSError, subprocess.SubprocessError) as error:
            self.why_not = f"this machine: its compiler failed ({_first_error(error)})"
            return
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.functions.inner_forward.argtypes = [pointer] * 5 + [number, ctypes.c_float, ctypes.c_int]
        self.functions.inner_backward.argtypes = [pointer] * 7 + [number, number, ctypes.c_float, ctypes.c_int]
        for name in ("gradients_size", "padded_width", "lanes"):
            getattr(self.functions, name).restype = number
        instruction_set = INSTRUCTION_SETS[self.functions.lanes()]
        flags = (machine.cpu_info("flags") or "").split()
        if flags and not X86_FLAGS.get(instruction_set, set()) <= set(flags):  # its first call would kill the process
            self.why_not = f"this machine: TNT_MARCH asks for {instruction_set}, which the processor does not have"
            return
        self.instruction_set = instruction_set


def _first_error(error: Exception) -> str:
    """The line that says why: a compiler's first error, or the last line of anything else."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
    return next((line.strip() for line in lines if "error" in line), lines[-1])


@functools.cache
def library(C: int, num_heads: int, mlp_dim: int) -> Library:
    return Library(C, num_heads, mlp_dim)


def _built(C: int, num_heads: int, mlp_dim: int) -> Path:
    """The compiled file, made where it is missing.

    Raises:
        OSError: no compiler, or no place to write to.
        subprocess.SubprocessError: the compiler failed.
    """
    march = os.environ.get("TNT_MARCH") or "native"
    flags = [*FLAGS, f"-march={march}", f"-DC={C}", f"-DH={num_heads}", f"-DF={mlp_dim}"]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no g++ or clang++ here; install one, or name one in CXX")
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *flags, compiler, _processor()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tnt_timm"
    path = folder / f"inner_{C}_{num_heads}_{mlp_dim}_{key[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # several processes may build at once; the last one wins
            new = Path(work) / path.name
            command = [compiler, *flags, str(SOURCE), "-o", str(new)]
            subprocess.run(command, check=True, capture_output=True, text=True)
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
    found = gradients(sums.sum(0), C, F, functions.padded_width())
    for grad, x in zip(grads, found):
        if grad is not None:
            grad.copy_(x)
    return grad_words


def gradients(sums: Tensor, C: int, F: int, width: int) -> List[Tensor]:
    """The gradients of the fourteen parameters, out of the source's `Gradients`.

    Args:
        sums: (gradients_size,), added up over the shares of the sentences.
        C, F: word width and MLP width.
        width: of a padded row, in floats.
    """
    vectors, matrices = sums.split([(9 * C + F) * 16, (4 * C + 2 * F) * width])
    norm1, norm1_bias, norm2, norm2_bias, *biases = vectors.view(-1, 16).sum(-1).split([C] * 8 + [F, C])
    q_bias, k_bias, v_bias, proj_bias, fc1_bias, fc2_bias = biases
    q, k, v, proj, fc1, fc2 = matrices.view(-1, width)[:, :C].split([C, C, C, C, F, F])
    return [
        norm1, norm1_bias, torch.cat([q, k]), torch.cat([q_bias, k_bias]), v, v_bias, proj, proj_bias,
        norm2, norm2_bias, fc1, fc1_bias, fc2.t(), fc2_bias,
    ]  # fmt: skip
