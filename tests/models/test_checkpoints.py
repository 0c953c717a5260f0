"""Weights of others load, adapted where that makes sense and refused where it does not; the log says what was done."""

import argparse
import logging
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv, push_to_hf_hub, save_for_hf

from tnt_timm.models.variants import DISTILLED, VARIANTS

SMALL = dict(img_size=64, num_classes=10, embed_dim=24, inner_dim=6, depth=2, num_heads_inner=2, num_heads_outer=3)
PUBLISHED = {
    "tnt_s": "timm/tnt_s_patch16_224.in1k",
    "tnt_b": "timm/tnt_b_patch16_224.in1k",
    "tnt_s_384": "timm/tnt_s_patch16_224.in1k",
    "tnt_b_384": "timm/tnt_b_patch16_224.in1k",
}

# Our name -> the one in the authors' tnt.py
RELEASED = {
    "patch_pos": "outer_pos",
    "pixel_pos": "inner_pos",
    "pixel_embed": "patch_embed",
    "norm1_proj": "proj_norm1",
    "norm2_proj": "proj_norm2",
    "norm_in": "inner_norm1",
    "attn_in": "inner_attn",
    "norm_mlp_in": "inner_norm2",
    "mlp_in": "inner_mlp",
    "norm_out": "outer_norm1",
    "attn_out": "outer_attn",
    "norm_mlp": "outer_norm2",
    "mlp": "outer_mlp",
    "se.norm": "se_layer.fc.0",
    "se.fc1": "se_layer.fc.1",
    "se.fc2": "se_layer.fc.3",
}


def as_released(weights):
    """A state dict with the names and the layout of the authors' files."""
    released = OrderedDict()
    for name, tensor in weights.items():
        se, parts = name.find("se."), name.split(".")
        if se > 0:
            name = name[:se] + RELEASED[name[se:].rpartition(".")[0]] + "." + parts[-1]
        else:
            name = ".".join(RELEASED.get(part, part) for part in parts)
        released[name] = tensor.flatten(2).transpose(1, 2).contiguous() if name == "inner_pos" else tensor
    sentences, width = released["outer_pos"].shape[1:]
    released["outer_tokens"] = torch.zeros(1, sentences - 1, width)
    return released


