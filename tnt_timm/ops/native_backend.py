"""The native backend: the inner transformer on CPU in C++, compiled at first use for the sizes of the layer.

The vector width is that of the CPU's instruction set: AVX-512, AVX2 with FMA, or NEON. The environment variable TNT_MARCH
overrides the compiler's -march, for example with x86-64-v3 for AVX2. The compiled file is cached by sources, flags, compiler
and CPU. It is built without torch.utils.cpp_extension, which takes a minute and needs ninja and Python's headers.
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
from typing import List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from tnt_timm import cpu_info
from tnt_timm.ops.layer_description import Layer, Options, Parameters

DEVICE_TYPE = "cpu"
WORDS = (16,)
CHECK_BEFORE_USE = False
MAX_WIDTH = 128
PARTS = 32  # of the sentences in backward, added up in a fixed order: the bits do not depend on the number of threads
SOURCE = Path(__file__).with_name("inner_transformer.cpp")
HEADER = Path(__file__).with_name("columns.h")
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC"]
INSTRUCTION_SETS = {16: "AVX-512", 8: "AVX2", 4: "NEON"}  # by floats per vector
X86_FLAGS = {"AVX-512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}, "AVX2": {"avx2", "fma"}}


def unsupported(layer: Layer, device_type: str) -> Optional[str]:
    """Return what this backend does not support, or None."""
    C, F = layer.inner_dim, layer.mlp_dim
    if layer.num_words not in WORDS:
        return f"sentences of other than {WORDS[0]} words"
    if device_type != "cpu":
        return f"words on {device_type}"
    if (layer.words_dtype, layer.dtype) != (torch.float32, torch.float32):
        return f"words of {layer.words_dtype} with products of {layer.dtype}"
    if C > MAX_WIDTH or F > 4 * MAX_WIDTH:
        return f"widths of {C} and {F}, more than {MAX_WIDTH} and {4 * MAX_WIDTH}"
    return library(C, layer.num_heads, F, layer.sentence_norm).unsupported


def description(layer: Layer) -> str:
    """Return the name for the log, with the instruction set."""
    return f"native ({library(layer.inner_dim, layer.num_heads, layer.mlp_dim, layer.sentence_norm).instruction_set})"


class Library(NamedTuple):
    """The compiled functions and their instruction set, or what is not supported."""

    functions: Optional[ctypes.CDLL] = None
    instruction_set: Optional[str] = None
    unsupported: Optional[str] = None


@functools.cache
def library(C: int, num_heads: int, mlp_dim: int, sentence_norm: bool = False) -> Library:
    """Compile and load the functions for these sizes."""
    try:
        functions = ctypes.CDLL(str(_compiled(C, num_heads, mlp_dim, sentence_norm)))
    except (OSError, subprocess.SubprocessError) as error:
        return Library(unsupported=f"this machine: its compiler failed ({_first_error(error)})")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    functions.inner_forward.argtypes = [pointer] * 5 + [number, ctypes.c_float, ctypes.c_int]
    functions.inner_backward.argtypes = [pointer] * 7 + [number, number, ctypes.c_float, ctypes.c_int]
    instruction_set = INSTRUCTION_SETS[functions.lanes()]
    flags = (cpu_info.cpu_info("flags") or "").split()
    if flags and not X86_FLAGS.get(instruction_set, set()) <= set(flags):  # the first call would kill the process
        return Library(unsupported=f"this machine: TNT_MARCH asks for {instruction_set}, which the CPU does not have")
    return Library(functions, instruction_set)


def _first_error(error: Exception) -> str:
    """Return the compiler's first error, or the last line of any other message."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
    return next((line.strip() for line in lines if "error" in line), lines[-1])


