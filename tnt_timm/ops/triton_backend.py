"""The triton backend: the inner transformer on CUDA in bfloat16 or float16, by the kernels of `triton_kernels`."""

from typing import Dict, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnt_timm.ops import triton_kernels, triton_launches, triton_packing
from tnt_timm.ops.layer_description import Layer, Options, Parameters

DEVICE_TYPE = "cuda"
WORDS = (1, 2, 4, 8, 16, 32, 64)
CHECK_BEFORE_USE = True
VERSION = f"Triton {triton.__version__}"  # for the message of a failed check
MAX_WIDTH = 63  # wider words would not leave registers for the weight gradients
MAX_MLP_WIDTH = 255
HEADS_SLICE = 64  # columns of heads per step; limits registers and shared memory
WARPS_AT_ONCE = 8  # per multiprocessor, which has 65,536 registers: 255 for each thread
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def unsupported(layer: Layer, device_type: str) -> Optional[str]:
    """Return what this backend does not support, or None."""
    if layer.num_words not in WORDS:
        return f"sentences of other than {', '.join(map(str, WORDS[:-1]))} or {WORDS[-1]} words"
    if device_type != ("cpu" if triton_kernels.INTERPRETED else "cuda"):
        return f"words on {device_type}"
    if layer.sentence_norm:  # packing puts the parameters of LayerNorm into the next matrix, equally for all words
        return "LayerNorm over all words of a sentence"
    if layer.words_dtype not in _DTYPES:
        return f"words of {layer.words_dtype}"
    # without tensor cores the kernels spill kilobytes per thread, and those of TNT-B do not fit into shared memory
    if layer.dtype == torch.float32 and not triton_kernels.INTERPRETED:
        return "products of float32; turn on mixed precision"
    if layer.inner_dim > MAX_WIDTH or layer.mlp_dim > MAX_MLP_WIDTH:
        return f"widths of {layer.inner_dim} and {layer.mlp_dim}, more than {MAX_WIDTH} and {MAX_MLP_WIDTH}"
    return None


def description(layer: Layer) -> str:
    """Return the name for the log."""
    return "triton"


def launch_sizes(kernel: str, capability: Optional[int], C: int, num_heads: int, M: int, F: int) -> Dict[str, int]:
    """Return the integer constants that a kernel is compiled with, and its numbers of warps and stages.

    Args:
        kernel: "forward", "mlp_backward" or "attention_backward".
        capability: the GPU's compute capability, 90 for 9.0; None without a GPU.
        C, num_heads, M, F: word width, heads, words per sentence, MLP width.
    """
    widths, group = triton_packing.widths(C, num_heads, F), max(16, M)
    chosen = triton_launches.launch(capability, kernel, widths["CP"])
    return dict(
        widths, HS=min(HEADS_SLICE, widths["HP"]), M=M, T=max(chosen.tile_words, group), S=group,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages,
    )  # fmt: skip


class _Call:
    """One call of the layer: its sizes and its packed parameters."""

    def __init__(self, words: Tensor, parameters: Parameters, options: Options):
        R, self.M, self.C = words.shape
        self.words, self.num_heads, self.F = words, options.num_heads, len(parameters[10])
        self.tokens, self.scale = R * self.M, (self.C // self.num_heads) ** -0.5
        self.widths = triton_packing.widths(self.C, self.num_heads, self.F)
        self.dtype = _DTYPES[options.dtype]
        CP = self.widths["CP"]
        self.attention_size, self.mlp_size = 4 * self.widths["HP"] * CP, 2 * self.widths["FP"] * CP
        self.weights = words.new_empty(self.attention_size + self.mlp_size, dtype=options.dtype)
        triton_packing.pack_kernel[(1,)](self.weights, self.scale, *parameters, **self.widths, num_warps=8)

    def launch(self, kernel: str) -> Dict[str, object]:
        """Return the keyword arguments of a kernel's launch."""
        capability = None  # Triton's interpreter on CPU
        if self.words.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.words.device)
            capability = 10 * major + minor
        sizes = launch_sizes(kernel, capability, self.C, self.num_heads, self.M, self.F)
        return dict(sizes, dtype=self.dtype)

    def sums(self, sizes: Dict[str, object], size: int) -> Tuple[Tensor, int]:
        """Return (a row of weight gradients for each program of a backward kernel, the number of tiles)."""
        device, tiles = self.words.device, triton.cdiv(self.tokens, sizes["T"])
        multiprocessors = 1
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        # at least two tiles per program, so that a check on few sentences also tests the sums over tiles
        programs = min(triton.cdiv(tiles, 2), max(1, WARPS_AT_ONCE // sizes["num_warps"]) * multiprocessors)
        return self.words.new_empty(programs, size, dtype=torch.float32), tiles


def forward(words: Tensor, parameters: Parameters, options: Options) -> Tensor:
    """Return the new words; all tensors are contiguous."""
    call, out = _Call(words, parameters, options), torch.empty_like(words)
    if call.tokens:
        sizes = call.launch("forward")
        triton_kernels.forward_kernel[(triton.cdiv(call.tokens, sizes["T"]),)](
            out, words, call.weights, options.attn_scale, options.mlp_scale, call.tokens, options.eps, **sizes
        )
    return out


def backward(
    grad_out: Tensor, words: Tensor, parameters: Parameters, grads: Sequence[Optional[Tensor]], options: Options
) -> Tensor:
    """Return the gradient of the words, and write those of the parameters into `grads`; all tensors are contiguous."""
    call = _Call(words, parameters, options)
    grad_mid, grad_words = torch.empty_like(words), torch.empty_like(words)
    d_weights = words.new_zeros(call.weights.numel(), dtype=torch.float32)
    if call.tokens:
        sizes = call.launch("mlp_backward")
        sums, tiles = call.sums(sizes, call.mlp_size)
        triton_kernels.mlp_backward_kernel[(len(sums),)](
            grad_out, grad_mid, sums, words, call.weights, options.attn_scale, options.mlp_scale, call.tokens, tiles,
            options.eps, **sizes,
        )  # fmt: skip
        torch.sum(sums, 0, out=d_weights[call.attention_size :])
        sizes = call.launch("attention_backward")
        sums, tiles = call.sums(sizes, call.attention_size)
        triton_kernels.attention_backward_kernel[(len(sums),)](
            grad_words,
            grad_mid,
            sums,
            words,
            call.weights,
            options.attn_scale,
            call.tokens,
            tiles,
            options.eps,
            **sizes,
        )
        torch.sum(sums, 0, out=d_weights[: call.attention_size])
    norm1, norm1_bias, qk, _, v, _, _, _, norm2, norm2_bias, fc1, *_ = parameters
    triton_packing.unpack_kernel[(1,)](
        d_weights, call.scale, norm1, norm1_bias, qk, v, norm2, norm2_bias, fc1, *grads, **call.widths, num_warps=8
    )
    return grad_words
