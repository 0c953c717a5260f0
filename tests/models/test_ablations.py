"""Every row of the paper's ablations is an argument, and its cost is what a count by hand from the paper gives."""

from functools import partial

import networks
import pytest
import timm
import torch
from networks import some_images, without_gradient

from tnt_timm.costs.complexity import count

small = partial(networks.small, img_size=32, num_classes=4, embed_dim=48, num_heads_outer=6)  # the rest as in SMALL
# The inner transformers are those of TNT-S, and there are as many blocks
narrow = partial(small, "tnt_s", inner_dim=24, num_heads_inner=4, depth=12)


def parameters(m=16, c=24, d=384, n=196, depth=12, inner=None, sentence=True, word=True, from_words=True):
    """Count a TNT's parameters: n sentences of m words, widths d and c; `inner` blocks have an inner transformer."""
    words = 3 * 7 * 7 * c + c + (m * c if word else 0)
    sentences = d + ((n + 1) * d if sentence else 0) + (2 * m * c + m * c * d + d + 2 * d if from_words else 0)
    inner_block = 4 * c + 12 * c * c + 6 * c + 2 * m * c + m * c * d + 2 * d  # and its fold into the sentence
    outer_block = 4 * d + 12 * d * d + 6 * d
    inner = depth if inner is None else inner
    return words + sentences + inner * inner_block + depth * outer_block + 2 * d + 1000 * d + 1000


def multiply_adds(m=16, c=24, d=384, n=196, depth=12, inner=None, from_words=True):
    words = n * m * 3 * 7 * 7 * c + (n * m * c * d if from_words else 0)
    inner_block = n * (m * 12 * c * c + 2 * m * m * c + m * c * d)
    outer_block = (n + 1) * 12 * d * d + 2 * (n + 1) ** 2 * d
    inner = depth if inner is None else inner
    return words + inner * inner_block + depth * outer_block + 1000 * d


def counted(name="tnt_s", **kwargs):
    """Return the model's trainable parameters, and its multiply-adds for one image."""
    model = timm.create_model(name, device="meta", **kwargs)
    return count(model, (3, *model.pixel_embed.img_size))


def assert_trains(model):
    """Every parameter has a gradient, and a step along it lowers the loss."""
    images, targets = some_images(32, batch=4), torch.arange(4)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    before = torch.nn.functional.cross_entropy(model(images), targets)
    before.backward()
    assert without_gradient(model) == []
    optimizer.step()
    assert torch.nn.functional.cross_entropy(model(images), targets) < before


# ------------------------------------------------------------------------------------ blocks with an inner transformer

TABLE_7 = {(1, 4, 8, 12): (4.8, 4.793), (1, 6, 12): (4.7, 4.740), (1, 6): (4.7, 4.687), (1,): (4.6, 4.634)}
ROWS = {None: (5.2, 5.217), **TABLE_7, (): (4.6, 4.581)}


@pytest.mark.parametrize("blocks", ROWS, ids=str)
def test_inner_blocks_cost_what_table_7_says_and_train(blocks):
    found, macs = counted(inner_blocks=blocks)
    number = 12 if blocks is None else len(blocks)
    assert found == parameters(inner=number) and macs == multiply_adds(inner=number)
    assert (round(macs / 1e9, 1), round(macs / 1e9, 3)) == ROWS[blocks]
    assert_trains(narrow(inner_blocks=blocks))


@pytest.mark.parametrize("blocks", [*ROWS, [12, 1], range(3, 6)], ids=str)
def test_words_change_in_the_inner_blocks_only(blocks):
    model, changed = narrow(inner_blocks=blocks).eval(), []
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(
            lambda _, words, out, number=number: None if torch.equal(words[0], out[0]) else changed.append(number)
        )
    model(some_images(32, batch=1))
    assert changed == (list(range(1, 13)) if blocks is None else sorted(blocks))


def test_without_inner_blocks_the_words_count_through_the_first_embedding_only():
    model, images = small(inner_blocks=[]).eval(), some_images(32)
    _, sentences = model.embed(images)
    for block in model.blocks:
        sentences = block.outer(sentences)
    assert torch.equal(model.norm(sentences), model.forward_features(images))


# ---------------------------------------------------------------------------------------- heads, words and positions


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8])
def test_inner_heads(heads):
    assert counted(num_heads_inner=heads, depth=2) == (parameters(depth=2), multiply_adds(depth=2))
    model = narrow(num_heads_inner=heads)
    assert {block.attn_in.num_heads for block in model.blocks} == {heads}
    assert_trains(model)


@pytest.mark.parametrize("m, c, stride, heads", [(64, 6, 2, 2), (16, 24, 4, 4), (4, 96, 8, 4)])
def test_words_per_sentence(m, c, stride, heads):
    kwargs = dict(first_stride=stride, inner_dim=c, num_heads_inner=heads)
    assert counted(depth=2, **kwargs) == (parameters(m=m, c=c, depth=2), multiply_adds(m=m, c=c, depth=2))
    model = narrow(**kwargs)
    assert model.pixel_embed(some_images(32), model.pixel_pos).shape == (2 * 4, m, c)
    assert_trains(model)


