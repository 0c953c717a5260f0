"""Weights from elsewhere load, are adapted where that makes sense and refused otherwise; the log says what was changed."""

import argparse
import logging
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
from networks import SMALL, run, small, some_images
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv, push_to_hf_hub, save_for_hf

from tnt_timm.models.official_tnt import OFFICIAL
from tnt_timm.models.variants import DISTILLED, VARIANTS

PUBLISHED = {f"tnt_{s}{more}": f"timm/tnt_{s}_patch16_224.in1k" for s in "sb" for more in ("", "_384")}
HEAD = ("head.weight", "head.bias")
CONV = "pixel_embed.proj.weight"

# Part of our name -> part of the authors'. timm's own filter confirms them in the test of timm's logits.
RELEASED = {ours: official for official, ours in OFFICIAL.items()}
RELEASED_SE = {"se.norm": "se_layer.fc.0", "se.fc1": "se_layer.fc.1", "se.fc2": "se_layer.fc.3"}


def as_released(weights):
    """Return a state dict with the names and the layout of the authors' files."""
    released = {}
    for name, tensor in weights.items():
        for ours, theirs in RELEASED_SE.items():
            name = name.replace(ours, theirs)
        name = ".".join(RELEASED.get(part, part) for part in name.split("."))
        released[name] = tensor.flatten(2).transpose(1, 2).contiguous() if name == "inner_pos" else tensor
    sentences, width = released["outer_pos"].shape[1:]
    released["outer_tokens"] = torch.zeros(1, sentences - 1, width)
    return released