def _compiled(C: int, num_heads: int, mlp_dim: int, sentence_norm: bool) -> Path:
    """Return the compiled file. Compile it if it is not in the cache.

    Raises:
        OSError: there is no compiler, or the cache folder is not writable.
        subprocess.SubprocessError: the compiler failed.
    """
    march = os.environ.get("TNT_MARCH") or "native"
    flags = [*FLAGS, f"-march={march}", f"-DC={C}", f"-DH={num_heads}", f"-DF={mlp_dim}"]
    flags += ["-DSENTENCE_NORM"] * sentence_norm
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no g++ or clang++ found; install one, or set CXX")
    # what -march=native depends on, because machines may share a cache folder
    cpu = cpu_info.cpu_info("flags") or cpu_info.cpu_info("Features") or platform.processor()
    key = "\n".join([SOURCE.read_text(), HEADER.read_text(), *flags, compiler, cpu])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tnt_timm"
    path = folder / f"inner_{C}_{num_heads}_{mlp_dim}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # several processes may build at once; the last one wins
            new = Path(work) / path.name
            command = [compiler, *flags, str(SOURCE), "-o", str(new)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(new, path)
    return path


def _pointer(x: Optional[Tensor]) -> Optional[int]:
    return None if x is None else x.data_ptr()


def _pointers(parameters: Parameters) -> ctypes.Array:
    return (ctypes.c_void_p * len(parameters))(*map(_pointer, parameters))


def forward(words: Tensor, parameters: Parameters, options: Options) -> Tensor:
    """Return the new words; all tensors are contiguous."""
    out, R = torch.empty_like(words), len(words)
    _functions(words, parameters, options).inner_forward(
        words.data_ptr(), out.data_ptr(), _pointers(parameters), _pointer(options.attn_scale), _pointer(options.mlp_scale),
        R, options.eps, torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward(
    grad_out: Tensor, words: Tensor, parameters: Parameters, grads: Sequence[Optional[Tensor]], options: Options
) -> Tensor:
    """Return the gradient of the words, and write those of the parameters into `grads`; all tensors are contiguous."""
    R, _, C = words.shape
    functions = _functions(words, parameters, options)
    grad_words = torch.empty_like(words)
    sums = words.new_zeros(PARTS, functions.gradients_size())
    functions.inner_backward(
        grad_out.data_ptr(), words.data_ptr(), grad_words.data_ptr(), sums.data_ptr(), _pointers(parameters),
        _pointer(options.attn_scale), _pointer(options.mlp_scale), R, PARTS, options.eps, torch.get_num_threads(),
    )  # fmt: skip
    for grad, x in zip(grads, gradients(sums.sum(0), C, len(parameters[10]), len(parameters[0]) != C)):
        if grad is not None:
            grad.copy_(x)
    return grad_words


def _functions(words: Tensor, parameters: Parameters, options: Options) -> ctypes.CDLL:
    C = words.shape[2]
    return library(C, options.num_heads, len(parameters[10]), len(parameters[0]) != C).functions


def gradients(sums: Tensor, C: int, F: int, sentence_norm: bool) -> List[Tensor]:
    """Return the gradients of the fourteen parameters from `struct Gradients` of the source, flattened: (gradients_size,)."""
    norms, biases, matrices = sums.tensor_split([4 * C * 16, (9 * C + F) * 16])
    norms = norms.view(4, C, 16)
    norm1, norm1_bias, norm2, norm2_bias = norms.mT.flatten(1) if sentence_norm else norms.sum(-1)
    q_bias, k_bias, v_bias, proj_bias, fc1_bias, fc2_bias = biases.view(-1, 16).sum(-1).split([C] * 4 + [F, C])
    q, k, v, proj, fc1, fc2 = matrices.view(4 * C + 2 * F, -1)[:, :C].split([C, C, C, C, F, F])
    return [
        norm1, norm1_bias, torch.cat([q, k]), torch.cat([q_bias, k_bias]), v, v_bias, proj, proj_bias,
        norm2, norm2_bias, fc1, fc1_bias, fc2.t(), fc2_bias,
    ]  # fmt: skip
