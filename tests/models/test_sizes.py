"""Images of other sizes: chosen at creation, set later, or accepted call by call. Word positions never change."""

import itertools
from functools import partial

import networks
import pytest
import timm
import torch
from networks import run, some_images
from timm.models._input import get_model_args, get_model_input_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch._dynamo.testing import CompileCounterWithBackend

SIZES = [(64, 64), (32, 32), (48, 80), (128, 32), (16, 16)]


def small(name="tnt_ti", **kwargs):
    return networks.small(name, **kwargs).eval()


def logits(model, size):
    return run(model, some_images(size))


# --------------------------------------------------------------------------------------------------------- at creation


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_ti_distilled"])
@pytest.mark.parametrize("size, grid", [(32, (2, 2)), ((48, 80), (3, 5)), ([128, 32], (8, 2)), (16, (1, 1))], ids=str)
def test_a_size_at_creation(name, size, grid):
    model = small(name, img_size=size)
    height, width = grid[0] * 16, grid[1] * 16
    assert model.pixel_embed.grid_size == grid and model.pixel_embed.img_size == (height, width)
    assert model.num_patches == model.pixel_embed.num_patches == grid[0] * grid[1]
    assert model.patch_pos.shape == (1, model.num_prefix_tokens + model.num_patches, 24)
    assert model.pixel_pos.shape == (1, 6, 4, 4)
    assert logits(model, (height, width)).shape == (2, 10)


PATCHES = [(8, 4, (8, 8), (2, 2)), (32, 4, (2, 2), (8, 8)), ((16, 8), 4, (4, 8), (4, 2))]


@pytest.mark.parametrize("patch, stride, grid, words", PATCHES, ids=str)
def test_other_patches(patch, stride, grid, words):
    model = small(patch_size=patch, first_stride=stride)
    assert model.pixel_embed.grid_size == grid and model.pixel_pos.shape[2:] == words
    features = logits(partial(model.forward_intermediates, intermediates_only=True), 64)
    assert features[-1].shape == (2, 24, *grid)


def test_sentences_and_words_are_in_row_order():
    model, images = small(img_size=(48, 80)), some_images((48, 80))
    embedded = run(lambda x: model.pixel_embed(x, None), images).unflatten(0, (2, 15)).unflatten(2, (4, 4))
    for row, column in itertools.product(range(3), range(5)):
        patch = images[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        words = model.pixel_embed.proj(patch).movedim(1, -1)
        torch.testing.assert_close(embedded[:, 5 * row + column], words)


# ------------------------------------------------------------------------------------------------------- set_input_size


@pytest.mark.parametrize(
    "name, network", [("tnt_ti", VisionTransformer), ("tnt_ti_distilled", VisionTransformerDistilled)]
)
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (32, 128), (96, 96), (64, 64)], ids=str)
def test_set_input_size_does_what_timms_vision_transformer_does(name, network, size):
    ours, timms = small(name), network(img_size=64, patch_size=16, embed_dim=24, depth=1, num_heads=3)
    with torch.no_grad():
        timms.pos_embed.copy_(ours.patch_pos)
    for model in (ours, timms):
        model.set_input_size(size)
    assert torch.equal(ours.patch_pos, timms.pos_embed)
    assert isinstance(ours.patch_pos, torch.nn.Parameter) and ours.patch_pos.requires_grad
    assert ours.num_patches == ours.pixel_embed.num_patches == timms.patch_embed.num_patches
    assert ours.pixel_embed.grid_size == timms.patch_embed.grid_size
    assert ours.pixel_embed.img_size == timms.patch_embed.img_size == size
    assert get_model_args(ours)["img_size"] == get_model_args(timms)["img_size"] == size
    assert get_model_input_config(ours)["input_size"] == (3, *size)
    assert logits(ours, size).shape == (2, 10)


@pytest.mark.parametrize("size", [(48, 80), (32, 128)], ids=str)
def test_set_input_size_gives_what_loading_into_that_size_gives(size):
    model = small()
    overlay = dict(state_dict=model.state_dict(), input_size=(3, 64, 64))
    loaded = small(img_size=size, pretrained=True, pretrained_cfg_overlay=overlay)
    model.set_input_size(size)
    assert torch.equal(logits(model, size), logits(loaded, size))


def test_set_input_size_to_the_same_size_keeps_the_parameter():
    model = small()
    positions, before = model.patch_pos, logits(model, 64)
    model.set_input_size(64)
    assert model.patch_pos is positions and torch.equal(logits(model, 64), before)


def test_set_input_size_keeps_frozen_positions_frozen_and_their_precision():
    model = small(dtype=torch.bfloat16)
    model.patch_pos.requires_grad_(False)
    model.set_input_size(32)
    assert not model.patch_pos.requires_grad and model.patch_pos.dtype == torch.bfloat16


@pytest.mark.parametrize("pos_embed", ["none", "word"])
def test_set_input_size_without_sentence_positions(pos_embed):
    model = small(pos_embed=pos_embed)
    model.set_input_size((32, 96))
    assert model.patch_pos is None and logits(model, (32, 96)).shape == (2, 10)


