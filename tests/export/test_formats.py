"""Exported files load elsewhere and compute the same; a file that does not is never left behind."""

import copy
import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

import tnt_timm
from tnt_timm.errors import UserError
from tnt_timm.export import formats
from tnt_timm.export.folder import write_model_folder

CLASSES = ["ant", "bee", "cat", "dog", "eel"]
PREPROCESSING = dict(input_size=(3, 32, 32), interpolation="bilinear", crop_pct=0.8, crop_mode="center")
PREPROCESSING.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
TIMM_FILES = {"config.json", "model.safetensors"}


def make(name="tnt_s", **kwargs):
    """Return a small network in which every weight is random, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**dict(img_size=32, depth=2, num_classes=5), **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def images(batch_size=3, channels=3, size=(32, 32)):
    return torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, *args, **kwargs):
    return model(images(*args, **kwargs))


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def preprocessing_in(folder):
    found = resolve_model_data_config(load(folder))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def files_in(folder):
    return {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def shallow():
    return make(depth=1)


# ----------------------------------------------------------------- the folder


WRITERS = {
    "ours": lambda model, folder: write_model_folder(folder, model, model.state_dict()),
    "timm's": lambda model, folder: save_for_hf(model, folder),
    "timm's pickle": lambda model, folder: save_for_hf(model, folder, safe_serialization=False),
}
NETWORKS = [
    ("tnt_s", {}),
    ("tnt_s", dict(num_classes=0)),
    ("tnt_ti", dict(img_size=(48, 80), in_chans=1, num_classes=3, global_pool="avg", drop_path_rate=0.1)),
    ("tnt_ti", dict(se=True, qkv_bias=True, mlp_ratio=2.0, first_stride=2)),
    ("tnt_ti", dict(inner_blocks=(2,), pos_embed="word", dynamic_img_size=True)),
    ("tnt_ti", dict(sentence_start="zeros", pos_embed="none")),
    ("tnt_s_se", dict(drop_path_rate=0.1)),
    ("tnt_s_sparse4", dict(depth=4, inner_blocks=[1, 4])),
    ("tnt_ti_distilled", {}),
    ("tnt_ti_distilled", dict(num_classes=0)),
    ("deit_tiny_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name, kwargs", NETWORKS, ids=str)
def test_local_dir_gives_the_same_bits(tmp_path, name, kwargs, writer):
    model = make(name, **kwargs)
    WRITERS[writer](model, tmp_path / "new")
    loaded = load(tmp_path / "new")
    assert type(loaded) is type(model) and loaded.num_classes == model.num_classes
    sizes = dict(channels=kwargs.get("in_chans", 3), size=kwargs.get("img_size", (32, 32)))
    assert torch.equal(logits(loaded, **sizes), logits(model, **sizes))


def test_a_network_for_images_of_any_size(tmp_path):
    model = timm.create_model("resnet18", num_classes=5).eval()
    write_model_folder(tmp_path, model, model.state_dict(), preprocessing=PREPROCESSING)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert preprocessing_in(tmp_path) == PREPROCESSING


def test_classes_and_preprocessing_are_in_it(tmp_path, model):
    write_model_folder(tmp_path, model, model.state_dict(), CLASSES, PREPROCESSING)
    assert preprocessing_in(tmp_path) == PREPROCESSING
    assert load(tmp_path).pretrained_cfg["label_names"] == CLASSES
    assert files_in(tmp_path) == TIMM_FILES


def test_the_weights_may_differ_from_the_models(tmp_path, model):
    averaged = {name: value * 0.5 for name, value in model.state_dict().items()}
    write_model_folder(tmp_path, model, averaged)
    other = make()
    other.load_state_dict(averaged)
    assert torch.equal(logits(load(tmp_path)), logits(other))


def test_writing_changes_nothing(tmp_path, model):
    model.train()
    before = copy.deepcopy((model.pretrained_cfg, model._model_args, model._traits, model.state_dict()))
    random_state = torch.get_rng_state()
    write_model_folder(tmp_path, model, model.state_dict(), CLASSES, PREPROCESSING)
    assert (model.pretrained_cfg, model._model_args, model._traits) == before[:3]
    assert all(torch.equal(value, before[3][name]) for name, value in model.state_dict().items())
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    model.eval()


def compiled_in_parts(model):
    model = copy.deepcopy(model)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        torch.nn.ModuleDict,  # any wrapper that holds it as `module`, as DistributedDataParallel does
        lambda model: torch.compile(torch.nn.ModuleDict({"module": model}), backend="eager"),
        compiled_in_parts,
    ],
    ids=["compiled", "wrapped", "both", "compiled in parts"],
)
def test_no_wrapper_reaches_a_file(tmp_path, model, wrap):
    wrapped = wrap({"module": model}) if wrap is torch.nn.ModuleDict else wrap(model)
    assert wrapped.state_dict().keys() != model.state_dict().keys()
    write_model_folder(tmp_path, wrapped, wrapped.state_dict())
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_shared_and_strided_weights(tmp_path, model):
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    model.blocks[1].norm_in.weight = model.blocks[0].norm_in.weight
    write_model_folder(tmp_path, model, model.state_dict())
    loaded = load(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    # another memory format may be another convolution kernel, which adds in another order
    torch.testing.assert_close(logits(loaded), logits(model))


def test_weights_and_preprocessing_that_do_not_fit_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="without blocks"):
        write_model_folder(tmp_path, make(depth=3), model.state_dict())
    with pytest.raises(UserError, match=r"config.json: .*\(64, 64\).*\(32, 32\)"):
        write_model_folder(tmp_path, model, model.state_dict(), preprocessing=dict(input_size=(3, 64, 64)))
    assert not files_in(tmp_path)


def test_a_full_disk_leaves_the_old_folder_whole(tmp_path, model, monkeypatch):
    write_model_folder(tmp_path, model, model.state_dict())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr("os.fsync", full)
        write_model_folder(tmp_path, model, {name: value * 0 for name, value in model.state_dict().items()})
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert files_in(tmp_path) == TIMM_FILES


def test_the_config_is_the_one_that_timm_sends_to_the_hub(tmp_path, model):
    save_for_hf(model, tmp_path / "timms", model_config=dict(label_names=CLASSES), data_config=PREPROCESSING)
    write_model_folder(tmp_path / "ours", model, model.state_dict(), CLASSES, PREPROCESSING)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "timms"))
    assert ours == theirs


# ---------------------------------------------------------------- timm's names


@pytest.mark.parametrize(
    "name, kwargs", [("tnt_s", {}), ("tnt_ti", dict(global_pool="avg")), ("tnt_b", {}), ("tnt_s_384", {})]
)
def test_timms_names(tmp_path, name, kwargs):
    model = make(name, **kwargs)
    write_model_folder(tmp_path, model, model.state_dict(), CLASSES, timm_names=True)
    loaded = load(tmp_path)
    assert type(loaded) is timm.models.tnt.TNT
    assert loaded.pretrained_cfg["architecture"] == ("tnt_b_patch16_224" if name == "tnt_b" else "tnt_s_patch16_224")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name, kwargs, why",
    [
        ("tnt_s_se", {}, "se=True"),
        ("tnt_s", dict(mlp_ratio=2.0), "blocks.0.mlp_in.fc1.weight"),
        ("tnt_s", dict(pos_embed="word"), "pos_embed=word"),
        ("tnt_s", dict(dynamic_img_size=True), "dynamic_img_size=True"),
        ("tnt_s_distilled", {}, "tnt_s_distilled has no equal"),
    ],
)
def test_networks_without_an_equal_in_timm_are_refused(tmp_path, name, kwargs, why):
    model = make(name, **kwargs)
    with pytest.raises(UserError, match=why) as caught:
        write_model_folder(tmp_path, model, model.state_dict(), timm_names=True)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# --------------------------------------------------------------- other formats


@pytest.fixture(scope="module")
def exported(shallow, tmp_path_factory):
    """Every format of the small TNT: the folder, and the reports by format."""
    folder = tmp_path_factory.mktemp("exported")
    found = formats.export(shallow, folder, list(formats.FORMATS), CLASSES, PREPROCESSING, timm_names=True)
    return folder, {done.format: done for done in found}


def test_every_format_is_checked_at_other_batch_sizes(exported):
    folder, done = exported
    assert list(done) == list(formats.FORMATS)
    assert files_in(folder) == {*TIMM_FILES, "model.pt2", "model.onnx", "model_int8.onnx"}
    assert all(done[name].difference <= 1e-4 for name in done if name != "onnx-int8")
    assert done["onnx-int8"].difference < 0.1 * done["onnx-int8"].largest
    assert done["onnx-int8"].size < 0.3 * done["onnx"].size
    assert all(found.size == sum(file.stat().st_size for file in found.files) for found in done.values())


@pytest.mark.parametrize("batch_size", [1, 7])
def test_onnx_runs_at_any_batch_size(exported, shallow, batch_size):
    import onnxruntime

    session = onnxruntime.InferenceSession(exported[0] / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32] and session.get_outputs()[0].shape == ["batch", 5]
    found = session.run(["logits"], {"images": images(batch_size).numpy()})[0]
    assert (torch.from_numpy(found) - logits(shallow, batch_size)).abs().max() <= 1e-4


def test_files_contain_the_config(exported):
    import onnx

    config = (exported[0] / "config.json").read_text()
    assert json.loads(config)["label_names"] == CLASSES
    for name in ("model.onnx", "model_int8.onnx"):
        found = onnx.load(exported[0] / name)
        assert {entry.key: entry.value for entry in found.metadata_props}["config.json"] == config
        assert found.opset_import[0].version == formats.OPSET
    inside = {"config.json": ""}
    torch.export.load(exported[0] / "model.pt2", extra_files=inside)
    assert inside["config.json"] == config


def test_files_contain_no_paths_of_this_machine(exported):
    with zipfile.ZipFile(exported[0] / "model.pt2") as program:
        inside = [program.read(name) for name in program.namelist()]
    for content in [*inside, *(file.read_bytes() for file in exported[0].iterdir())]:
        assert str(Path(timm.__file__).parents[3]).encode() not in content
        assert str(Path(tnt_timm.__file__).parent).encode() not in content


def test_without_this_package(exported, shallow, tmp_path):
    """Programs of torch.export, and folders with timm's names, need PyTorch and timm only."""
    torch.save((images(4), logits(shallow, 4)), tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["tnt_timm"] = None  # cannot be imported
import timm, torch
images, logits = torch.load({str(tmp_path / "expected.pt")!r})
for model in (
    torch.export.load({str(exported[0] / "model.pt2")!r}).module(),
    timm.create_model({"local-dir:" + str(exported[0])!r}, pretrained=True).eval(),
):
    assert (model(images) - logits).abs().max() < 1e-5
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_another_architecture(tmp_path):
    (done,) = formats.export(make("deit_tiny_patch16_224", depth=1), tmp_path, ["onnx"], opset=20)
    assert done.difference <= 1e-4 and done.files == (tmp_path / "model.onnx",)


def test_weights_too_large_for_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PROTOBUF_LIMIT", 0)
    model = make("deit_tiny_patch16_224", depth=1)
    (done,) = formats.export(model, tmp_path, ["onnx"])
    assert [file.name for file in done.files] == ["model.onnx", "model.onnx.data"]
    assert (formats._load_onnx(None, tmp_path)(images(4)) - logits(model, 4)).abs().max() <= 1e-4


def test_a_file_that_computes_something_else_is_not_left_behind(tmp_path, model, monkeypatch):
    write_model_folder(tmp_path, make(), make().state_dict())
    old = (tmp_path / "model.safetensors").read_bytes()
    wrong = dataclasses.replace(formats.FORMATS["timm"], load=lambda job, folder: lambda x: job.model(x) * 1.01)
    monkeypatch.setitem(formats.FORMATS, "timm", wrong)
    with pytest.raises(UserError, match="timm: the file differs from the model by"):
        list(formats.export(make("tnt_ti"), tmp_path, ["timm"]))
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert files_in(tmp_path) == TIMM_FILES


def test_damaged_weights_are_not_exported(tmp_path):
    model = make(depth=1)
    with torch.no_grad():
        model.head.bias[2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        list(formats.export(model, tmp_path, ["timm"]))


def test_an_opset_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="opset: 99"):
        list(formats.export(make("deit_tiny_patch16_224", depth=1), tmp_path, ["onnx"], opset=99))
    assert not files_in(tmp_path)


def test_a_missing_package_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnx: needs onnxruntime; run: pip install"):
        list(formats.export(model, tmp_path, ["onnx"]))
