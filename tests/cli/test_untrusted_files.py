"""Nothing that a file says starts a program, reaches the network or reads what the user did not name (SECURITY.md)."""

import json
import os
import pickle
import shutil

import pytest
import timm
import torch

from tnt_timm.checkpoints import description, file_format
from tnt_timm.commands.train import main as train
from tnt_timm.errors import UserError

QUICK = "-b 90 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --workers 0".split()


class Touch:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    assert train(["--dataset", "digits", *tiny, *QUICK, "--output", str(output), "--experiment", "run"]) == 0
    return output / "run"


@pytest.fixture
def marker(tmp_path):
    yield tmp_path / "marker"
    assert not (tmp_path / "marker").exists(), "a file has started a program"


@pytest.fixture
def pickled(tmp_path, marker):
    path = tmp_path / "touch.pkl"
    path.write_bytes(pickle.dumps(Touch(marker)))
    return path


@pytest.fixture
def forged(run, tmp_path):
    """Return a copy of the run's checkpoint with other things said in it."""

    def forged(**changes):
        state = file_format.read(run / "model_best.pth.tar")
        for key, value in changes.items():
            state[key] = {**state[key], **value} if isinstance(value, dict) else value
        file_format.write(tmp_path / "forged.pth.tar", state)
        return tmp_path / "forged.pth.tar"

    return forged


@pytest.fixture
def image(cut, tmp_path):
    cut(0).save(tmp_path / "image.png")
    return tmp_path / "image.png"


DATA = {  # what the settings of a checkpoint may not ask for -> the flag that overrides it
    "program": (dict(dataset="wds/x", data_dir="pipe:touch MARKER #"), "--data-dir"),
    "program in a split": (dict(dataset="wds/x", data_dir="DIR", val_split="pipe:touch MARKER #.tar|9"), "--val-split"),
    "parent": (dict(dataset="", data_dir="DIR", val_split="../x"), "--val-split"),
    "address": (dict(dataset="wds/x", data_dir="https://127.0.0.1:9/x"), "--data-dir"),
    "cloud": (dict(dataset="wds/x", data_dir="s3://bucket/x"), "--data-dir"),
    "hub": (dict(dataset="hfds/someone/data", data_dir=""), "--dataset"),
    "pickle": (dict(dataset="", data_dir="DIR", class_map="DIR/touch.pkl"), "--class-map"),
    "no text": (dict(dataset="", data_dir=["DIR"]), "--data-dir"),
    "workers": (dict(workers=100_000), "--workers"),
    "threads": (dict(threads=1_000_000), "--threads"),
    "batch": (dict(batch_size=10**9), "--batch-size"),
}


@pytest.mark.parametrize("config, flag", DATA.values(), ids=DATA)
def test_data_and_resources(run_validate, forged, tmp_path, marker, pickled, config, flag):
    def here(value):
        return value.replace("DIR", str(tmp_path)).replace("MARKER", str(marker)) if isinstance(value, str) else value

    out = run_validate(forged(config={key: here(value) for key, value in config.items()}))
    assert out.status == 1 and "forged.pth.tar: " in out.error and out.error.endswith(f"pass {flag}")


def test_figures_read_no_data_of_a_program(run_script, forged, tmp_path, marker):
    path = forged(config=dict(dataset="wds/x", data_dir=f"pipe:touch {marker} #"))
    out = run_script("figures", "tsne-classes", path, "--output", tmp_path / "f.png")
    assert out.status == 1 and out.error.endswith("pass --data-dir")


def test_data_is_said_before_it_is_read_and_downloads_nothing(run_validate, forged, tmp_path, capfd):
    config = dict(dataset="torch/cifar10", data_dir=str(tmp_path), dataset_download=True)
    out = run_validate(forged(config=config))
    assert out.status == 1 and f"reading {tmp_path}, which {tmp_path / 'forged.pth.tar'} names" in out.out
    assert "not found" in out.error and not list(tmp_path.glob("cifar*"))


def test_what_a_file_says_of_other_files_is_nothing(run_validate, run, forged, pickled):
    config = dict(pretrained=True, pretrained_path=str(pickled), initial_checkpoint=str(pickled), resume=str(pickled))
    out = run_validate(forged(config={**config, "kd_model_name": "hf-hub:someone/model", "model": "hf-hub:a/b"}))
    assert out.status == 0 and out.out.splitlines()[-1] == run_validate(run).out.splitlines()[-1]


NETWORKS = {
    "hub": dict(arch="hf-hub:someone/model"),
    "folder": dict(arch="local-dir:DIR"),
    "path": dict(arch="../../tnt_ti"),
    "no text": dict(arch=["tnt_ti"]),
    "file": dict(model_kwargs=dict(checkpoint_path="DIR/touch.pkl")),
    "overlay": dict(model_kwargs=dict(pretrained_cfg_overlay=dict(file="DIR/touch.pkl"))),
    "published": dict(model_kwargs=dict(pretrained=True)),
    "cache": dict(model_kwargs=dict(cache_dir="DIR")),
    "unknown": dict(model_kwargs=dict(command="touch")),
    "depth": dict(model_kwargs=dict(depth=200_000)),
    "width": dict(model_kwargs=dict(embed_dim=960_000)),
    "image": dict(model_kwargs=dict(img_size=160_000)),
    "number": dict(model_kwargs=dict(depth=10**12)),
    "pixels": dict(preprocessing=dict(input_size=(3, 10**5, 10**5))),
    "deviation": dict(preprocessing=dict(std=(0.0, 0.0, 0.0))),
    "not finite": dict(preprocessing=dict(mean=(float("nan"),) * 3)),
    "classes": dict(classes=[1, 2, 3]),
}


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
def test_networks(run_script, forged, image, tmp_path, marker, pickled, changes):
    changes = json.loads(json.dumps(changes).replace("DIR", str(tmp_path)))
    out = run_script("predict", forged(**changes), image)
    assert out.status == 1 and ("forged.pth.tar: " in out.error or "unexpected keyword" in out.error)


