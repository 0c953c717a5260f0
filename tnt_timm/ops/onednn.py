"""Linear layers on CPU by oneDNN, where it is faster than PyTorch's default.

PyTorch multiplies float32 matrices on CPU with MKL, which uses AVX-512 on Intel's processors only. oneDNN comes with PyTorch
as well and uses AVX-512 on every processor that has it. How much that gains depends on the processor: one thread
of one AMD EPYC reaches 250 instead of 110 GFLOPS (benchmarks/speed.md), one of a Zen 4 gains a tenth.
"""

import functools
import math
import platform
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tnt_timm import machine


@functools.cache
def faster_here() -> bool:
    """Return whether PyTorch has oneDNN, and oneDNN beats MKL on this processor."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not (both and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    vendor = machine.cpu_info("vendor_id") or platform.processor()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" not in vendor


@torch.library.custom_op("tnt_timm::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """`torch.nn.functional.linear` of float32 tensors on CPU.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        (..., out). Differentiable any number of times.
    """
    if x.numel() == 0:  # which oneDNN does not take
        return F.linear(x, weight, bias)
    if not weight.t().is_contiguous():
        # with gaps between its rows, as in a view of class tokens, oneDNN takes a thousand times as long
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()  # whose stride it does not look at
    out = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))  # a view could not be changed in place


@linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, _ = inputs
    needed = ctx.needs_input_grad
    ctx.save_for_backward(x if needed[1] else None, weight if needed[0] else None)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    d_x = d_weight = d_bias = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        d_x = linear(grad, weight.t(), None)
    if ctx.needs_input_grad[1]:
        d_weight = linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
    if ctx.needs_input_grad[2]:
        d_bias = rows.sum(0)
    return d_x, d_weight, d_bias


linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.tnt_timm.linear)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]
