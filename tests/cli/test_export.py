"""scripts/export.py turns any checkpoint into a folder that needs nothing else."""

import functools
import json

import pytest
import timm
import torch

from tnt_timm.checkpoints import file_format
from tnt_timm.commands.train import main as train

SHORT = "-b 90 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --workers 0 --crop-pct 0.8".split()
DIGITS = [str(digit) for digit in range(10)]
SMALL_TNT = ["--model-kwargs", "depth=1", "--img-size", "32"]


@pytest.fixture
def run_export(run_script):
    return functools.partial(run_script, "export")


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    ema = ["--model-ema", "--model-ema-decay", "0.5"]
    assert train(["--dataset", "digits", *tiny, *SHORT, *ema, "--output", str(output), "--experiment", "run"]) == 0
    return output / "run"


def trained(run_folder, **changes):
    """Return the network of a run with the selected weights, built by hand."""
    state = file_format.read(run_folder / "model_best.pth.tar")
    model = timm.create_model(state["arch"], **{**state["model_kwargs"], **changes})
    model.load_state_dict(state["state_dict_ema"])
    return model.eval()


@torch.inference_mode()
def logits(model, size=32):
    return model(torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0)))


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def test_a_run_becomes_a_folder_for_timm(run_export, run_folder, tmp_path):
    out = run_export(run_folder, "--output", tmp_path / "out", "--formats", "timm", "torch-export")
    assert out.status == 0, out.err
    first, second = out.out.splitlines()
    assert first.startswith("timm ") and "config.json and model.safetensors" in first and "difference 0.0e+00" in first
    assert second.startswith("torch-export ") and "model.pt2" in second and " MB, largest difference " in second

    loaded = load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trained(run_folder)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "tnt_ti" and config["label_names"] == DIGITS
    assert config["pretrained_cfg"]["crop_pct"] == 0.8 and config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "model.pt2"}


def test_a_checkpoint_alone_is_enough(run_export, run_folder, tmp_path):
    (tmp_path / "moved.pth.tar").write_bytes((run_folder / "model_best.pth.tar").read_bytes())
    assert run_export(tmp_path / "moved.pth.tar", "--output", tmp_path / "out").status == 0
    assert torch.equal(logits(load(tmp_path / "out")), logits(trained(run_folder)))


def test_an_exported_folder_can_be_exported(run_export, run_folder, tmp_path):
    assert run_export(run_folder, "--output", tmp_path / "one").status == 0
    assert run_export(tmp_path / "one", "--output", tmp_path / "two").status == 0
    assert run_export(f"local-dir:{tmp_path / 'one'}", "--output", tmp_path / "three", "--timm-names").status == 0
    assert torch.equal(logits(load(tmp_path / "two")), logits(trained(run_folder)))
    three = load(tmp_path / "three")
    assert type(three) is timm.models.tnt.TNT and three.pretrained_cfg["label_names"] == DIGITS
    assert (logits(three) - logits(trained(run_folder))).abs().max() < 1e-5


def test_another_image_size(run_export, run_folder, tmp_path):
    out = run_export(run_folder, "--output", tmp_path / "out", "--img-size", 64)
    assert out.status == 0, out.err
    assert "resized  patch_pos (1, 5, 24) -> (1, 17, 24)" in out.out
    assert load(tmp_path / "out").pretrained_cfg["input_size"] == (3, 64, 64)
    expected = timm.create_model(
        "tnt_ti",
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=trained(run_folder).state_dict(), num_classes=10),
        **{**file_format.read(run_folder / "model_best.pth.tar")["model_kwargs"], "img_size": 64},
    )
    assert torch.equal(logits(load(tmp_path / "out"), 64), logits(expected.eval(), 64))


