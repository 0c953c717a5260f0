"""The inner transformer as one operator of torch, so that autograd, torch.compile, DDP and the rest see a single step.

A backend is a module with `forward` and `backward`, which take the words, the layer's fourteen parameters (None for a bias
that is not there) and the rest as below; `backward` writes the parameters' gradients into tensors that it is given.
"""

from typing import List, Optional, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tnt_timm.ops import native

try:  # only where torch brings it
    from tnt_timm.ops import triton_inner
except ImportError:
    triton_inner = None

BACKENDS = {"native": native} | ({"triton": triton_inner} if triton_inner else {})


@torch.library.custom_op("tnt_timm::inner_transformer", mutates_args=())
def inner_transformer(
    words: Tensor,
    parameters: Sequence[Tensor],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The layer of `ops.reference.inner_transformer`, its products with operands of `dtype`.

    Args:
        words: (R, M, C).
        parameters: the reference's fourteen in its order, or the twelve that are left without the biases of qk and v.
        num_heads, eps, attn_scale, mlp_scale: the reference's.
        dtype: of the operands of matrix products; their sums, and all else, are float32.
        backend: a name in `BACKENDS`.

    Returns:
        (R, M, C), of the words' dtype. It has a first derivative, not a second one.

    Raises:
        ValueError: a case that the backend cannot do.
    """
    layer, module = _layer(parameters), BACKENDS[backend]
    M, C = words.shape[1:]
    why = f"{M} words per sentence" if M not in module.WORDS else None
    why = why or module.why_not(words.device.type, words.dtype, dtype, C, num_heads, len(layer[10]))
    if why is not None:
        raise ValueError(f"{backend} does not support {why}")
    with torch.cuda.device_of(words):  # Triton launches on the current GPU, so make that of the tensors current
        return module.forward(words.contiguous(), layer, num_heads, eps, attn_scale, mlp_scale, dtype)


@inner_transformer.register_fake
def _(words, parameters, num_heads, eps, attn_scale, mlp_scale, dtype, backend):
    return torch.empty_like(words, memory_format=torch.contiguous_format)


@torch.library.custom_op("tnt_timm::inner_transformer_backward", mutates_args=())
def inner_transformer_backward(
    grad: Tensor,
    words: Tensor,
    parameters: Sequence[Tensor],
    num_heads: int,
    eps: float,
    attn_scale: Optional[Tensor],
    mlp_scale: Optional[Tensor],
    dtype: torch.dtype,
    backend: str,
) -> List[Tensor]:
    """The gradients of the words and of the parameters there are."""
    layer = _layer(parameters)
    grads = [None if x is None else torch.empty_like(x) for x in layer]
    with torch.cuda.device_of(words):
        d_words = BACKENDS[backend].backward(
            grad.contiguous(), words.contiguous(), layer, grads, num_heads, eps, attn_scale, mlp_scale, dtype
        )
    return [d_words, *(x for x in grads if x is not None)]


@inner_transformer_backward.register_fake
def _(grad, words, parameters, num_heads, eps, attn_scale, mlp_scale, dtype, backend):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in [words, *parameters]]


def _setup_context(ctx, inputs, output):
    words, parameters, ctx.num_heads, ctx.eps, attn_scale, mlp_scale, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(words, attn_scale, mlp_scale, *parameters)


def _backward(ctx, grad):
    words, attn_scale, mlp_scale, *parameters = ctx.saved_tensors
    d_words, *d_parameters = inner_transformer_backward(
        grad, words, parameters, ctx.num_heads, ctx.eps, attn_scale, mlp_scale, ctx.dtype, ctx.backend
    )
    return d_words, d_parameters, None, None, None, None, None, None


@register_flop_formula(torch.ops.tnt_timm.inner_transformer)
def _flops(words_shape, parameter_shapes, *args, out_shape=None, **kwargs) -> int:
    """Linears, and scores and attended words; two for every multiply-add, as torch's counter has it."""
    R, M, C = words_shape
    linears = sum(shape[0] * shape[1] for shape in parameter_shapes if len(shape) == 2)
    return 2 * R * M * (linears + 2 * M * C)


@register_flop_formula(torch.ops.tnt_timm.inner_transformer_backward)
def _backward_flops(grad_shape, words_shape, parameter_shapes, *args, out_shape=None, **kwargs) -> int:
    """The layer again, and two products for each of its own."""
    return 3 * _flops(words_shape, parameter_shapes)


inner_transformer.register_autograd(_backward, setup_context=_setup_context)


def _layer(parameters: Sequence[Tensor]) -> List[Optional[Tensor]]:
    """The reference's fourteen parameters, contiguous, with None for a bias that is not there."""
    found: List[Optional[Tensor]] = [x.contiguous() for x in parameters]
    return found if len(found) == 14 else [*found[:3], None, found[3], None, *found[4:]]
