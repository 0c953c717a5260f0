"""The attention that figures show is the network's own."""

from unittest import mock

import numpy as np
import pytest
import timm
import torch
from timm.utils import AttentionExtract

from tnt_timm import ops
from tnt_timm.errors import UserError
from tnt_timm.figures import attention


def values_of(layer, x):
    B, L, _ = x.shape
    return layer.v(x).reshape(B, L, layer.num_heads, -1).transpose(1, 2)


@torch.inference_mode()
def test_outer_attention_gives_the_layers_own_output(tnt, image):
    (weights,) = tnt.outer_attention(image, [2])
    assert weights.shape == (3, 7, 7) and torch.allclose(weights.sum(-1), torch.ones(3, 7))
    assert weights.std() > 0.05  # not even, so that what follows can fail
    model = tnt.model
    layer, words_and_sentences = model.blocks[1].attn_out, model.embed(image)
    words, sentences = model.blocks[0](*words_and_sentences)
    words = model.blocks[1].inner(words)
    x = model.blocks[1].norm_out(model.blocks[1].fold(words, sentences))
    found = layer.proj((weights[None] @ values_of(layer, x)).transpose(1, 2).reshape(1, 7, -1))
    assert torch.allclose(found, layer(x), atol=1e-5)


@torch.inference_mode()
def test_inner_attention_gives_the_operators_own_output(tnt, image):
    (weights,) = tnt.inner_attention(image, [1])
    assert weights.shape == (6, 2, 16, 16) and torch.allclose(weights.sum(-1), torch.ones(6, 2, 16))
    assert weights.std() > 0.02
    block, words = tnt.model.blocks[0], tnt.model.embed(image)[0]
    x = block.attn_in.proj((weights @ values_of(block.attn_in, block.norm_in(words))).transpose(1, 2).reshape(6, 16, 8))
    x = words + x
    x = x + block.mlp_in(block.norm_mlp_in(x))
    with mock.patch("tnt_timm.models.tnt.inner_transformer", wraps=ops.inner_transformer) as operator:
        assert torch.allclose(x, block.inner(words), atol=1e-4)
    operator.assert_called_once()


def timms_own(model, image):
    """By timm's tool, from its plain attention."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    extract = AttentionExtract(model, method="hook")
    return {name: value.detach() for name, value in extract(image).items()}


def test_timms_tnt_and_vit_agree_with_timms_extractor(named):
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    for name in ("tnt_s_patch16_224", "vit_tiny_patch16_224"):
        model = timm.create_model(name, img_size=32, depth=2).eval()
        outer = named(model).outer_attention(image, [2])[0]
        inner = named(model).inner_attention(image, [2])[0] if "tnt" in name else None
        found = timms_own(model, image)
        key = "blocks.1.attn_out.attn_drop" if "tnt" in name else "blocks.1.attn.attn_drop"
        assert torch.allclose(outer, found[key][0], atol=1e-6)
        if inner is not None:
            assert torch.allclose(inner, found["blocks.1.attn_in.attn_drop"], atol=1e-6)


def test_a_query_is_the_row_of_its_cell(tnt, image):
    outer, inner = tnt.outer_attention(image, [3])[0], tnt.inner_attention(image, [3])[0]
    (found,) = attention.attended(tnt, image, [3], (1, 0))
    assert found.block == 3 and found.heads.shape == (3, 3, 2) and found.prefix.shape == (3, 1)
    assert np.array_equal(found.heads.reshape(3, 6), outer[:, 1 + 2, 1:].numpy())  # row 1 of two columns: sentence 2
    assert np.allclose(found.heads.sum((1, 2)) + found.prefix.sum(1), 1, atol=1e-5)
    (found,) = attention.attended(tnt, image, [3])
    assert np.array_equal(found.heads.reshape(3, 6), outer[:, 0, 1:].numpy())
    (found,) = attention.attended(tnt, image, [3], (2, 1), (0, 3))
    assert np.array_equal(found.heads.reshape(2, 16), inner[5, :, 3].numpy())


def test_word_maps_lie_where_their_pixels_are(tnt, image):
    plain = tnt.word_maps(image, [1, 3])
    assert [values.shape for values in plain] == [(12, 8), (12, 8)]
    words = tnt.model.blocks[0](*tnt.model.embed(image))[0].mean(-1)  # (6, 16)
    for row, column in ((0, 0), (5, 7), (11, 2)):
        sentence, word = row // 4 * 2 + column // 4, row % 4 * 4 + column % 4
        assert plain[0][row, column] == pytest.approx(words[sentence, word].item(), abs=1e-5)
    changed = image.clone()
    changed[:, :, 16:32, 16:] += 1  # the sentence in row 1, column 1: words never see another sentence
    differs = tnt.word_maps(changed, [3])[0] != plain[1]
    assert differs[4:8, 4:].all() and differs.sum() == 16


def test_no_hook_is_left_behind(tnt, image):
    tnt.outer_attention(image, [1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tnt.model.modules())


RESNET = timm.create_model("resnet18")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda tnt, resnet, x: tnt.block_numbers([4]), "blocks: 4: t has blocks 1 to 3"),
        (lambda tnt, resnet, x: attention.cell("word", (3, 0), (3, 2)), "word: 3 0: there are 3 rows and 2 columns"),
        (lambda tnt, resnet, x: attention.cell("word", (0, -1), (3, 2)), "there are 3 rows and 2 columns"),
        (lambda tnt, resnet, x: resnet.word_maps(x, [1]), "r: has no words"),
        (lambda tnt, resnet, x: resnet.outer_attention(x, [1]), "r: has no transformer"),
        (lambda tnt, resnet, x: tnt.word_maps(x[..., :16], [1]), "t: image width 16 given to a model built for 32"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tnt, named, image, call, message):
    with pytest.raises(UserError, match=message):
        call(tnt, named(RESNET, "r"), image)


def test_a_block_without_an_inner_transformer(named, image):
    network = named(timm.create_model("tnt_ti", img_size=(48, 32), depth=2, inner_blocks=(1,)))
    assert len(network.inner_attention(image, [1])) == 1
    with pytest.raises(UserError, match="blocks: 2: this block of t has no inner transformer"):
        network.inner_attention(image, [2])