def test_class_names_reach_the_terminal_escaped(run_script, forged, image):
    out = run_script("predict", forged(classes=["\x1b]0;title\x07"] * 10), image)
    assert out.status == 0 and "\x1b" not in out.out and "\\x1b]0;title\\x07" in out.out


@pytest.mark.parametrize(
    "changes", [NETWORKS["hub"], NETWORKS["file"], NETWORKS["depth"]], ids=["hub", "file", "depth"]
)
def test_every_command_refuses_them(run_script, forged, tmp_path, marker, pickled, changes):
    path = forged(**json.loads(json.dumps(changes).replace("DIR", str(tmp_path))))
    refusal = f"{path}: "
    assert refusal in run_script("validate", path).error
    assert refusal in run_script("export", path, "--output", tmp_path / "out").error
    assert refusal in run_script("figures", "positions", path, "--output", tmp_path / "f.png").error
    out = run_script(
        "validate_all", path, "--dataset", "digits", "--results-file", tmp_path / "r.csv", "--workers", "0"
    )
    assert out.status == 1 and f"failed: {path}: {refusal}" in out.out


FOLDERS = {
    "hub": dict(architecture="hf-hub:someone/model"),
    "file": dict(model_args=dict(checkpoint_path="touch.pkl")),
    "depth": dict(model_args=dict(depth=200_000)),
    "pixels": dict(pretrained_cfg=dict(input_size=[3, 10**5, 10**5])),
}


def folder(run, path, **changes):
    path.mkdir()
    shutil.copy(run / "model.safetensors", path)
    config = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("changes", FOLDERS.values(), ids=FOLDERS)
def test_folders_of_timm(run_script, run, tmp_path, image, changes):
    path = folder(run, tmp_path / "forged", **changes)
    for out in (
        run_script("predict", path, image),
        run_script("validate", path, "--dataset", "digits", "--workers", "0"),
        run_script("export", f"local-dir:{path}", "--output", tmp_path / "out"),
    ):
        assert out.status == 1 and f"{path}" in out.error


def test_addresses_in_a_folder_mean_nothing(run_script, run, tmp_path, pickled):
    cfg = dict(url="http://127.0.0.1:9/w.pth", hf_hub_id="someone/model", file=str(pickled), custom_load=True)
    path = folder(run, tmp_path / "forged", pretrained_cfg=cfg)
    out = run_script("validate", path, "--dataset", "digits", "--workers", "0")
    assert out.status == 0 and out.out.splitlines()[-1] == run_script("validate", run).out.splitlines()[-1]


def test_a_pickle_in_a_folder(run_script, run_train, run, tmp_path, image, tiny, pickled):
    path = folder(run, tmp_path / "forged")
    (path / "model.safetensors").unlink()
    shutil.copy(pickled, path / "pytorch_model.bin")
    assert "refused" in run_script("predict", path, image).error
    digits = ["--dataset", "digits", *QUICK, "--output", tmp_path / "out"]
    assert "refused" in run_train(*digits, *tiny, "--kd-model-name", f"local-dir:{path}").error
    assert "refused" in run_train(*digits, "--experiment", "run", "--model", f"local-dir:{path}", "--pretrained").error
    assert "refused" in run_train(*digits, *tiny, "--pretrained-path", path).error


@pytest.mark.parametrize("setting", ["--resume", "--initial-checkpoint", "--pretrained-path", "planted"])
def test_training(run_train, tiny, tmp_path, pickled, setting):
    argv = ["--dataset", "digits", *tiny, *QUICK, "--output", tmp_path, "--experiment", "run"]
    if setting == "planted":
        (tmp_path / "run").mkdir()
        shutil.copy(pickled, tmp_path / "run" / "last.pth.tar")
    else:
        argv += [setting, pickled]
    out = run_train(*argv)
    assert out.status == 1 and "refused" in out.error


def test_check_runs_no_class_map(run_script, make_folder, pickled):
    assert run_script("check", make_folder(), "--class-map", pickled, "-j", "0").status == 1


def test_a_list_of_models_that_lists_itself(run_script, tmp_path):
    (tmp_path / "a.txt").write_text(f"{tmp_path}/b.txt\n")
    (tmp_path / "b.txt").write_text(f"{tmp_path}/a.txt\n")
    out = run_script("validate_all", tmp_path / "a.txt", "--dataset", "digits", "--results-file", tmp_path / "r.csv")
    assert out.status == 2 and "a.txt: lists itself" in out.error


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "levit_128"])
def test_the_size_of_a_network_is_compared_with_its_file(name):
    """Without memory for it, and without a change of the random numbers."""
    tensors = list(timm.create_model(name).state_dict().values())
    before = torch.get_rng_state()
    description.check_size(lambda: timm.create_model(name), tensors, "w.pth")
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(UserError, match="larger than the file"):
        description.check_size(lambda: timm.create_model(name, num_classes=10**6), tensors, "w.pth")
