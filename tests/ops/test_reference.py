"""The specification of the inner transformer, compared with PyTorch's own layers."""

import pytest
import torch
from torch import nn

from tnt_timm import ops
from tnt_timm.ops.self_check import Case, make_inputs


def weights(C: int, F: int, biased: bool):
    """Return the fourteen parameters in float64, in the reference's order."""
    parameters = make_inputs(Case(1, 1, C, 1, biased=biased, mlp_width=F)).parameters.values()
    return [None if x is None else x.requires_grad_() for x in parameters]


@pytest.mark.parametrize("R, M, C, H, biased", [(1, 16, 24, 4, False), (3, 4, 12, 2, True), (5, 64, 8, 1, False)])
def test_equals_pytorchs_encoder_layer(R, M, C, H, biased):
    w = weights(C, 4 * C, biased)
    qkv_bias = torch.cat([w[3], w[5]]) if biased else torch.zeros(3 * C)
    layer = nn.TransformerEncoderLayer(C, H, 4 * C, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64)
    names = "self_attn.in_proj_weight self_attn.in_proj_bias self_attn.out_proj.weight self_attn.out_proj.bias linear1.weight "
    names += "linear1.bias linear2.weight linear2.bias norm1.weight norm1.bias norm2.weight norm2.bias"
    tensors = [torch.cat([w[2], w[4]]), qkv_bias, w[6], w[7], *w[10:], *w[:2], *w[8:10]]
    layer.load_state_dict(dict(zip(names.split(), tensors, strict=True)))
    words = torch.randn(R, M, C, dtype=torch.float64)
    torch.testing.assert_close(ops.inner_transformer(words, *w, num_heads=H), layer(words))


def test_scales_act_on_each_sentences_residual():
    w = weights(12, 48, False)
    words = torch.randn(3, 16, 12, dtype=torch.float64)
    keep = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)
    out = ops.inner_transformer(words, *w, num_heads=2, attn_scale=keep, mlp_scale=keep)
    assert torch.equal(out[0], words[0])
    torch.testing.assert_close(out[1], ops.inner_transformer(words, *w, num_heads=2)[1])
    half = ops.inner_transformer(words, *w, num_heads=2, attn_scale=keep, mlp_scale=0 * keep)
    once = ops.inner_transformer(words, *w, num_heads=2, mlp_scale=0 * keep)
    torch.testing.assert_close(half[2] - words[2], 2 * (once[2] - words[2]))


def test_every_gradient_is_right():
    w = weights(4, 8, True)
    words = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64).view(2, 1, 1)

    def run(words, *w):
        return ops.inner_transformer(words, *w, num_heads=2, attn_scale=scale, mlp_scale=scale)

    assert torch.autograd.gradcheck(run, (words, *w))
