"""Linear layers: PyTorch's own, or oneDNN's on CPUs where oneDNN is faster.

PyTorch multiplies float32 matrices on CPU with MKL, which uses AVX-512 on Intel CPUs only. oneDNN ships with PyTorch too, and
uses AVX-512 on every CPU that has it. The gain depends on the CPU: one thread of one AMD EPYC reaches 250 instead of
110 GFLOPS (benchmarks/speed.md), one thread of a Zen 4 gains a tenth.
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
from tnt_timm.ops import dispatch


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """`torch.nn.functional.linear` by the faster library: (..., in), (out, in), (out,) -> (..., out)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript removes a branch of this condition alone)
        if _onednn_supports(x, weight, bias) and _onednn_is_faster():
            return onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _onednn_supports(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if dispatch.wanted == "reference" or not dispatch.operators_allowed(*tensors) or torch.is_autocast_enabled("cpu"):
        return False
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False  # PyTorch raises the error
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


@torch.compiler.assume_constant_result
def _onednn_is_faster() -> bool:
    if not (torch.backends.mkldnn.enabled and faster_here()):
        return False
    dispatch.log_once("linear layer backend: oneDNN")
    return True


@functools.cache
def faster_here() -> bool:
    """Return whether PyTorch has oneDNN, and oneDNN beats MKL on this CPU."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not (both and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    vendor = machine.cpu_info("vendor_id") or platform.processor()
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "Intel" not in vendor


@torch.library.custom_op("tnt_timm::linear", mutates_args=())
def onednn(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Compute `torch.nn.functional.linear` of float32 tensors on CPU by oneDNN. It has derivatives of any order."""
    if x.numel() == 0:  # oneDNN rejects empty tensors
        return F.linear(x, weight, bias)
    if not weight.t().is_contiguous():
        # oneDNN is a thousand times slower if there are gaps between the rows, as in a view of class tokens
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    out = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "")
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], weight.shape[0]))  # because a view forbids in-place changes


@onednn.register_fake
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
        d_x = onednn(grad, weight.t(), None)
    if ctx.needs_input_grad[1]:
        d_weight = onednn(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
    if ctx.needs_input_grad[2]:
        d_bias = rows.sum(0)
    return d_x, d_weight, d_bias


onednn.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.tnt_timm.linear)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]
