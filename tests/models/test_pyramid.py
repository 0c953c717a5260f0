"""What is PyramidTNT's own: stages, their maps and grids, positions for any image size, official weights in other shapes.

test_timm_api.py has what all networks share, test_pyramid_official.py compares with the official code.
"""

import itertools
import logging
import math
from functools import partial

import networks
import pytest
import timm
import torch
from networks import run, some_images, without_gradient
from timm.layers import resample_abs_pos_embed
from timm.models._input import get_model_args, get_model_input_config
from timm.optim import create_optimizer_v2
from torch._dynamo.testing import CompileCounterWithBackend

from tnt_timm.models import PyramidTNT
from tnt_timm.models.pyramid_grids import resample_relative_pos, stage_grids
from tnt_timm.models.variants import PYRAMIDS
from tnt_timm.ops import choose_backend
from tnt_timm.training.freezing import freeze

COUNTED = {  # parameters and multiply-adds of the official code
    "pyramid_tnt_ti": (10_578_529, 0.586, 192),
    "pyramid_tnt_s": (31_953_200, 3.283, 256),
    "pyramid_tnt_m": (84_943_572, 8.205, 256),
    "pyramid_tnt_b": (156_990_072, 15.967, 256),
}


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch):
    """The native backend would compile its kernels for the widths of every network here; tests/ops compares it."""
    monkeypatch.setattr(choose_backend, "wanted", "reference")


SIZES = [(64, 64), (40, 72), (8, 8), (128, 24), (200, 56)]  # also those whose grids are odd


def small(**kwargs):
    return networks.small("pyramid_tnt_ti", **kwargs).eval()


# ------------------------------------------------------------------------------------------ the registered networks


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_registered_name(name):
    from tnt_timm.costs.complexity import cost

    parameters, gmacs, size = COUNTED[name]
    counted = cost(name)
    assert (round(counted.params_m * 1e6), round(counted.gmacs, 3)) == (parameters, gmacs)
    model = timm.create_model(name, device="meta")
    assert type(model) is PyramidTNT and name in timm.list_models("pyramid*", module="variants")
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, size, size) and cfg["pool_size"] == (size // 64,) * 2 and cfg["fixed_input_size"]
    assert cfg["mean"] == cfg["std"] == (0.5, 0.5, 0.5) and cfg["crop_pct"] == 0.9 and cfg["interpolation"] == "bicubic"
    assert cfg["paper_ids"] == "arXiv:2201.00978" and cfg["license"] == "apache-2.0"
    assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    width = 4 * PYRAMIDS[name]["embed_dim"]
    assert model.num_features == model.head_hidden_size == width == model.get_submodule(cfg["classifier"]).in_features


def test_inner_transformers_are_where_the_official_code_has_them():
    model = timm.create_model("pyramid_tnt_s", device="meta")
    found = [[block.has_inner for block in stage.blocks] for stage in model.stages]
    assert found == [[True, False], [True, True] + [False] * 6, [True] + [False] * 3, [True, False]]


def test_without_published_weights_the_error_says_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for pyramid_tnt_s"):
        timm.create_model("pyramid_tnt_s", pretrained=True, device="meta")


def test_initial_weights():
    torch.manual_seed(0)
    model = timm.create_model("pyramid_tnt_ti")
    assert model.stages[0].relative_pos.std().item() == pytest.approx(1, rel=0.05)
    assert model.patch_pos.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stages[2].blocks[1].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    conv = model.stages[1].sentence_merge.conv
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 160)) ** 0.5, rel=0.05) and conv.bias.abs().max() == 0


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "argument",
    [
        *(dict(mlp_ratio=2.0), dict(qkv_bias=True), dict(num_heads_inner=2), dict(num_heads_outer=1), dict(in_chans=1)),
        *(dict(depths=(1, 1, 1, 1)), dict(sr_ratios=(2, 2, 1, 1)), dict(embed_dim=8), dict(inner_dim=3)),
    ],
    ids=str,
)
def test_every_argument_has_its_effect(argument):
    images = torch.ones(1, argument.get("in_chans", 3), 64, 64)
    plain, changed = small(), small(**argument)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (plain, changed)]
    if shapes[0] == shapes[1]:
        changed.load_state_dict(plain.state_dict())
        assert not torch.equal(changed(images), plain(images))
    else:
        assert changed(images).isfinite().all()