def test_without_the_head(run_export, run_folder, tmp_path):
    assert run_export(run_folder, "--output", tmp_path / "out", "--num-classes", 0).status == 0
    model = trained(run_folder)
    model.reset_classifier(0)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert "label_names" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_timm_with_the_prefixes_of_wrappers(run_export, tmp_path, prefix):
    torch.manual_seed(0)
    theirs = timm.create_model("tnt_s_patch16_224", img_size=32, depth=1, num_classes=7).eval()
    torch.save({"state_dict": {prefix + key: value for key, value in theirs.state_dict().items()}}, tmp_path / "w.pth")
    out = run_export(tmp_path / "w.pth", "--model", "tnt_s", *SMALL_TNT, "--output", tmp_path / "out")
    assert out.status == 0, out.err
    loaded = load(tmp_path / "out")
    assert (logits(loaded) - logits(theirs)).abs().max() < 1e-5  # the head has the file's seven classes
    assert loaded.state_dict().keys() == theirs.state_dict().keys()


def test_a_model_of_timm(run_export, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    torch.save({"arch": "resnet18", "state_dict": model.state_dict()}, tmp_path / "w.pth")  # as timm's train.py has it
    out = run_export(tmp_path / "w.pth", "--img-size", 48, "--output", tmp_path / "out")
    assert out.status == 0, out.err
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert load(tmp_path / "out").pretrained_cfg["input_size"] == (3, 48, 48)


@pytest.fixture
def headless(tmp_path):
    model = timm.create_model("tnt_s", img_size=32, depth=1, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "headless.pth")
    return tmp_path / "headless.pth"


def test_weights_without_a_head(run_export, headless, tmp_path):
    out = run_export(headless, "--model", "tnt_s", *SMALL_TNT, "--output", tmp_path / "out")
    assert out.status == 1 and f"error: {headless}: holds no head for tnt_s; pass --num-classes 0" in out.err
    assert not (tmp_path / "out").exists()
    argv = ("--model", "tnt_s", *SMALL_TNT, "--num-classes", 0, "--output", tmp_path / "out")
    assert run_export(headless, *argv).status == 0
    assert load(tmp_path / "out").num_classes == 0


@pytest.mark.parametrize(
    "argv, status, error",
    [
        ([], 2, "INPUT: missing; pass a run folder"),
        (["{run}"], 2, "output: missing"),
        (["{run}", "--output", "{out}", "--formats", "onxx"], 2, "'onxx': expected 'timm'"),
        (["{run}", "--output", "{out}", "--fromats", "onnx"], 2, "perhaps you meant --formats"),
        (["{run}", "--output", "{out}", "--batch-size", "1"], 2, "batch_size: 1: expected greater than or equal to 2"),
        (["{run}", "--output", "{out}", "--opset", "new"], 2, "opset: 'new': expected a whole number"),
        (["{run}", "--output", "{out}", "--num-classes", "9"], 1, "{run} is for 10 classes"),
        (["{run}", "--output", "{out}", "--pretrained"], 2, "{run} has weights of its own"),
        (["{run}", "--output", "{out}", "--img-size", "33"], 1, "img_size (33, 33) is not a multiple"),
        (["{run}", "--output", "{out}", "--model", "tnt_ti"], 1, "weights of another TNT"),
        (["{run}", "--output", "{run}/config.yaml"], 1, "config.yaml: cannot be written"),
        (["{run}/config.yaml", "--output", "{out}"], 1, "config.yaml: not "),
        (["{data}", "--output", "{out}"], 1, "neither a run folder (no model_best.pth.tar) nor timm's"),
        (["{data}/nothing", "--output", "{out}"], 2, "nothing: no such file, folder or model"),
        (["tnt_z", "--output", "{out}", "--pretrained"], 2, "perhaps you meant tnt_"),
        (["tnt_s", "--output", "{out}"], 1, "tnt_s: has no weights; pass --pretrained"),
        (["tnt_s", "--output", "{out}", "--model", "tnt_s"], 2, "tnt_s is no file of weights"),
        (["local-dir:{data}", "--output", "{out}"], 1, "nor timm's (no config.json)"),
        (["{data}/w.pth", "--output", "{out}"], 1, "does not say what model it is; pass --model NAME"),
    ],
)
def test_mistakes_are_one_line(run_export, run_folder, tmp_path, argv, status, error):
    names = dict(run=run_folder, out=tmp_path / "out", data=tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    out = run_export(*(arg.format(**names) for arg in argv))
    assert out.status == status, out
    (line,) = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert error.format(**names) in line and "Traceback" not in out.err
    assert not (tmp_path / "out").exists()
