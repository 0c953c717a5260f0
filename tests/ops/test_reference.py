"""The specification of the inner transformer, against PyTorch's own layers."""

import pytest
import torch
from torch import nn

from tnt_timm import ops


def weights(C: int, F: int, qkv_bias: bool, dtype=torch.float64):
    shapes = [(C,), (C,), (2 * C, C), (2 * C,), (C, C), (C,), (C, C), (C,), (C,), (C,), (F, C), (F,), (C, F), (C,)]
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    if not qkv_bias:
        tensors[3] = tensors[5] = None
    return tensors


@pytest.mark.parametrize("R, M, C, H, qkv_bias", [(1, 16, 24, 4, False), (3, 4, 12, 2, True), (5, 64, 8, 1, False)])
def test_equals_torchs_encoder_layer(R, M, C, H, qkv_bias):
    torch.manual_seed(0)
    w = weights(C, 4 * C, qkv_bias)
    layer = nn.TransformerEncoderLayer(C, H, 4 * C, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64)
    zeros = torch.zeros(3 * C, dtype=torch.float64)
    layer.load_state_dict(
        {
            "norm1.weight": w[0],
            "norm1.bias": w[1],
            "self_attn.in_proj_weight": torch.cat([w[2], w[4]]),
            "self_attn.in_proj_bias": torch.cat([w[3], w[5]]) if qkv_bias else zeros,
            "self_attn.out_proj.weight": w[6],
            "self_attn.out_proj.bias": w[7],
            "norm2.weight": w[8],
            "norm2.bias": w[9],
            "linear1.weight": w[10],
            "linear1.bias": w[11],
            "linear2.weight": w[12],
            "linear2.bias": w[13],
        }
    )
    words = torch.randn(R, M, C, dtype=torch.float64)
    torch.testing.assert_close(ops.inner_transformer(words, *w, num_heads=H), layer(words))


def test_scales_act_on_each_sentences_residual():
    torch.manual_seed(0)
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
    torch.manual_seed(0)
    w = weights(4, 8, True)
    words = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64).view(2, 1, 1)

    def run(words, *w):
        return ops.inner_transformer(words, *w, num_heads=2, attn_scale=scale, mlp_scale=scale)

    assert torch.autograd.gradcheck(run, (words, *w))