POSITIONS = [("none", False, False), ("sentence", True, False), ("word", False, True), ("both", True, True)]


@pytest.mark.parametrize("rows, sentence, word", POSITIONS)
def test_positions(rows, sentence, word):
    expected = parameters(depth=2, sentence=sentence, word=word), multiply_adds(depth=2)
    assert counted(pos_embed=rows, depth=2) == expected
    model = small(pos_embed=rows).eval()
    assert (model.patch_pos is not None, model.pixel_pos is not None) == (sentence, word)

    if sentence:
        torch.nn.init.normal_(model.patch_pos)
    images = some_images(32, batch=1)
    swapped = images.roll(16, dims=3)  # left and right patches change places
    difference = (model(swapped) - model(images)).abs().max()
    assert difference > 1e-4 if sentence else difference < 1e-6

    words = model.pixel_embed(torch.zeros(1, 3, 32, 32), model.pixel_pos)
    alike = (words - words[:, :1]).abs().max() < 1e-6  # words of equal pixels differ only by their positions
    assert alike == (not word)
    assert_trains(narrow(pos_embed=rows))


def test_sentences_that_start_at_zero_see_the_image_from_the_first_fold_on():
    expected = parameters(depth=2, from_words=False), multiply_adds(depth=2, from_words=False)
    assert counted(sentence_start="zeros", depth=2) == expected
    model, images = small(sentence_start="zeros").eval(), some_images(32)
    assert not model.cls_token.any() and not hasattr(model, "proj")
    _, sentences = model.embed(images)
    assert torch.equal(sentences, model.patch_pos.expand(2, -1, -1))
    assert not torch.equal(*model(images))
    assert_trains(narrow(sentence_start="zeros"))


COMBINED = [
    dict(sentence_start="zeros", pos_embed="none"),
    dict(sentence_start="zeros", pos_embed="word", inner_blocks=(1, 4)),
    dict(inner_blocks=(), pos_embed="none", se=True),
    dict(inner_blocks=(2,), first_stride=8, qkv_bias=True, pos_embed="sentence", global_pool="avg"),
]


@pytest.mark.parametrize("kwargs", COMBINED, ids=str)
def test_ablations_combine(kwargs):
    assert_trains(narrow(**kwargs))


# ------------------------------------------------------------------------------------------------- the paper's sizes


@pytest.mark.parametrize(
    "name, c, d, authors, gmacs, at_384",
    [
        ("tnt_ti", 12, 192, 6_076_408, 1.4, 5.12),
        ("tnt_s", 24, 384, 23_768_584, 5.2, 17.31),
        ("tnt_b", 40, 640, 65_428_680, 14.1, 44.53),
    ],
)
def test_parameters_and_multiply_adds_of_the_three_sizes(name, c, d, authors, gmacs, at_384):
    found, macs = counted(name)
    assert found == authors == parameters(c=c, d=d) and macs == multiply_adds(c=c, d=d)
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.055)  # the paper's; TNT-B has 14.049
    larger, macs = counted(name, img_size=384)
    assert larger == parameters(c=c, d=d, n=576) and round(macs / 1e9, 2) == at_384
    if name != "tnt_ti":
        assert counted(f"{name}_384") == (larger, macs)


def test_the_other_variants_cost_what_their_tables_say():
    assert counted("tnt_s_sparse4") == (parameters(inner=4), multiply_adds(inner=4))
    gate = 2 * 384 * 96  # the two linears of squeeze-and-excitation, computed once per image and block
    found, macs = counted("tnt_s_se")
    assert found == 24_668_296 == parameters() + 12 * (gate + 96 + 384 + 2 * 384)
    assert macs == multiply_adds() + 12 * gate


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        (dict(pos_embed="learned"), "pos_embed 'learned' is none of 'both', 'sentence', 'word', 'none'"),
        (dict(sentence_start="ones"), "sentence_start 'ones' is none of 'words', 'zeros'"),
        (dict(global_pool="max"), "global_pool 'max' is none of 'token', 'avg', ''"),
        (dict(inner_blocks=(0, 1)), r"inner_blocks \[0, 1\]: 0 is none of the blocks 1 to 2"),
        (dict(inner_blocks=(1, 3)), r"inner_blocks \[1, 3\]: 3 is none of the blocks 1 to 2"),
        (dict(inner_blocks=(-1,)), r"inner_blocks \[-1\]: -1 is none of the blocks 1 to 2"),
        (dict(inner_blocks=2), "inner_blocks 2: give a list of block numbers, counted from 1"),
        (dict(inner_blocks=(), sentence_start="zeros"), r"inner_blocks \[\]: .* never see the image; add a block"),
        (dict(num_heads_inner=4), "width 6 cannot be split into 4 heads"),
        (dict(num_heads_inner=0), "num_heads_inner 0 is not a positive whole number"),
        (dict(num_heads_outer=7), "width 48 cannot be split into 7 heads"),
        (dict(first_stride=0), "first_stride 0 is not a positive whole number"),
        (dict(patch_size=0), "patch_size 0 is not a positive whole number"),
        (dict(depth=0), "depth 0 is not a positive whole number"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_the_reason(kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        small(**kwargs)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="dpeth"):
        small(dpeth=3)
