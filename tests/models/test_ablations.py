"""Every row of the paper's ablations is an argument, and costs what counting by hand from the paper says."""

import pytest
import timm
import torch

from tnt_timm.costs.complexity import count

ALL = range(1, 13)
NARROW = dict(img_size=32, num_classes=4, embed_dim=48, num_heads_outer=6)  # and the rest as TNT-S has it
SMALL = dict(NARROW, inner_dim=6, depth=3, num_heads_inner=2)


def parameters(m=16, c=24, d=384, n=196, depth=12, inner=None, sentence=True, word=True, from_words=True):
    """Of a TNT, counted from the paper: n sentences of m words, widths d and c, `inner` of the blocks with words."""
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
    """The model's trainable parameters and multiply-adds of one image."""
    model = timm.create_model(name, device="meta", **kwargs)
    return count(model, (3, *model.pixel_embed.img_size))


def assert_trains(model):
    """A step along the gradient, which every parameter has, lowers the loss."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(4)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    before = torch.nn.functional.cross_entropy(model(images), targets)
    before.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    optimizer.step()
    assert torch.nn.functional.cross_entropy(model(images), targets) < before


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("tnt_s", **{**SMALL, **kwargs}).eval()


def narrow(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("tnt_s", **{**NARROW, **kwargs})


# -------------------------------------------------------------------------------------- which blocks have inner ones

ROWS = [
    (None, 5.2, 5.217),
    ((1, 4, 8, 12), 4.8, 4.793),
    ((1, 6, 12), 4.7, 4.740),
    ((1, 6), 4.7, 4.687),
    ((1,), 4.6, 4.634),
    ((), 4.6, 4.581),
]


@pytest.mark.parametrize("blocks, papers, exactly", ROWS, ids=str)
def test_inner_blocks_cost_what_table_7_says(blocks, papers, exactly):
    found, macs = counted(inner_blocks=blocks)
    number = 12 if blocks is None else len(blocks)
    assert found == parameters(inner=number) and macs == multiply_adds(inner=number)
    assert round(macs / 1e9, 1) == papers and round(macs / 1e9, 3) == exactly


@pytest.mark.parametrize("blocks", [row[0] for row in ROWS], ids=str)
def test_inner_blocks_train(blocks):
    assert_trains(narrow(inner_blocks=blocks))


@pytest.mark.parametrize("blocks", [row[0] for row in ROWS] + [[12, 1], range(3, 6)], ids=str)
def test_words_change_in_the_inner_blocks_only(blocks):
    model = narrow(inner_blocks=blocks).eval()
    changed = []
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(
            lambda _, words, out, number=number: None if torch.equal(words[0], out[0]) else changed.append(number)
        )
    model(torch.randn(1, 3, 32, 32))
    assert changed == (list(ALL) if blocks is None else sorted(blocks))


def test_the_sparse_variant_is_row_two():
    assert counted("tnt_s_sparse4") == (parameters(inner=4), multiply_adds(inner=4))


def test_without_inner_blocks_the_words_count_through_the_first_embedding_only():
    model = small(inner_blocks=[])
    images = torch.randn(1, 3, 32, 32)
    _, sentences = model.embed(images)
    for block in model.blocks:
        sentences = block.outer(sentences)
    assert torch.equal(model.norm(sentences), model.forward_features(images))


# --------------------------------------------------------------------------------------- heads, words and positions


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
    words = model.pixel_embed(torch.randn(2, 3, 32, 32), model.pixel_pos)
    assert words.shape == (2 * 4, m, c)
    assert_trains(model)


@pytest.mark.parametrize(
    "rows, sentence, word",
    [("none", False, False), ("sentence", True, False), ("word", False, True), ("both", True, True)],
)
def test_positions(rows, sentence, word):
    expected = parameters(depth=2, sentence=sentence, word=word), multiply_adds(depth=2)
    assert counted(pos_embed=rows, depth=2) == expected
    model = small(pos_embed=rows)
    assert (model.patch_pos is not None, model.pixel_pos is not None) == (sentence, word)

    if sentence:
        torch.nn.init.normal_(model.patch_pos)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    swapped = images.roll(16, dims=3)  # left and right patches change places
    difference = (model(swapped) - model(images)).abs().max()
    assert difference > 1e-4 if sentence else difference < 1e-6

    gray = torch.zeros(1, 3, 32, 32)
    words = model.pixel_embed(gray, model.pixel_pos)
    alike = (words - words[:, :1]).abs().max() < 1e-6  # words of the same pixels differ by their positions only
    assert alike == (not word)
    assert_trains(narrow(pos_embed=rows))


def test_sentences_that_start_at_zero_see_the_image_from_the_first_fold_on():
    expected = parameters(depth=2, from_words=False), multiply_adds(depth=2, from_words=False)
    assert counted(sentence_start="zeros", depth=2) == expected
    model = small(sentence_start="zeros")
    assert not model.cls_token.any() and not hasattr(model, "proj")
    _, sentences = model.embed(torch.randn(2, 3, 32, 32))
    assert torch.equal(sentences, model.patch_pos.expand(2, -1, -1))
    assert not torch.equal(model(torch.randn(1, 3, 32, 32)), model(torch.randn(1, 3, 32, 32)))
    assert_trains(narrow(sentence_start="zeros"))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(sentence_start="zeros", pos_embed="none"),
        dict(sentence_start="zeros", pos_embed="word", inner_blocks=(1, 4)),
        dict(inner_blocks=(), pos_embed="none", se=True),
        dict(inner_blocks=(2,), first_stride=8, qkv_bias=True, pos_embed="sentence", global_pool="avg"),
    ],
    ids=str,
)
def test_rows_together(kwargs):
    assert_trains(narrow(**kwargs))


# ------------------------------------------------------------------------------------------------- the paper's sizes


@pytest.mark.parametrize(
    "name, c, d, gmacs, at_384",
    [("tnt_ti", 12, 192, 1.4, 5.12), ("tnt_s", 24, 384, 5.2, 17.31), ("tnt_b", 40, 640, 14.1, 44.53)],
)
def test_parameters_and_multiply_adds_of_the_three_sizes(name, c, d, gmacs, at_384):
    found, macs = counted(name)
    assert found == parameters(c=c, d=d) and macs == multiply_adds(c=c, d=d)
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.055)  # the paper's; TNT-B has 14.049
    larger, macs = counted(name, img_size=384)
    assert larger == parameters(c=c, d=d, n=576) and round(macs / 1e9, 2) == at_384


@pytest.mark.parametrize(
    "name, number",
    [("tnt_ti", 6_076_408), ("tnt_s", 23_768_584), ("tnt_b", 65_428_680), ("tnt_s_se", 24_668_296)],
)
def test_as_many_parameters_as_the_authors_network_trains(name, number):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == number


def test_squeeze_and_excitation_costs_next_to_nothing():
    found, macs = counted("tnt_s_se")
    gate = 2 * 384 * 96  # its two linears, computed once per image and block
    assert macs == multiply_adds() + 12 * gate
    assert found == parameters() + 12 * (gate + 96 + 384 + 2 * 384)


@pytest.mark.parametrize("name, c, d", [("tnt_s_384", 24, 384), ("tnt_b_384", 40, 640)])
def test_the_384_variants_take_384_pixels(name, c, d):
    assert counted(name) == (parameters(c=c, d=d, n=576), multiply_adds(c=c, d=d, n=576))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        (dict(pos_embed="learned"), "pos_embed 'learned' is none of 'both', 'sentence', 'word', 'none'"),
        (dict(sentence_start="ones"), "sentence_start 'ones' is none of 'words', 'zeros'"),
        (dict(global_pool="max"), "global_pool 'max' is none of 'token', 'avg', ''"),
        (dict(inner_blocks=(0, 1)), r"inner_blocks \[0, 1\]: 0 is none of the blocks 1 to 3"),
        (dict(inner_blocks=(1, 4)), r"inner_blocks \[1, 4\]: 4 is none of the blocks 1 to 3"),
        (dict(inner_blocks=(-1,)), r"inner_blocks \[-1\]: -1 is none of the blocks 1 to 3"),
        (dict(inner_blocks=2), "inner_blocks 2: give a list of block numbers, counted from 1"),
        (
            dict(inner_blocks=(), sentence_start="zeros"),
            r"inner_blocks \[\]: .* would never see the image; add a block",
        ),
        (dict(num_heads_inner=4), "width 6 cannot be split into 4 heads"),
        (dict(num_heads_inner=0), "width 6 cannot be split into 0 heads"),
        (dict(num_heads_outer=7), "width 48 cannot be split into 7 heads"),
        (dict(first_stride=0), "first_stride 0 is not a positive number"),
        (dict(patch_size=0), "patch_size 0 is not a positive number"),
        (dict(depth=0), "depth 0 is not a positive number"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_the_reason(kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        small(**kwargs)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="dpeth"):
        small(dpeth=3)