def shaken(model):
    """The model with all its parameters moved, so that no two of them are equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def small(name="tnt_ti", **kwargs):
    return timm.create_model(name, **{**SMALL, **kwargs})


def load(file, name="tnt_ti", overlay=None, **kwargs):
    return small(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), **(overlay or {})), **kwargs).eval()


def logits(model, chans=3, size=(64, 64)):
    images = torch.randn(2, chans, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(images)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def weights():
    """Of a small TNT for 10 classes and 64x64 images, four by four sentences."""
    return shaken(small()).state_dict()


@pytest.fixture
def save(tmp_path):
    def write(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def told(caplog):
    """What loading said in the log."""
    caplog.set_level(logging.INFO, "tnt_timm.models.checkpoints")

    def messages():
        return [r.getMessage() for r in caplog.records if r.name == "tnt_timm.models.checkpoints"]

    return messages


@pytest.fixture(autouse=True)
def no_warnings(caplog):
    """Whatever loads here, loads without a warning."""
    yield
    assert [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.WARNING] == []


pytestmark = pytest.mark.filterwarnings("error")

# ---------------------------------------------------------------------------------------------- the authors' files

DOORS = {
    "file": lambda file, name, **kw: timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=file), **kw
    ),
    "state_dict": lambda file, name, **kw: timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=torch.load(file)), **kw
    ),
    "checkpoint_path": lambda file, name, **kw: timm.create_model(name, checkpoint_path=file, **kw),
    "load_state_dict": lambda file, name, **kw: loaded_strictly(timm.create_model(name, **kw), torch.load(file)),
}


def loaded_strictly(model, state_dict):
    names = list(state_dict)
    model.load_state_dict(state_dict, strict=True)
    assert list(state_dict) == names  # it is left as it was
    return model


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name, timms", [("tnt_s", "tnt_s_patch16_224"), ("tnt_b", "tnt_b_patch16_224")])
def test_released_weights_give_timms_logits_through_every_door(save, door, name, timms):
    file = save(as_released(shaken(timm.create_model(name, depth=1)).state_dict()))
    reference = timm.create_model(timms, pretrained=True, pretrained_cfg_overlay=dict(file=file), depth=1).eval()
    expected = logits(reference, size=(224, 224))
    found = logits(DOORS[door](file, name, depth=1).eval(), size=(224, 224))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kwargs", [dict(se=True), dict(qkv_bias=True), dict(patch_size=(16, 8)), {}], ids=str)
def test_released_names_load_as_ours_do(save, door, kwargs):
    model = shaken(small(**kwargs))
    file = save(as_released(model.state_dict()))
    assert_same(DOORS[door](file, "tnt_ti", **{**SMALL, **kwargs}).state_dict(), model.state_dict())


def test_released_names_load_into_a_part_of_another_model(weights):
    whole = torch.nn.ModuleDict(dict(backbone=small(), neck=torch.nn.Linear(2, 2)))
    released = {f"backbone.{name}": tensor for name, tensor in as_released(weights).items()}
    whole.load_state_dict({**released, **{f"neck.{k}": v for k, v in whole["neck"].state_dict().items()}})
    assert_same(whole["backbone"].state_dict(), weights)


def test_timms_weights_load_and_ours_load_into_timm(weights):
    from timm.models.tnt import TNT as TimmTNT

    timms = TimmTNT(**SMALL)
    timms.load_state_dict(weights, strict=True)
    assert_same(loaded_strictly(small(), timms.state_dict()).state_dict(), weights)


# -------------------------------------------------------------------------------------------------- forms of a file


@pytest.mark.parametrize("door", ["file", "checkpoint_path"])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        lambda w, other: w,
        lambda w, other: {"state_dict": w, "epoch": 3},
        lambda w, other: {"model": w},
        lambda w, other: {"state_dict": other, "state_dict_ema": w},
        lambda w, other: {"model": other, "model_ema": w},
        lambda w, other: {f"module.{k}": v for k, v in w.items()},
        lambda w, other: {"state_dict": {f"_orig_mod.{k}": v for k, v in w.items()}},
        lambda w, other: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in w.items()}},
        lambda w, other: {"state_dict": w, "args": argparse.Namespace(model="tnt_ti", lr=1e-3)},
        lambda w, other: {"state_dict": {k: v.double() for k, v in w.items()}},
    ],
    ids=["bare", "state_dict", "model", "state_dict_ema", "model_ema", "module", "_orig_mod", "both", "args", "double"],
)
def test_every_form_of_file_loads(save, weights, form, released, door):
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    file = save(form(as_released(weights) if released else weights, other))
    assert_same(DOORS[door](file, "tnt_ti", **SMALL).state_dict(), weights)


@pytest.mark.parametrize("door", ["file", "checkpoint_path"])
@pytest.mark.parametrize("released", [False, True])
def test_safetensors_load(tmp_path, weights, released, door):
    file = str(tmp_path / "model.safetensors")
    safetensors.torch.save_file(dict(as_released(weights) if released else weights), file)
    assert_same(DOORS[door](file, "tnt_ti", **SMALL).state_dict(), weights)


def test_half_precision_files_are_resized_in_their_own_precision(save, weights):
    half = {name: tensor.half() for name, tensor in weights.items()}
    model = load(save(half), img_size=96, in_chans=1)
    expected = resample_abs_pos_embed(half["patch_pos"], (6, 6), (4, 4), 1)
    assert torch.equal(model.patch_pos, expected.float())
    assert model.pixel_embed.proj.weight.dtype == torch.float32


class Intruder:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("door", ["file", "checkpoint_path"])
def test_code_in_a_pickle_is_refused_and_not_run(save, tmp_path, weights, door):
    mark = tmp_path / "run"
    file = save({"state_dict": weights, "args": Intruder(mark)})
    with pytest.raises(RuntimeError, match="weights_only=True blocked loading"):
        DOORS[door](file, "tnt_ti", **SMALL)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Intruder(mark)))
    assert mark.exists()  # it would have run


# --------------------------------------------------------------------------------- another head, size or input depth

HEAD = ("head.weight", "head.bias")


@pytest.mark.parametrize("released", [False, True])
def test_a_head_that_fits_is_kept(save, weights, released):
    assert_same(load(save(as_released(weights) if released else weights), num_classes=10).state_dict(), weights)


def test_the_overlay_may_say_the_number_of_classes(save, weights):
    arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
    overlay = dict(file=save(weights), num_classes=10)
    model = timm.create_model("tnt_ti", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    assert_same(model.state_dict(), weights)


@pytest.mark.parametrize("classes", [7, 1000])
@pytest.mark.parametrize("released", [False, True])
def test_a_head_of_another_size_starts_anew_and_the_rest_is_kept(save, weights, classes, released):
    torch.manual_seed(3)
    start = small(num_classes=classes).state_dict()
    torch.manual_seed(3)
    model = load(save(as_released(weights) if released else weights), num_classes=classes)
    assert_same(model.state_dict(), {**weights, **{name: start[name] for name in HEAD}})
    assert model.num_classes == model.pretrained_cfg["num_classes"] == classes


def test_no_head_takes_none(save, weights):
    model = load(save(weights), num_classes=0)
    assert_same(model.state_dict(), {name: tensor for name, tensor in weights.items() if name not in HEAD})


def test_a_file_without_a_head_gives_a_new_one(save, weights, told):
    body = {name: tensor for name, tensor in weights.items() if name not in HEAD}
    file = save(body)
    state = load(file).state_dict()
    assert_same({name: state[name] for name in body}, body)
    assert (
        told()[-1]
        == f"{file}: {len(body)} tensors loaded as they are\n  new      head.weight (10, 24)\n  new      head.bias (10,)"
    )


@pytest.mark.parametrize("size", [32, 96, (48, 80), (128, 64)], ids=str)
@pytest.mark.parametrize("released", [False, True])
def test_sentence_positions_are_resampled_as_timm_does(save, weights, size, released):
    model = load(save(as_released(weights) if released else weights), img_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    positions = resample_abs_pos_embed(weights["patch_pos"], (height // 16, width // 16), (4, 4), 1)
    assert_same(model.state_dict(), {**weights, "patch_pos": positions})
    assert logits(model, size=(height, width)).isfinite().all()


def test_words_keep_their_positions_at_384(save):
    trained = shaken(timm.create_model("tnt_s", depth=1)).state_dict()
    overlay = dict(file=save(as_released(trained)))
    model = timm.create_model("tnt_s_384", depth=1, pretrained=True, pretrained_cfg_overlay=overlay)
    positions = resample_abs_pos_embed(trained["patch_pos"], (24, 24), (14, 14), 1)
    assert_same(model.state_dict(), {**trained, "patch_pos": positions})


def test_weights_of_no_square_need_their_size_said_unless_the_model_has_it(save):
    trained = shaken(small(img_size=(48, 80))).state_dict()
    file = save(trained)
    assert_same(load(file, img_size=(48, 80)).state_dict(), trained)
    with pytest.raises(ValueError, match="patch_pos has places for 15 sentences, which are no square grid; say the im"):
        load(file, img_size=64)
    model = load(file, img_size=64, overlay=dict(input_size=(3, 48, 80)))
    assert torch.equal(model.patch_pos, resample_abs_pos_embed(trained["patch_pos"], (4, 4), (3, 5), 1))


def test_as_many_positions_as_the_model_has_are_its_own_unless_the_size_is_said(save, weights):
    file = save(weights)
    assert torch.equal(load(file, img_size=(32, 128)).patch_pos, weights["patch_pos"])
    model = load(file, img_size=(32, 128), overlay=dict(input_size=(3, 64, 64)))
    assert torch.equal(model.patch_pos, resample_abs_pos_embed(weights["patch_pos"], (2, 8), (4, 4), 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_saved_run_says_its_size(tmp_path, dynamic):
    run = shaken(small(img_size=(32, 128), dynamic_img_size=dynamic))  # two by eight sentences, as many as four by four
    save_for_hf(run, tmp_path)
    square = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)
    assert torch.equal(square.patch_pos, resample_abs_pos_embed(run.patch_pos, (4, 4), (2, 8), 1))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(again.state_dict(), run.state_dict())


@pytest.mark.parametrize("source", [1, 3, 4])
@pytest.mark.parametrize("target", [1, 3, 4, 6])
def test_the_convolution_takes_any_number_of_channels_as_timms_do(save, source, target):
    trained = shaken(small(in_chans=source)).state_dict()
    model = load(save(as_released(trained)), in_chans=target)
    name = "pixel_embed.proj.weight"
    assert_same(model.state_dict(), {**trained, name: adapt_input_conv(target, trained[name], base_chans=source)})
    assert logits(model, chans=target).isfinite().all()


def test_from_plain_to_distilled(save, weights):
    torch.manual_seed(3)
    start = small("tnt_ti_distilled").state_dict()
    torch.manual_seed(3)
    model = load(save(weights), "tnt_ti_distilled")
    new = ["dist_token", "head_dist.weight", "head_dist.bias"]
    positions = torch.cat([weights["patch_pos"][:, :1], start["patch_pos"][:, 1:2], weights["patch_pos"][:, 1:]], dim=1)
    assert_same(dict(model.state_dict()), {**start, **weights, **{k: start[k] for k in new}, "patch_pos": positions})


@pytest.mark.parametrize("size, grid", [(64, (4, 4)), ((96, 32), (6, 2))])
def test_from_distilled_to_plain(save, size, grid):
    distilled = shaken(small("tnt_ti_distilled"))
    model = load(save(distilled.state_dict()), img_size=size)
    kept = {name: tensor for name, tensor in distilled.state_dict().items() if "dist" not in name}
    positions = resample_abs_pos_embed(
        torch.cat([kept["patch_pos"][:, :1], kept["patch_pos"][:, 2:]], 1), grid, (4, 4), 1
    )
    assert_same(model.state_dict(), {**kept, "patch_pos": positions})


def test_from_distilled_to_distilled_of_another_size_and_head(save):
    distilled = shaken(small("tnt_ti_distilled"))
    file = save(distilled.state_dict())
    assert_same(load(file, "tnt_ti_distilled").state_dict(), distilled.state_dict())
    state = load(file, "tnt_ti_distilled", num_classes=3, img_size=(32, 48)).state_dict()
    assert torch.equal(state["patch_pos"], resample_abs_pos_embed(distilled.patch_pos, (2, 3), (4, 4), 2))
    assert torch.equal(state["dist_token"], distilled.dist_token)
    assert state["head.weight"].shape == state["head_dist.weight"].shape == (3, 24)


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_ti_distilled"])
@pytest.mark.parametrize(
    "change", [{}, dict(num_classes=7), dict(img_size=(32, 80)), dict(in_chans=1), dict(dynamic_img_size=True)], ids=str
)
def test_feature_maps_of_loaded_weights(save, name, change):
    file = save(as_released(shaken(small(name)).state_dict()) if name == "tnt_ti" else shaken(small(name)).state_dict())
    whole = load(file, name, **change)
    maps = load(file, name, features_only=True, out_indices=(0, 1), **change)
    images = torch.randn(1, change.get("in_chans", 3), *change.get("img_size", (64, 64)))
    with torch.inference_mode():
        expected = whole.forward_intermediates(images, intermediates_only=True)
        found = maps(images)
    assert [tuple(one.shape) for one in found] == [(1, 24, images.shape[2] // 16, images.shape[3] // 16)] * 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


# -------------------------------------------------------------------------------------------------- what the log says


def test_the_log_names_what_was_resized_new_and_skipped_in_one_block(save, weights, told):
    file = save(as_released(weights))
    model = load(file, "tnt_ti_distilled", num_classes=7, img_size=(32, 48), in_chans=1)
    (block,) = told()
    first, *lines = block.splitlines()
    assert first == f"{file}: {len(model.state_dict()) - 7} tensors loaded as they are"
    assert sorted(lines) == [
        "  new      dist_token (1, 1, 24)",
        "  new      head.bias (7,)",
        "  new      head.weight (7, 24)",
        "  new      head_dist.bias (7,)",
        "  new      head_dist.weight (7, 24)",
        "  resized  patch_pos (1, 17, 24) -> (1, 8, 24)",
        "  resized  pixel_embed.proj.weight (6, 3, 7, 7) -> (6, 1, 7, 7)",
        "  skipped  head.bias (10,)",
        "  skipped  head.weight (10, 24)",
        "  skipped  outer_tokens (the network does not read it)",
    ]


def test_the_log_is_one_line_where_nothing_changed(save, weights, told):
    file = save(weights)
    load(file)
    assert told() == [f"{file}: {len(weights)} tensors loaded as they are"]


def test_the_log_does_not_name_published_weights_that_were_not_read(weights, told):
    small("tnt_s", pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(weights)))
    assert told() == [f"state dict: {len(weights)} tensors loaded as they are"]


# ----------------------------------------------------------------------------------------------------------- refusals


def of_timm(name, **kwargs):
    return timm.create_model(name, **kwargs).state_dict()


@pytest.mark.parametrize(
    "content, reason",
    [
        (
            lambda: of_timm("test_resnet"),
            "not a TNT: it has no pixel_embed.proj.weight among its 92 tensors (conv1.0.weig",
        ),
        (lambda: of_timm("deit_tiny_patch16_224", depth=1), "not a TNT: it has no blocks.0.norm_out.weight among its"),
        (
            lambda: of_timm("tnt_s_legacy_patch16_224", **SMALL),
            "timm's tnt_s_legacy_patch16_224, which is another network",
        ),
        (lambda: of_timm("tnt_ti", **{**SMALL, "se": True}), "another TNT: with unknown blocks.0.se.norm.weight"),
        (lambda: of_timm("tnt_ti", **{**SMALL, "depth": 1}), "another TNT: without blocks.1.norm_in.weight"),
        (lambda: of_timm("tnt_ti", **{**SMALL, "depth": 3}), "another TNT: with unknown blocks.2.norm_in.weight"),
        (lambda: of_timm("tnt_ti", **{**SMALL, "inner_blocks": (2,)}), "another TNT: without blocks.0.norm_in.weight"),
        (lambda: of_timm("tnt_ti", **{**SMALL, "pos_embed": "word"}), "another TNT: without patch_pos"),
        (
            lambda: of_timm("tnt_ti", **{**SMALL, "qkv_bias": True}),
            "another TNT: with unknown blocks.0.attn_in.qk.bias",
        ),
        (lambda: of_timm("tnt_ti", **{**SMALL, "embed_dim": 48}), "cls_token is (1, 1, 48) instead of (1, 1, 24)"),
        (
            lambda: of_timm("tnt_ti", **{**SMALL, "first_stride": 2}),
            "pixel_pos is (1, 6, 8, 8) instead of (1, 6, 4, 4)",
        ),
        (lambda: {**of_timm("tnt_ti", **SMALL), "norm.bias": 0.0}, "in which norm.bias is float instead of (24,)"),
        (
            lambda: {**of_timm("tnt_ti", **SMALL), "patch_pos": None},
            "in which patch_pos is NoneType instead of (1, 17, 24)",
        ),
        (lambda: {"epoch": 3, "optimizer": {}}, "not a TNT: it has no pixel_embed.proj.weight among its 2 tensors"),
        (dict, "not a TNT: it has no pixel_embed.proj.weight among its 0 tensors"),
    ],
    ids="ResNet DeiT legacy SE shallower deeper sparser positions bias wider words number none training empty".split(),
)
def test_weights_of_another_network_are_refused_with_the_reason(save, content, reason):
    file = save(content())
    with pytest.raises(ValueError) as refusal:
        load(file)
    assert str(refusal.value).startswith(f"{file}: ")
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400 + len(file)


@pytest.mark.parametrize(
    "source, target, reason",
    [
        ("tnt_b", "tnt_s", "cls_token is (1, 1, 640) instead of (1, 1, 384)"),
        ("tnt_s", "tnt_s_se", "without blocks.0.se.norm.weight, blocks.0.se.norm.bias and 70 more"),
        ("tnt_s_se", "tnt_s", "with unknown blocks.0.se.norm.weight, blocks.0.se.norm.bias and 70 more"),
        ("tnt_s", "tnt_s_sparse4", "with unknown blocks.1.norm_in.weight, blocks.1.norm_in.bias and 134 more"),
        ("tnt_s_sparse4", "tnt_s", "without blocks.1.norm_in.weight, blocks.1.norm_in.bias and 134 more"),
    ],
)
def test_registered_variants_refuse_each_others_weights(source, target, reason):
    weights = timm.create_model(source, device="meta").state_dict()
    with pytest.raises(ValueError) as refusal:
        timm.create_model(target, device="meta", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))
    assert str(refusal.value).startswith("state dict: weights of another TNT: ") and reason in str(refusal.value)


@pytest.mark.parametrize("change", [dict(num_classes=7), dict(img_size=96), dict(in_chans=1)], ids=str)
def test_a_strict_load_that_adapting_would_mend_says_how(save, weights, change):
    file = save(as_released(weights))
    with pytest.raises(RuntimeError, match="size mismatch for") as refusal:
        small(checkpoint_path=file, **change)
    assert "let the weights be adapted: timm.create_model(..., pretrained=True, pretr" in str(refusal.value)
    load(file, **change)  # what it says


@pytest.mark.parametrize("change", [dict(depth=3), dict(se=True)], ids=str)
def test_a_strict_load_that_adapting_would_not_mend_does_not_say_so(save, weights, change):
    with pytest.raises(RuntimeError, match="Missing key") as refusal:
        small(checkpoint_path=save(as_released(weights)), **change)
    assert "adapted" not in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path, caplog):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere.pth")
    assert "nowhere.pth" in caplog.text
    caplog.clear()


# ---------------------------------------------------------------------------------------------------- published weights


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and nothing downloaded before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return dict(pretrained=True, cache_dir=tmp_path, device="meta")


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_network_one_line_says_what_to_download_and_how_to_pass_it(offline, name):
    with pytest.raises(RuntimeError) as refusal:
        timm.create_model(name, **offline)
    message = str(refusal.value)
    assert message.startswith(f"{name}: the published weights could not be fetched (") and "\n" not in message
    assert f"https://huggingface.co/{PUBLISHED[name]}/resolve/main/model.safetensors" in message
    assert (
        f"timm.create_model({name!r}, pretrained=True, pretrained_cfg_overlay=dict(file='model.safetensors'))"
        in message
    )
    assert "train.py --pretrained-path model.safetensors" in message
    assert "checkpoint_path='model.safetensors'" in message


@pytest.mark.parametrize("name", [name for name in (*VARIANTS, *DISTILLED) if name not in PUBLISHED])
def test_names_without_published_weights_say_so(offline, name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}. Use `pretrained=False`"):
        timm.create_model(name, **offline)


@pytest.mark.parametrize("name", ["tnt_s", "tnt_ti"])
def test_weights_of_ones_own_that_cannot_be_fetched_are_not_taken_for_the_published(offline, name):
    with pytest.raises(OSError) as refusal:
        timm.create_model(name, pretrained_cfg_overlay=dict(hf_hub_id="someone/flowers"), **offline)
    assert "timm/tnt" not in str(refusal.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_load_as_the_hub_serves_them(monkeypatch, tmp_path, name):
    trained = shaken(timm.create_model(name.removesuffix("_384"), depth=1)).state_dict()
    safetensors.torch.save_file(trained, tmp_path / "model.safetensors")
    asked = []

    def download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = timm.create_model(f"{name}.in1k", pretrained=True, depth=1)
    assert asked == [(PUBLISHED[name], "model.safetensors")]
    grid = (24, 24) if name.endswith("_384") else (14, 14)
    trained["patch_pos"] = resample_abs_pos_embed(trained["patch_pos"], grid, (14, 14), 1)
    assert_same(model.state_dict(), trained)
    assert timm.create_model(name, pretrained=True, depth=1, num_classes=7, in_chans=1).head.out_features == 7


# ------------------------------------------------------------------------------------------------- folders and the hub


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("tnt_ti", {}),
        ("tnt_ti", dict(img_size=(48, 80), in_chans=1, num_classes=3, global_pool="avg", drop_path_rate=0.1)),
        ("tnt_ti", dict(se=True, qkv_bias=True, mlp_ratio=2.0, first_stride=2)),
        ("tnt_ti", dict(inner_blocks=(2,), pos_embed="word", dynamic_img_size=True)),
        ("tnt_ti", dict(sentence_start="zeros", pos_embed="none")),
        ("tnt_s_sparse4", dict(inner_blocks=[1])),
        ("tnt_ti_distilled", dict(num_classes=0)),
    ],
    ids=str,
)
def test_a_saved_folder_loads_back(tmp_path, caplog, name, kwargs, safe):
    model = shaken(small(name, **kwargs))
    save_for_hf(model, tmp_path, safe_serialization=safe)
    caplog.clear()  # saving, timm says that it averages the three channels' normalisation for one
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(again) is type(model)
    assert_same(again.state_dict(), model.state_dict())
    chans, size = kwargs.get("in_chans", 3), kwargs.get("img_size", (64, 64))
    assert torch.equal(logits(again, chans, size), logits(model, chans, size))


def test_a_saved_folder_loads_with_another_head_size_and_depth_of_input(tmp_path, told):
    model = shaken(small())
    save_for_hf(model, tmp_path)
    changed = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=(96, 32), in_chans=4)
    state = changed.state_dict()
    same = [name for name in state if name not in (*HEAD, "patch_pos", "pixel_embed.proj.weight")]
    assert_same({name: state[name] for name in same}, {name: model.state_dict()[name] for name in same})
    assert torch.equal(state["patch_pos"], resample_abs_pos_embed(model.patch_pos, (6, 2), (4, 4), 1))
    assert torch.equal(
        state["pixel_embed.proj.weight"], adapt_input_conv(4, model.pixel_embed.proj.weight.detach(), base_chans=3)
    )
    assert state["head.weight"].shape == (3, 24)
    assert told()[-1].startswith(f"{tmp_path}: {len(same)} tensors loaded as they are")


def test_a_model_changed_after_its_creation_saves_what_it_is(tmp_path):
    model = shaken(small())
    model.set_input_size((32, 96))
    model.reset_classifier(4, "avg")
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.pixel_embed.img_size == (32, 96) and again.num_classes == 4 and again.global_pool == "avg"
    assert torch.equal(logits(again, size=(32, 96)), logits(model, size=(32, 96)))


def test_code_in_the_pickle_of_a_folder_is_refused_and_not_run(tmp_path):
    save_for_hf(small(), tmp_path / "run")
    torch.save(Intruder(tmp_path / "mark"), tmp_path / "run" / "pytorch_model.bin")
    with pytest.raises(RuntimeError, match="weights_only=True blocked loading"):
        timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert not (tmp_path / "mark").exists()


def test_a_model_goes_to_the_hub_and_comes_back(monkeypatch, tmp_path):
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **_):
            return False

        def upload_folder(self, folder_path, repo_id, **_):
            shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(hub / repo_id / filename)
    )
    model = shaken(small("tnt_s_se", num_classes=4))
    push_to_hf_hub(model, "someone/flowers", model_config=dict(label_names=["rose", "iris", "lily", "aster"]))
    files = {"README.md", "config.json", "model.safetensors", "pytorch_model.bin"}
    assert {path.name for path in (hub / "someone/flowers").iterdir()} == files
    again = timm.create_model("hf-hub:someone/flowers", pretrained=True).eval()
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again), logits(model))
    assert again.pretrained_cfg["label_names"] == ["rose", "iris", "lily", "aster"]