@pytest.mark.parametrize("rate", ["drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_every_dropout_acts_in_training_only(rate):
    model, images = small(**{rate: 0.5}).train(), some_images()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_stochastic_depth_rises_over_the_blocks_of_all_stages():
    rates = [block.drop_path.drop_prob for stage in small(drop_path_rate=0.4).stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (dict(depths=(2, 2, 2)), r"depths \(2, 2, 2\): give a list of 4 whole numbers, one for each stage"),
        (dict(depths="2222"), "depths '2222': give a list of 4 whole numbers"),
        (dict(depths=2), "depths 2: give a list of 4 whole numbers"),
        (dict(depths=(2, 2.0, 2, 2)), "depths"),
        (dict(depths=(2, 0, 2, 2)), r"depths \(2, 0, 2, 2\): 0 is not a positive number"),
        (dict(sr_ratios=(4, 2, 1)), "sr_ratios"),
        *((dict(embed_dim=x), f"embed_dim {x!r} is not a positive whole number") for x in (0, -16, 16.0, "16", True)),
        (dict(in_chans=0), "in_chans 0 is not a positive whole number"),
        (dict(num_classes=-1), "num_classes -1 is below 0"),
        (dict(num_heads_inner=1.0), "num_heads_inner 1.0 is not a positive whole number"),
        *(
            (dict(mlp_ratio=x), f"mlp_ratio {x!r} leaves an MLP of width 4 no hidden units")
            for x in (0, -1, 0.01, float("inf"), "4")
        ),
        *((dict(drop_path_rate=x), f"drop_path_rate {x!r} is not a rate from 0 to 1") for x in (1.5, -0.1, "0.1")),
        (dict(attn_drop_rate=2.0), "attn_drop_rate 2.0 is not a rate from 0 to 1"),
        (dict(dynamic_img_size="no"), "dynamic_img_size 'no' is not True or False"),
        (dict(qkv_bias="False"), "qkv_bias 'False' is not True or False"),
        *(
            (dict(img_size=x), "img_size .* is neither a whole number of pixels nor")
            for x in ("64", 64.0, (64,), (64, 64, 3))
        ),
        (dict(global_pool=""), "global_pool '' has no head; pass num_classes=0, or global_pool='avg'"),
        (
            dict(features_only=True, feature_cls="hook"),
            "feature_cls 'hook': pyramid_tnt_ti returns feature maps by 'getter' only",
        ),
        (dict(img_size=100), r"img_size \(100, 100\) is not a multiple of 8"),
        (dict(img_size=0), r"img_size \(0, 0\) is not a multiple of 8"),
        (dict(num_heads_outer=3), "width 16 cannot be split into 3 heads"),
        (dict(num_heads_inner=3), "width 4 cannot be split into 3 heads"),
        (dict(global_pool="token"), "global_pool 'token' is none of 'avg', ''"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        small(**arguments)


@pytest.mark.parametrize("grad", [False, True])
def test_fused_and_plain_attention_agree(grad):
    model, images = small(), some_images()
    with torch.set_grad_enabled(grad):
        fused = model(images)
    for block in (block for stage in model.stages for block in stage.blocks):
        assert block.attn_out.fused_attn
        block.attn_out.fused_attn = False
    torch.testing.assert_close(model(images), fused)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["trace", "export", "fx"])
def test_a_copy_made_without_gradients_trains_everything(way):
    """The fused attention's way around gradients must not get into a graph."""
    model, images = small(img_size=72), some_images(72)
    with torch.no_grad():
        if way == "trace":
            copy = torch.jit.trace(model, images)
        elif way == "export":
            copy = torch.export.export(model, (images,)).module()
        else:
            copy = torch.fx.symbolic_trace(model)
    copy(images).logsumexp(1).sum().backward()
    assert without_gradient(copy) == []


@pytest.mark.filterwarnings("ignore")
def test_it_can_be_traced_with_gradients():
    model, images = small(), some_images()
    torch.testing.assert_close(torch.jit.trace(model, images)(images), model(images))


# ------------------------------------------------------------------------------------------------- words and sentences


def test_sentences_and_words_are_in_row_order():
    model, images = small(img_size=(16, 24)), some_images((16, 24))
    words, sentences, grid = run(model.stem, images)
    common = run(model.stem.common_conv, images)
    word_map, sentence_map = run(model.stem.pixel_convs, common), run(model.stem.patch_convs, common)
    assert grid == (2, 3) and words.shape == (12, 16, 4)
    words = words.reshape(2, 2, 3, 4, 4, 4)
    for row, column in itertools.product(range(2), range(3)):
        patch = word_map[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        torch.testing.assert_close(words[:, row, column], patch.movedim(1, -1))
        torch.testing.assert_close(sentences[:, 3 * row + column], sentence_map[:, :, row, column])


@pytest.mark.parametrize("grid", [(2, 4), (3, 5)], ids=str)
def test_words_are_joined_inside_two_by_two_sentences(grid):
    """Each joined sentence is computed by hand; beyond an odd border there is nothing."""
    merge = small().stages[1].word_merge
    words = torch.randn(2 * grid[0] * grid[1], 16, 4)
    found = run(lambda x: merge(x, 2, grid), words)
    normed = run(merge.norm, words).reshape(2, *grid, 4, 4, 4)
    rows, columns = (grid[0] + 1) // 2, (grid[1] + 1) // 2
    padded = torch.zeros(2, 2 * rows, 2 * columns, 4, 4, 4)
    padded[:, : grid[0], : grid[1]] = normed
    found = found.reshape(2, rows, columns, 4, 4, 8)
    for row, column in itertools.product(range(rows), range(columns)):
        four = [[padded[:, 2 * row + i, 2 * column + j] for j in range(2)] for i in range(2)]
        joined = torch.cat([torch.cat(pair, dim=2) for pair in four], dim=1)
        torch.testing.assert_close(found[:, row, column], run(merge.conv, joined.movedim(-1, 1)).movedim(1, -1))


def test_keys_at_the_border_are_the_mean_of_fewer_sentences():
    attention = small(img_size=(40, 24)).stages[0].blocks[0].attn_out  # a grid of 5 x 3, keys on 2 x 1
    asked = []
    attention.linear.register_forward_hook(lambda _, inputs, __: asked.append(inputs[0]))
    sentences = torch.randn(2, 15, 16)
    run(lambda x: attention(x, torch.zeros(1, 2, 15, 2), (5, 3)), sentences)
    grid = sentences.reshape(2, 5, 3, 16)
    torch.testing.assert_close(asked[0], torch.stack([grid[:, :4].mean((1, 2)), grid[:, 4:].mean((1, 2))], dim=1))


# ------------------------------------------------------------------------------------------------------------- maps


def tokens_after_stages(model, images):
    """Return the map that leaves each stage, and the final features."""
    after = []
    as_map = lambda _, __, out: after.append(out[1].transpose(1, 2).unflatten(2, out[2]))  # noqa: E731
    hooks = [stage.register_forward_hook(as_map) for stage in model.stages]
    final = run(model.forward_features, images)
    for hook in hooks:
        hook.remove()
    return after, final


FLAGS = ("norm", "stop_early", "intermediates_only")


@pytest.mark.parametrize("size", [(64, 64), (40, 72)], ids=str)
@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_intermediates_are_what_leaves_the_stages(fmt, size):
    model, images = small(img_size=size), some_images(size)
    after, final = tokens_after_stages(model, images)
    assert [tuple(x.shape[2:]) for x in after] == [
        (math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in (8, 16, 32, 64)
    ]
    normed = after[:3] + [final]
    calls = []
    model.stages[3].register_forward_hook(lambda *_: calls.append(1))
    choices = {None: [0, 1, 2, 3], 1: [3], 2: [2, 3], (0,): [0], (0, 2): [0, 2], (-2,): [2]}
    for (indices, taken), flags in itertools.product(choices.items(), itertools.product((False, True), repeat=3)):
        options = dict(zip(FLAGS, flags))
        indices = list(indices) if isinstance(indices, tuple) else indices
        calls.clear()
        found = run(partial(model.forward_intermediates, indices=indices, output_fmt=fmt, **options), images)
        early = options["stop_early"] and taken[-1] < 3
        assert len(calls) == (0 if early else 1)
        expected = [(normed if options["norm"] else after)[i] for i in taken]
        if fmt == "NLC":
            expected = [x.flatten(2).transpose(1, 2) for x in expected]
        if not options["intermediates_only"]:
            expected = (normed[taken[-1]] if early else final, expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_wrong_format_is_refused():
    with pytest.raises(ValueError, match="output_fmt 'NHWC' is none of 'NCHW', 'NLC'"):
        small().forward_intermediates(some_images(), output_fmt="NHWC")


def test_features_only():
    after, _ = tokens_after_stages(small(), some_images())
    for kwargs, taken in (({}, [0, 1, 2, 3]), (dict(out_indices=(1, 2)), [1, 2]), (dict(out_indices=2), [2, 3])):
        backbone = small(features_only=True, **kwargs)
        assert backbone.feature_info.channels() == [(16, 32, 64, 64)[i] for i in taken]
        assert backbone.feature_info.reduction() == [(8, 16, 32, 64)[i] for i in taken]
        torch.testing.assert_close(run(backbone, some_images()), [after[i] for i in taken], rtol=0, atol=0)


def test_the_output_without_head_and_pooling():
    model = small()
    features = run(model.forward_features, some_images((64, 64)))
    assert features.shape == (2, 64, 1, 1)
    torch.testing.assert_close(run(model, some_images()), model.head(features.mean((2, 3))))
    model.reset_classifier(0)
    torch.testing.assert_close(run(model, some_images()), features.mean((2, 3)))
    model.reset_classifier(0, "")
    assert torch.equal(run(model, some_images()), features)


def test_pruning_leaves_the_stages_up_to_the_last_chosen():
    after, final = tokens_after_stages(small(), some_images())
    for kwargs, kept, expected in (
        (dict(indices=[0, 1]), [0, 1], after[1]),
        (dict(indices=[3]), [3], final),
        (dict(indices=[3], prune_norm=True), [3], after[3]),
        (dict(indices=1, prune_head=False), [3], run(small(), some_images())),
    ):
        model = small()
        assert model.prune_intermediate_layers(**kwargs) == kept and len(model.stages) == kept[-1] + 1
        assert torch.equal(run(model, some_images()), expected)
    model = small()
    model.prune_intermediate_layers([1])
    model.reset_classifier(5, "avg")
    assert model.head.in_features == 32 and run(model, some_images()).shape == (2, 5)


# ------------------------------------------------------------------------------------------------- groups of layers


def test_layer_decay_goes_through_the_blocks_in_order():
    model = small()
    groups = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    first = {0: 4, 1: 3, 2: 1, 3: 0}  # blocks after the first one of each stage, of five in all
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        if part == "stages":
            later = 1 if rest[1:3] == ["blocks", "1"] else 0
            layers_above = first[int(rest[0])] + 1 - later
        else:
            layers_above = dict(head=0, norm=1).get(part, 6)
        assert -math.log2(scale[id(parameter)]) == layers_above, name


def test_weight_decay_is_the_official_one():
    """None for vectors and for positions; relative positions decay."""
    model = small()
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    expected = {n for n, p in model.named_parameters() if p.ndim == 1} | {"patch_pos", "pixel_pos"}
    assert {n for n, p in model.named_parameters() if id(p) in free} == expected


def test_freezing_the_stem_and_two_stages():
    model = small()
    held = freeze(model, "2")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parts = ("stem", "patch_pos", "pixel_pos", "stages.0", "stages.1")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(parts)}
    assert model.stem.common_conv[1] in held and model.stages[2] not in held


# ------------------------------------------------------------------------------------------------- other image sizes


def resampled(weights, new, old):
    """Return weights with positions for another grid of sentences."""
    found = dict(weights, patch_pos=resample_abs_pos_embed(weights["patch_pos"], new, old, 0))
    for i, (before, after, ratio) in enumerate(zip(stage_grids(old), stage_grids(new), (4, 2, 1, 1))):
        name = f"stages.{i}.relative_pos"
        found[name] = resample_relative_pos(weights[name], after, before, ratio)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_relative_positions_are_resampled_along_queries_and_keys():
    """Positions that are a product of smooth functions of query and key stay one."""

    def smooth(grid, ratio):
        def place(rows, columns):
            y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
            return (y[:, None] + 2 * x[None, :]).flatten()

        keys = (math.ceil(grid[0] / ratio), math.ceil(grid[1] / ratio))
        return torch.stack([place(*grid)[:, None] * place(*keys)[None, :]] * 2)[None]

    found = resample_relative_pos(smooth((8, 16), 2), (16, 32), (8, 16), 2)
    assert found.shape == (1, 2, 512, 128)
    # in the middle, where the border has no influence
    middle = found.reshape(2, 16, 32, 8, 16)[:, 5:11, 10:22, 3:5, 6:10]
    expected = smooth((16, 32), 2).reshape(2, 16, 32, 8, 16)[:, 5:11, 10:22, 3:5, 6:10]
    torch.testing.assert_close(middle, expected, rtol=0, atol=2e-2)
    same = smooth((8, 16), 2)
    assert torch.equal(resample_relative_pos(same, (8, 16), (8, 16), 2), same)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_set_input_size_gives_what_loading_into_that_size_gives(size):
    model = small()
    before = model.state_dict()
    overlay = dict(state_dict=before, input_size=(3, 64, 64))
    loaded = small(img_size=size, pretrained=True, pretrained_cfg_overlay=overlay)
    model.set_input_size(size)
    assert_same(model.state_dict(), loaded.state_dict())
    assert_same(model.state_dict(), resampled(before, (size[0] // 8, size[1] // 8), (8, 8)))
    assert get_model_args(model)["img_size"] == size and get_model_input_config(model)["input_size"] == (3, *size)


def test_set_input_size_to_the_same_size_keeps_the_parameters():
    model = small()
    before = [model.patch_pos, *(stage.relative_pos for stage in model.stages)]
    model.set_input_size(64)
    assert all(a is b for a, b in zip(before, [model.patch_pos, *(stage.relative_pos for stage in model.stages)]))


def test_a_dynamic_model_gives_for_every_size_what_setting_the_size_gives():
    dynamic = small(dynamic_img_size=True)
    for size in SIZES:
        static = small()
        static.load_state_dict(dynamic.state_dict())
        static.set_input_size(size)
        torch.testing.assert_close(run(dynamic, some_images(size)), run(static, some_images(size)))
        _, maps = run(dynamic.forward_intermediates, some_images(size))
        shapes = [
            (2, c, math.ceil(size[0] / s), math.ceil(size[1] / s)) for c, s in zip((16, 32, 64, 64), (8, 16, 32, 64))
        ]
        assert [tuple(one.shape) for one in maps] == shapes


def test_other_sizes_train_everything():
    model = small(dynamic_img_size=True).train()
    model(some_images((72, 136))).sum().backward()
    assert without_gradient(model) == []


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_dynamic_model_scripts():
    model = small(dynamic_img_size=True)
    scripted = torch.jit.script(model)
    for size in SIZES:
        torch.testing.assert_close(run(scripted, some_images(size)), run(model, some_images(size)))


def test_a_dynamic_model_compiles_once_for_all_heights():
    """The widths work as well, but PyTorch's solver takes twice as long for both."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    model = small(dynamic_img_size=True, depths=(1, 1, 1, 1))
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for size in [(144, 160), (224, 160), (88, 160)]:
        images = some_images(size)
        torch._dynamo.mark_dynamic(images, 2)
        torch.testing.assert_close(run(compiled, images), run(model, images))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    "dynamic, size, reason",
    [
        (False, (48, 64), "image height 48 given to a model built for 64"),
        (False, (64, 80), "image width 80 given to a model built for 64"),
        (True, (50, 64), "image height is not a multiple of 8"),
        (True, (64, 71), "image width is not a multiple of 8"),
    ],
)
def test_images_of_a_wrong_size_are_refused(dynamic, size, reason):
    with pytest.raises(AssertionError, match=reason):
        small(dynamic_img_size=dynamic)(some_images(size))


# --------------------------------------------------------------------------------------------------------- weights


def load(weights, **kwargs):
    return small(pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights, input_size=(3, 64, 64)), **kwargs)


def test_weights_are_adapted_to_size_head_and_channels_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO, "tnt_timm.models.convert_weights")
    trained = small().state_dict()
    model = load(trained, num_classes=7, img_size=128, in_chans=1)
    first, *lines = caplog.records[-1].getMessage().splitlines()
    assert first == f"state dict: {len(trained) - 8} tensors loaded as they are"
    assert sorted(lines) == [
        "  new      head.bias (7,)",
        "  new      head.weight (7, 64)",
        "  resized  patch_pos (1, 64, 16) -> (1, 256, 16)",
        "  resized  stages.0.relative_pos (1, 2, 64, 4) -> (1, 2, 256, 16)",
        "  resized  stages.1.relative_pos (1, 4, 16, 4) -> (1, 4, 64, 16)",
        "  resized  stages.2.relative_pos (1, 8, 4, 4) -> (1, 8, 16, 16)",
        "  resized  stages.3.relative_pos (1, 8, 1, 1) -> (1, 8, 4, 4)",
        "  resized  stem.common_conv.0.weight (8, 3, 3, 3) -> (8, 1, 3, 3)",
        "  skipped  head.bias (10,)",
        "  skipped  head.weight (10, 64)",
    ]
    assert run(model, some_images(128, chans=1)).isfinite().all()


@pytest.mark.parametrize("change", [dict(num_classes=7), dict(img_size=96), dict(in_chans=1)], ids=str)
def test_a_strict_load_says_when_adapting_helps(change):
    with pytest.raises(RuntimeError, match=r"let the weights be adapted: timm.create_model\(") as refusal:
        small(**change).load_state_dict(small().state_dict())
    assert "size mismatch" in str(refusal.value)
    load(small().state_dict(), **change)  # the advice


@pytest.mark.parametrize("change", [dict(embed_dim=32), dict(sr_ratios=(2, 2, 1, 1))], ids=str)
def test_a_strict_load_does_not_advise_adapting_when_that_fails(change):
    with pytest.raises(RuntimeError, match="size mismatch") as refusal:
        small(**change).load_state_dict(small().state_dict())
    assert "adapted" not in str(refusal.value)


def test_mlp_ratio_reaches_both_mlps():
    block = small(mlp_ratio=2.0).stages[1].blocks[0]
    assert (block.mlp_in.fc1.out_features, block.mlp.fc1.out_features) == (16, 64)


@pytest.mark.parametrize(
    "weights, reason",
    [
        (lambda: networks.small().state_dict(), "not a PyramidTNT: it has no stem.common_conv.0.weight among its"),
        (
            lambda: small(depths=(2, 2, 1, 1)).state_dict(),
            "weights of another PyramidTNT: with unknown stages.0.blocks.1",
        ),
        (
            lambda: small(embed_dim=32, num_classes=5).state_dict(),
            "weights of another PyramidTNT: in which patch_pos is",
        ),
        (
            lambda: small(sr_ratios=(2, 2, 1, 1)).state_dict(),
            "in which stages.0.relative_pos is (1, 2, 64, 16) instead of",
        ),
        (
            lambda: {**small().state_dict(), "stages.0.blocks.0.attn_in.kv.weight": None},
            "with unknown stages.0.blocks.0",
        ),
    ],
)
def test_weights_of_another_network_are_refused_with_the_reason(weights, reason):
    with pytest.raises(ValueError) as refusal:
        load(weights())
    assert str(refusal.value).startswith("state dict: ") and reason in str(refusal.value)


def test_a_tnt_refuses_a_pyramids_weights():
    with pytest.raises(ValueError, match=r"not a TNT: it has no pixel_embed.proj.weight among its"):
        networks.small(pretrained=True, pretrained_cfg_overlay=dict(state_dict=small().state_dict()))