def shaken(model):
    """Move all parameters of a model, so that no two of them are equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def load(file, name="tnt_ti", overlay=None, **kwargs):
    return small(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), **(overlay or {})), **kwargs).eval()


def resampled(positions, new_grid, old_grid, prefix_tokens=1):
    return resample_abs_pos_embed(positions, new_grid, old_grid, prefix_tokens)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def weights():
    """Of a small TNT for 10 classes and 64x64 images, with four by four sentences."""
    return shaken(small()).state_dict()


@pytest.fixture(params=[False, True], ids=["ours", "released"])
def named(request):
    """A function that gives weights our names or the released ones."""
    return as_released if request.param else lambda weights: weights


@pytest.fixture
def save(tmp_path):
    def write(content, name="weights.pth"):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return write


@pytest.fixture
def logged(caplog):
    """A function that returns what loading has logged."""
    name = "tnt_timm.models.convert_weights"
    caplog.set_level(logging.INFO, name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == name]


@pytest.fixture(autouse=True)
def no_warnings(caplog):
    """Whatever loads here, loads without a warning."""
    yield
    assert [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.WARNING] == []


pytestmark = pytest.mark.filterwarnings("error")

# ---------------------------------------------------------------------------------------------- the authors' files


def loaded_strictly(model, state_dict):
    names = list(state_dict)
    model.load_state_dict(state_dict, strict=True)
    assert list(state_dict) == names  # it is not changed
    return model


def pretrained(name, kwargs, **overlay):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


WAYS = {
    "file": lambda file, name, **kw: pretrained(name, kw, file=file),
    "state_dict": lambda file, name, **kw: pretrained(name, kw, state_dict=torch.load(file)),
    "checkpoint_path": lambda file, name, **kw: timm.create_model(name, checkpoint_path=file, **kw),
    "load_state_dict": lambda file, name, **kw: loaded_strictly(timm.create_model(name, **kw), torch.load(file)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, timms", [("tnt_s", "tnt_s_patch16_224"), ("tnt_b", "tnt_b_patch16_224")])
def test_released_weights_give_timms_logits_however_they_are_loaded(save, way, name, timms):
    file = save(as_released(shaken(timm.create_model(name, depth=1)).state_dict()))
    expected = run(pretrained(timms, dict(depth=1), file=file).eval(), some_images(224))
    found = run(WAYS[way](file, name, depth=1).eval(), some_images(224))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kwargs", [dict(se=True), dict(qkv_bias=True), dict(patch_size=(16, 8)), {}], ids=str)
def test_released_names_load_as_ours_do(save, way, kwargs):
    model = shaken(small(**kwargs))
    file = save(as_released(model.state_dict()))
    assert_same(WAYS[way](file, "tnt_ti", **{**SMALL, **kwargs}).state_dict(), model.state_dict())


def test_released_names_load_into_a_part_of_another_model(weights):
    whole = torch.nn.ModuleDict(dict(backbone=small(), neck=torch.nn.Linear(2, 2)))
    released = {f"backbone.{name}": tensor for name, tensor in as_released(weights).items()}
    whole.load_state_dict({**released, **{f"neck.{k}": v for k, v in whole["neck"].state_dict().items()}})
    assert_same(whole["backbone"].state_dict(), weights)


# -------------------------------------------------------------------------------------------------- forms of a file

FORMS = {
    "bare": lambda w, other: w,
    "state_dict": lambda w, other: {"state_dict": w, "epoch": 3},
    "model": lambda w, other: {"model": w},
    "state_dict_ema": lambda w, other: {"state_dict": other, "state_dict_ema": w},
    "model_ema": lambda w, other: {"model": other, "model_ema": w},
    "module": lambda w, other: {f"module.{k}": v for k, v in w.items()},
    "_orig_mod": lambda w, other: {"state_dict": {f"_orig_mod.{k}": v for k, v in w.items()}},
    "both": lambda w, other: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in w.items()}},
    "args": lambda w, other: {"state_dict": w, "args": argparse.Namespace(model="tnt_ti", lr=1e-3)},
    "double": lambda w, other: {"state_dict": {k: v.double() for k, v in w.items()}},
}
FILE_WAYS = ["file", "checkpoint_path"]


@pytest.mark.parametrize("way", FILE_WAYS)
@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_every_form_of_file_loads(tmp_path, save, weights, form, named, way):
    if form == "safetensors":
        file = str(tmp_path / "model.safetensors")
        safetensors.torch.save_file(named(weights), file)
    else:
        other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        file = save(FORMS[form](named(weights), other))
    assert_same(WAYS[way](file, "tnt_ti", **SMALL).state_dict(), weights)


def test_half_precision_files_are_resized_in_their_own_precision(save, weights):
    half = {name: tensor.half() for name, tensor in weights.items()}
    model = load(save(half), img_size=96, in_chans=1)
    assert torch.equal(model.patch_pos, resampled(half["patch_pos"], (6, 6), (4, 4)).float())
    assert model.pixel_embed.proj.weight.dtype == torch.float32


class Intruder:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("way", [*FILE_WAYS, "folder"])
def test_code_in_a_pickle_is_refused_and_not_run(save, tmp_path, weights, way):
    mark = tmp_path / "run"
    with pytest.raises(RuntimeError, match="weights_only=True blocked loading"):
        if way == "folder":
            save_for_hf(small(), tmp_path)
            save(Intruder(mark), "pytorch_model.bin")
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        else:
            WAYS[way](save({"state_dict": weights, "args": Intruder(mark)}), "tnt_ti", **SMALL)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Intruder(mark)))
    assert mark.exists()  # it would have run


# ------------------------------------------------------------------------------- another head, size or input channels


def test_the_overlay_may_give_the_number_of_classes(save, weights):
    arguments = {key: value for key, value in SMALL.items() if key != "num_classes"}
    assert_same(pretrained("tnt_ti", arguments, file=save(weights), num_classes=10).state_dict(), weights)


@pytest.mark.parametrize("classes", [7, 1000])
def test_a_head_of_another_size_is_new_and_the_rest_is_kept(save, weights, classes, named):
    start = small(num_classes=classes).state_dict()
    model = load(save(named(weights)), num_classes=classes)
    assert_same(model.state_dict(), {**weights, **{name: start[name] for name in HEAD}})
    assert model.num_classes == model.pretrained_cfg["num_classes"] == classes


def test_without_a_head_in_the_model_or_in_the_file(save, weights, logged):
    body = {name: tensor for name, tensor in weights.items() if name not in HEAD}
    assert_same(load(save(weights), num_classes=0).state_dict(), body)
    file = save(body)
    state = load(file).state_dict()
    assert_same({name: state[name] for name in body}, body)
    new = "\n  new      head.weight (10, 24)\n  new      head.bias (10,)"
    assert logged()[-1] == f"{file}: {len(body)} tensors loaded as they are{new}"


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (48, 80), (128, 64)], ids=str)
def test_sentence_positions_are_resampled_as_timm_does(save, weights, size, named):
    model = load(save(named(weights)), img_size=size)
    positions = resampled(weights["patch_pos"], (size[0] // 16, size[1] // 16), (4, 4))
    assert_same(model.state_dict(), {**weights, "patch_pos": positions})
    assert run(model, some_images(size)).isfinite().all()


def test_a_grid_that_is_no_square_needs_the_image_size_unless_the_model_has_it(save):
    trained = shaken(small(img_size=(48, 80))).state_dict()
    file = save(trained)
    assert_same(load(file, img_size=(48, 80)).state_dict(), trained)
    with pytest.raises(ValueError, match="patch_pos is for 15 sentences, which form no square; give the image size"):
        load(file, img_size=64)
    model = load(file, img_size=64, overlay=dict(input_size=(3, 48, 80)))
    assert torch.equal(model.patch_pos, resampled(trained["patch_pos"], (4, 4), (3, 5)))


def test_as_many_positions_as_the_model_has_are_its_own_unless_the_image_size_is_given(save, weights):
    file = save(weights)
    assert torch.equal(load(file, img_size=(32, 128)).patch_pos, weights["patch_pos"])
    model = load(file, img_size=(32, 128), overlay=dict(input_size=(3, 64, 64)))
    assert torch.equal(model.patch_pos, resampled(weights["patch_pos"], (2, 8), (4, 4)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_saved_run_contains_its_image_size(tmp_path, dynamic):
    trained = shaken(small(img_size=(32, 128), dynamic_img_size=dynamic))  # two by eight, as many as four by four
    save_for_hf(trained, tmp_path)
    square = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64)
    assert torch.equal(square.patch_pos, resampled(trained.patch_pos, (4, 4), (2, 8)))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_same(again.state_dict(), trained.state_dict())


@pytest.mark.parametrize("source", [1, 3, 4])
@pytest.mark.parametrize("target", [1, 3, 4, 6])
def test_the_convolution_is_adapted_to_any_number_of_channels_as_timm_does(save, source, target):
    trained = shaken(small(in_chans=source)).state_dict()
    model = load(save(as_released(trained)), in_chans=target)
    assert_same(model.state_dict(), {**trained, CONV: adapt_input_conv(target, trained[CONV], base_chans=source)})
    assert run(model, some_images(chans=target)).isfinite().all()


def test_from_plain_to_distilled(save, weights):
    start = small("tnt_ti_distilled").state_dict()
    model = load(save(weights), "tnt_ti_distilled")
    new = {name: start[name] for name in ("dist_token", "head_dist.weight", "head_dist.bias")}
    positions = torch.cat([weights["patch_pos"][:, :1], start["patch_pos"][:, 1:2], weights["patch_pos"][:, 1:]], dim=1)
    assert_same(dict(model.state_dict()), {**start, **weights, **new, "patch_pos": positions})


@pytest.mark.parametrize("size, grid", [(64, (4, 4)), ((96, 32), (6, 2))])
def test_from_distilled_to_plain(save, size, grid):
    distilled = shaken(small("tnt_ti_distilled")).state_dict()
    model = load(save(distilled), img_size=size)
    kept = {name: tensor for name, tensor in distilled.items() if "dist" not in name}
    positions = resampled(torch.cat([kept["patch_pos"][:, :1], kept["patch_pos"][:, 2:]], 1), grid, (4, 4))
    assert_same(model.state_dict(), {**kept, "patch_pos": positions})


def test_from_distilled_to_distilled_of_another_size_and_head(save):
    distilled = shaken(small("tnt_ti_distilled"))
    file = save(distilled.state_dict())
    assert_same(load(file, "tnt_ti_distilled").state_dict(), distilled.state_dict())
    state = load(file, "tnt_ti_distilled", num_classes=3, img_size=(32, 48)).state_dict()
    assert torch.equal(state["patch_pos"], resampled(distilled.patch_pos, (2, 3), (4, 4), 2))
    assert torch.equal(state["dist_token"], distilled.dist_token)
    assert state["head.weight"].shape == state["head_dist.weight"].shape == (3, 24)


CHANGES = [{}, dict(num_classes=7), dict(img_size=(32, 80)), dict(in_chans=1), dict(dynamic_img_size=True)]


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_ti_distilled"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_feature_maps_of_loaded_weights(save, name, change):
    trained = shaken(small(name)).state_dict()
    file = save(as_released(trained) if name == "tnt_ti" else trained)
    whole = load(file, name, **change)
    maps = load(file, name, features_only=True, out_indices=(0, 1), **change)
    images = some_images(change.get("img_size", 64), chans=change.get("in_chans", 3))
    _, expected = run(whole.forward_intermediates, images)
    found = run(maps, images)
    assert [tuple(one.shape) for one in found] == [(2, 24, images.shape[2] // 16, images.shape[3] // 16)] * 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


# -------------------------------------------------------------------------------------------------- what the log says


def test_the_log_names_what_was_resized_new_and_skipped_in_one_block(save, weights, logged):
    file = save(as_released(weights))
    model = load(file, "tnt_ti_distilled", num_classes=7, img_size=(32, 48), in_chans=1)
    (block,) = logged()
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


def test_the_log_is_one_line_where_nothing_changed(save, weights, logged):
    file = save(weights)
    load(file)
    assert logged() == [f"{file}: {len(weights)} tensors loaded as they are"]


def test_the_log_does_not_name_published_weights_that_were_not_read(weights, logged):
    small("tnt_s", pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(weights)))
    assert logged() == [f"state dict: {len(weights)} tensors loaded as they are"]


# ----------------------------------------------------------------------------------------------------------- refusals


def of_timm(name, **kwargs):
    return timm.create_model(name, **kwargs).state_dict()


def small_weights(**kwargs):
    return small(**kwargs).state_dict()


OTHER_NETWORKS = {
    "ResNet": (
        lambda: of_timm("test_resnet"),
        "not a TNT: it has no pixel_embed.proj.weight among its 92 tensors (conv1.0.weig",
    ),
    "DeiT": (lambda: of_timm("deit_tiny_patch16_224", depth=1), "not a TNT: it has no blocks.0.norm_out.weight among"),
    "legacy": (
        lambda: of_timm("tnt_s_legacy_patch16_224", **SMALL),
        "timm's tnt_s_legacy_patch16_224, which is another network",
    ),
    "SE": (lambda: small_weights(se=True), "another TNT: with unknown blocks.0.se.norm.weight"),
    "shallower": (lambda: small_weights(depth=1), "another TNT: without blocks.1.norm_in.weight"),
    "deeper": (lambda: small_weights(depth=3), "another TNT: with unknown blocks.2.norm_in.weight"),
    "sparser": (lambda: small_weights(inner_blocks=(2,)), "another TNT: without blocks.0.norm_in.weight"),
    "positions": (lambda: small_weights(pos_embed="word"), "another TNT: without patch_pos"),
    "bias": (lambda: small_weights(qkv_bias=True), "another TNT: with unknown blocks.0.attn_in.qk.bias"),
    "wider": (lambda: small_weights(embed_dim=48), "cls_token is (1, 1, 48) instead of (1, 1, 24)"),
    "words": (lambda: small_weights(first_stride=2), "pixel_pos is (1, 6, 8, 8) instead of (1, 6, 4, 4)"),
    "number": (lambda: {**small_weights(), "norm.bias": 0.0}, "in which norm.bias is float instead of (24,)"),
    "none": (
        lambda: {**small_weights(), "patch_pos": None},
        "in which patch_pos is NoneType instead of (1, 17, 24)",
    ),
    "training": (
        lambda: {"epoch": 3, "optimizer": {}},
        "not a TNT: it has no pixel_embed.proj.weight among its 2 tensors",
    ),
    "empty": (dict, "not a TNT: it has no pixel_embed.proj.weight among its 0 tensors"),
}


@pytest.mark.parametrize("other", OTHER_NETWORKS)
def test_weights_of_another_network_are_refused_with_the_reason(save, other):
    content, reason = OTHER_NETWORKS[other]
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
def test_a_strict_load_says_when_adapting_helps(save, weights, change):
    file = save(as_released(weights))
    with pytest.raises(RuntimeError, match="size mismatch for") as refusal:
        small(checkpoint_path=file, **change)
    assert "let the weights be adapted: timm.create_model(..., pretrained=True, pretr" in str(refusal.value)
    load(file, **change)  # the advice


@pytest.mark.parametrize("change", [dict(depth=3), dict(se=True)], ids=str)
def test_a_strict_load_does_not_advise_adapting_when_that_fails(save, weights, change):
    with pytest.raises(RuntimeError, match="Missing key") as refusal:
        small(checkpoint_path=save(as_released(weights)), **change)
    assert "adapted" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path, caplog):
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
def test_without_a_network_the_error_says_what_to_download_and_how_to_pass_it(offline, name):
    with pytest.raises(RuntimeError) as refusal:
        timm.create_model(name, **offline)
    message = str(refusal.value)
    assert message.startswith(f"{name}: the published weights could not be fetched (") and "\n" not in message
    assert f"https://huggingface.co/{PUBLISHED[name]}/resolve/main/model.safetensors" in message
    overlay = "pretrained_cfg_overlay=dict(file='model.safetensors')"
    for remedy in (
        f"timm.create_model({name!r}, pretrained=True, {overlay})",
        "train.py --pretrained-path model.safetensors",
        "checkpoint_path='model.safetensors'",
    ):
        assert remedy in message


@pytest.mark.parametrize("name", [name for name in (*VARIANTS, *DISTILLED) if name not in PUBLISHED])
def test_names_without_published_weights_say_so(offline, name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}. Use `pretrained=False`"):
        timm.create_model(name, **offline)


@pytest.mark.parametrize("name", ["tnt_s", "tnt_ti"])
def test_the_error_for_other_weights_does_not_name_the_published_ones(offline, name):
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
    trained["patch_pos"] = resampled(trained["patch_pos"], grid, (14, 14))
    assert_same(model.state_dict(), trained)
    assert timm.create_model(name, pretrained=True, depth=1, num_classes=7, in_chans=1).head.out_features == 7


# ------------------------------------------------------------------------------------------------- folders and the hub


def test_a_saved_folder_loads_with_another_head_size_and_number_of_channels(tmp_path, logged):
    model = shaken(small())
    save_for_hf(model, tmp_path)
    changed = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, img_size=(96, 32), in_chans=4)
    state = changed.state_dict()
    same = [name for name in state if name not in (*HEAD, "patch_pos", CONV)]
    assert_same({name: state[name] for name in same}, {name: model.state_dict()[name] for name in same})
    assert torch.equal(state["patch_pos"], resampled(model.patch_pos, (6, 2), (4, 4)))
    assert torch.equal(state[CONV], adapt_input_conv(4, model.state_dict()[CONV], base_chans=3))
    assert state["head.weight"].shape == (3, 24)
    assert logged()[-1].startswith(f"{tmp_path}: {len(same)} tensors loaded as they are")


def test_a_model_changed_after_its_creation_is_saved_as_it_is_now(tmp_path):
    model = shaken(small())
    model.set_input_size((32, 96))
    model.reset_classifier(4, "avg")
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.pixel_embed.img_size == (32, 96) and again.num_classes == 4 and again.global_pool == "avg"
    assert torch.equal(run(again, some_images((32, 96))), run(model, some_images((32, 96))))


def test_a_model_goes_to_the_hub_and_comes_back(monkeypatch, tmp_path):
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, **_):
            self.create_repo = lambda repo_id, **_: SimpleNamespace(repo_id=repo_id)
            self.file_exists = lambda **_: False

        def upload_folder(self, folder_path, repo_id, **_):
            shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr("timm.models._hub.HfApi", Api)
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(hub / repo_id / filename)
    )
    model = shaken(small("tnt_s_se", num_classes=4))
    config = dict(label_names=["rose", "iris", "lily", "aster"])
    push_to_hf_hub(model, "someone/flowers", model_config=config, data_config=dict(crop_pct=0.8))
    files = {"README.md", "config.json", "model.safetensors", "pytorch_model.bin"}
    assert {path.name for path in (hub / "someone/flowers").iterdir()} == files
    again = timm.create_model("hf-hub:someone/flowers", pretrained=True).eval()
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(run(again, some_images()), run(model, some_images()))
    assert again.pretrained_cfg["label_names"] == config["label_names"] and again.pretrained_cfg["crop_pct"] == 0.8