@pytest.mark.parametrize("size", [40, (64, 40), (70, 64)], ids=str)
def test_a_size_that_is_refused_changes_nothing(size):
    model = small()
    before = logits(model, 64)
    with pytest.raises(ValueError, match=r"is not a multiple of patch_size \(16, 16\)"):
        model.set_input_size(size)
    assert torch.equal(logits(model, 64), before)
    assert get_model_input_config(model)["input_size"] == (3, 64, 64)


# ------------------------------------------------------------------------------------------------------------- dynamic


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_ti_se", "tnt_ti_distilled"])
def test_a_dynamic_model_gives_for_every_size_what_setting_the_size_gives(name):
    static, dynamic = small(name), small(name, dynamic_img_size=True)
    dynamic.load_state_dict(static.state_dict())
    assert torch.equal(logits(dynamic, 64), logits(static, 64))
    for size in SIZES:
        static.load_state_dict(dynamic.state_dict())
        static.set_input_size(size)
        assert torch.equal(logits(dynamic, size), logits(static, size)), size
        found, expected = (logits(model.forward_intermediates, size) for model in (dynamic, static))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found[1][0].shape == (2, 24, size[0] // 16, size[1] // 16)
        static.set_input_size(64)


def test_a_dynamic_model_can_be_set_to_another_size():
    static, dynamic = small(), small(dynamic_img_size=True)
    for size in ((32, 96), (64, 64)):
        static.set_input_size(size)
        dynamic.set_input_size((32, 96))
        assert torch.equal(logits(dynamic, size), logits(static, size))


def test_features_only_accepts_images_of_every_size():
    maps = small(features_only=True, out_indices=(0, 1), dynamic_img_size=True)
    for height, width in SIZES:
        assert [one.shape for one in logits(maps, (height, width))] == [(2, 24, height // 16, width // 16)] * 2


def test_other_sizes_train_the_positions():
    model = small(dynamic_img_size=True).train()
    model(some_images((48, 80))).sum().backward()
    assert (model.patch_pos.grad.abs().sum(2) > 0).all()


def test_a_dynamic_model_says_that_its_size_is_not_fixed():
    assert get_model_input_config(small())["fixed_input_size"]
    model = small(dynamic_img_size=True)
    assert not get_model_input_config(model)["fixed_input_size"]
    assert get_model_args(model)["dynamic_img_size"] is True


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_dynamic_model_scripts():
    model = small(dynamic_img_size=True)
    scripted = torch.jit.script(model)
    for size in SIZES:
        torch.testing.assert_close(logits(scripted, size), logits(model, size))


def test_a_dynamic_model_compiles_once_for_all_sizes():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    model = small(depth=1, dynamic_img_size=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for size in [(48, 80), (80, 48), (96, 112)]:
        torch.testing.assert_close(logits(compiled, size), logits(model, size))
        assert graphs.frame_count == 1


def test_a_dynamic_model_exports_for_batches_and_sizes_of_any_number():
    model = small(depth=1, dynamic_img_size=True)
    batch, rows, columns = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "rows", "columns"))
    shapes = ({0: batch, 2: 16 * rows, 3: 16 * columns},)
    program = torch.export.export(model, (some_images((48, 80)),), dynamic_shapes=shapes).module()
    for size, number in [((64, 64), 2), ((32, 32), 5), ((48, 80), 2), ((128, 32), 2)]:
        images = some_images(size, batch=number)
        torch.testing.assert_close(run(program, images), run(model, images))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("size", [30, (32, 40), (40, 32)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused_at_creation(size, dynamic):
    with pytest.raises(ValueError, match=r"img_size .* is not a multiple of patch_size \(16, 16\)"):
        small(img_size=size, dynamic_img_size=dynamic)


@pytest.mark.parametrize(
    "dynamic, size, reason",
    [
        (False, (48, 64), "image height 48 given to a model built for 64"),
        (False, (64, 80), "image width 80 given to a model built for 64"),
        (True, (50, 64), "image height is not a multiple of the patch height 16"),
        (True, (64, 72), "image width is not a multiple of the patch width 16"),
    ],
)
def test_images_of_a_wrong_size_are_refused(dynamic, size, reason):
    model = small(dynamic_img_size=dynamic)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(AssertionError, match=reason):
            call(some_images(size))


# ---------------------------------------------------------------------------------------------------------- large maps


@pytest.mark.parametrize("kwargs", [dict(img_size=1024), dict(dynamic_img_size=True)], ids=str)
def test_feature_maps_of_1024_pixels(kwargs):
    model, ran = timm.create_model("tnt_ti", **kwargs).eval(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    options = dict(indices=[0, 1], stop_early=True, intermediates_only=True)
    maps = run(partial(model.forward_intermediates, **options), some_images(1024, batch=1))
    assert [tuple(one.shape) for one in maps] == [(1, 192, 64, 64)] * 2 and ran == [0, 1]
    assert all(one.isfinite().all() for one in maps)
