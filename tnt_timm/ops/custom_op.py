"""The inner transformer as a custom operator of PyTorch: autograd, torch.compile, DDP and FLOP counters see a single step."""

from typing import List, Optional, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tnt_timm.ops.backend_table import BACKENDS
from tnt_timm.ops.layer_description import Layer, Options

_REST = "int num_heads, float eps, Tensor? attn_scale, Tensor? mlp_scale, ScalarType dtype, str backend"
_FORWARD = f"(Tensor words, Tensor[] parameters, {_REST}) -> Tensor"
_BACKWARD = f"(Tensor grad, Tensor words, Tensor[] parameters, {_REST}) -> Tensor[]"


@torch.library.custom_op("tnt_timm::inner_transformer", mutates_args=(), schema=_FORWARD)
def inner_transformer(words, parameters, *rest):
    """Compute the layer of `ops.reference.inner_transformer` by one backend. It has a first derivative, but no second one.

    Args:
        words: (R, M, C).
        parameters: the reference's fourteen in its order, or twelve without the biases of qk and v.
        num_heads, eps, attn_scale, mlp_scale: the reference's.
        dtype: of the operands of matrix products; everything else is computed in float32.
        backend: a key of `BACKENDS`.

    Returns:
        (R, M, C), in the dtype of the words.

    Raises:
        ValueError: the backend does not support the layer.
    """
    parameters, options, backend = _with_missing_biases(parameters), Options(*rest[:-1]), rest[-1]
    sizes = (*words.shape[1:], options.num_heads, len(parameters[10]))
    switches = (parameters[3] is not None, parameters[5] is not None, len(parameters[0]) != words.shape[2])
    layer = Layer(backend, words.dtype, options.dtype, *sizes, *switches)
    unsupported = BACKENDS[backend].unsupported(layer, words.device.type)
    if unsupported is not None:
        raise ValueError(f"{backend} does not support {unsupported}")
    with torch.cuda.device_of(words):  # because Triton launches on the current GPU
        return BACKENDS[backend].forward(words.contiguous(), parameters, options)


@inner_transformer.register_fake
def _(words, *rest):
    return torch.empty_like(words, memory_format=torch.contiguous_format)


@torch.library.custom_op("tnt_timm::inner_transformer_backward", mutates_args=(), schema=_BACKWARD)
def inner_transformer_backward(grad, words, parameters, *rest):
    """Return the gradients of the words and of all `parameters`."""
    parameters, options, backend = _with_missing_biases(parameters), Options(*rest[:-1]), rest[-1]
    grads = [None if x is None else torch.empty_like(x) for x in parameters]
    with torch.cuda.device_of(words):
        d_words = BACKENDS[backend].backward(grad.contiguous(), words.contiguous(), parameters, grads, options)
    return [d_words, *(x for x in grads if x is not None)]


@inner_transformer_backward.register_fake
def _(grad, words, parameters, *rest):
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


inner_transformer.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.tnt_timm.inner_transformer)
def _flops(words_shape, parameter_shapes, *args, out_shape=None, **kwargs) -> int:
    """Count linear layers, attention scores and attended words: two FLOPs per multiply-add, as PyTorch does."""
    R, M, C = words_shape
    linears = sum(shape[0] * shape[1] for shape in parameter_shapes if len(shape) == 2)
    return 2 * R * M * (linears + 2 * M * C)


@register_flop_formula(torch.ops.tnt_timm.inner_transformer_backward)
def _backward_flops(grad_shape, words_shape, parameter_shapes, *args, out_shape=None, **kwargs) -> int:
    """Count the recomputed layer, and two products for each of its products."""
    return 3 * _flops(words_shape, parameter_shapes)


def _with_missing_biases(parameters: Sequence[Tensor]) -> List[Optional[Tensor]]:
    """Return the reference's fourteen parameters, contiguous, with None for the biases of qk and v if they do not exist."""
    found: List[Optional[Tensor]] = [x.contiguous() for x in parameters]
    return found if len(found) == 14 else [*found[:3], None, found[3], None, *found[4:]]
