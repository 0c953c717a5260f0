"""Bad input as users give it: one clear line, a non-zero status, and nothing lost."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

QUICK = ["-b", "4", "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "0"]


@pytest.fixture
def train(run_train, tiny, tmp_path):
    def train(*argv):
        return run_train(*tiny, *QUICK, "--output", tmp_path / "out", "--experiment", "run", *argv)

    return train


@pytest.fixture
def nothing_created(tmp_path):
    yield
    assert not (tmp_path / "out").exists()


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.usefixtures("nothing_created")
class TestBeforeTheRun:
    """Found before anything is written."""

    def test_config_mistakes_exit_2(self, train, tmp_path):
        (tmp_path / "typo.yaml").write_text("weigth_decay: 0.3\n")
        out = train("--config", tmp_path / "typo.yaml")
        assert (
            out.status == 2 and "typo.yaml: weigth_decay: no such setting" in out.error and "weight_decay" in out.error
        )
        out = train("--epoch", "3")
        assert out.status == 2 and "--epochs" in out.error

    def test_print_config(self, train, tmp_path):
        out = train("--print-config", "--log-wandb")
        assert out.status == 0 and "model: tnt_ti\n" in out.out and out.err == ""

    def test_no_data(self, train):
        out = train()
        assert out.status == 1 and "data_dir" in out.error and "--dataset digits" in out.error

    def test_missing_data_folder(self, train, tmp_path):
        out = train(tmp_path / "nowhere")
        assert out.status == 1 and f"{tmp_path / 'nowhere'}: no such folder" in out.error

    def test_no_validation_folder(self, train, make_folder):
        data = make_folder()
        shutil.rmtree(data / "val")
        out = train(data)
        assert out.status == 1 and "no validation folder" in out.error and "val" in out.error

    def test_no_training_folder(self, train, make_folder):
        data = make_folder()
        shutil.rmtree(data / "train")
        assert "no train folder" in train(data).error

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_empty_class_folder(self, train, make_folder, split):
        data = make_folder()
        (data / split / "dog").mkdir()
        (data / split / "dog" / "notes.txt").write_text("no image")
        out = train(data)
        assert out.status == 1 and f"{data / split}: class folder dog holds no images" in out.error

    def test_classes_that_differ(self, train, make_folder):
        data = make_folder()
        (data / "val" / "cat").rename(data / "val" / "dog")
        out = train(data)
        assert out.status == 1 and "only train has cat" in out.error and "only validation has dog" in out.error

    def test_num_classes_against_the_data(self, train, make_folder):
        out = train(make_folder(), "--num-classes", "10")
        assert out.status == 1 and "num_classes: 10" in out.error and "3 classes" in out.error

    def test_images_side_by_side(self, train, make_folder):
        data = make_folder(classes=["only"])
        for split in ("train", "val"):
            for image in (data / split / "only").iterdir():
                image.rename(data / split / image.name)
            (data / split / "only").rmdir()
        assert "one folder per class" in train(data).error

    def test_batch_larger_than_the_data(self, train, make_folder):
        out = train(make_folder(), "-b", "100")
        assert "batch_size: 100" in out.error and "24 training images" in out.error

    def test_arguments_that_the_model_does_not_take(self, train, make_folder):
        assert "dpeth" in train(make_folder(), "--model-kwargs", "dpeth=3").error

    def test_an_image_size_that_does_not_fit(self, train, make_folder):
        assert "patch_size" in train(make_folder(), "--img-size", "33").error

    def test_images_deeper_than_a_class_folder(self, train, make_folder):
        data = make_folder()
        (data / "train" / "ant" / "inner").mkdir()
        (data / "train" / "ant" / "0.png").rename(data / "train" / "ant" / "inner" / "0.png")
        assert "deeper than a class folder" in train(data).error

    def test_models_that_do_not_make_logits_of_images(self, train, make_folder):
        data = make_folder()
        assert "see model_kwargs" in train(data, "--model-kwargs", "in_chans=1").error
        assert "num_classes has a setting of its own" in train(data, "--model-kwargs", "num_classes=7").error
        assert "global_pool 'max'" in train(data, "--gp", "max").error
        assert "second derivatives" in train(data, "--opt", "adahessian").error

    def test_unknown_names(self, train, make_folder):
        data = make_folder()
        assert "opt: 'adamx': no such optimizer; perhaps you meant" in train(data, "--opt", "adamx").error
        assert "aa: 'magic'" in train(data, "--aa", "magic").error
        assert "dataset: 'cifar'" in train(data, "--dataset", "cifar").error
        assert "torchcompile: inductr" in train(data, "--torchcompile", "inductr").error

    def test_a_gpu_that_is_not_there(self, train, make_folder, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "--device cpu" in train(make_folder(), "--device", "cuda").error


@pytest.mark.parametrize("blocker", ["file", "read-only"])
def test_an_output_folder_that_cannot_be_written(run_train, tiny, make_folder, tmp_path, blocker):
    (tmp_path / "a file").write_text("")
    output = tmp_path / "a file" if blocker == "file" else "/proc/output"
    out = run_train(make_folder(), *tiny, *QUICK, "--output", output)
    assert out.status == 1 and "cannot be written" in out.error and str(output) in out.error


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_training_image_is_named_counted_and_replaced(train, make_folder, damage):
    data = make_folder()
    victim = data / "train" / "bee" / "3.png"
    if damage == "truncated":
        truncate(victim)
    else:
        victim.write_text("" if damage == "empty" else "I am no image")
    out = train(data, "--epochs", "2", "--aug-repeats", "2")
    assert out.status == 0, out.err
    train_twice = train(data, "--experiment", "again", "--epochs", "3")
    assert out.out.count(f"warning: {victim}: damaged training image") <= 1  # named once
    assert f"warning: {victim}: damaged training image" in train_twice.out
    assert "1 damaged training images" in train_twice.out


def test_only_damaged_training_images(train, make_folder):
    data = make_folder()
    for image in (data / "train").rglob("*.png"):
        image.write_text("damaged")
    out = train(data)
    assert out.status == 1 and "training images cannot be read" in out.error


@pytest.mark.parametrize("number", [1, 9])
def test_damaged_validation_images_are_named_and_mending_them_continues(train, make_folder, number):
    """One of 12, and more damaged than good ones: no accuracy on something else, and no training is lost."""
    data = make_folder()
    victims = sorted((data / "val").rglob("*.png"))[:number]
    good = {victim: victim.read_bytes() for victim in victims}
    for victim in victims:
        truncate(victim)
    out = train(data)
    assert out.status == 1 and f"{victims[0]}: damaged validation image" in out.error
    assert f"the other {12 - number} of 12 images" in out.error and ("more" in out.error) == (number > 1)

    for victim, data_bytes in good.items():
        victim.write_bytes(data_bytes)
    out = train(data)
    assert out.status == 0 and "resuming from" in out.out and "top-1" in out.out


@pytest.fixture
def finished(train, make_folder, tmp_path):
    assert train(make_folder()).status == 0
    return tmp_path / "out" / "run"


class Malicious:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return Path.write_text, (self.flag, "the code was run")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint(train, run_validate, finished, damage):
    damage(finished / "model_best.pth.tar")
    out = run_validate(finished)
    assert out.status == 1 and "model_best.pth.tar" in out.error and "damaged" in out.error
    damage(finished / "last.pth.tar")
    out = train(finished.parents[1] / "data", "--epochs", "2")
    assert out.status == 0 and "last.pth.tar: " in out.out and "resuming from previous.pth.tar" in out.out
    for name in ("last.pth.tar", "previous.pth.tar"):
        damage(finished / name)
    out = train(finished.parents[1] / "data", "--epochs", "3")
    assert out.status == 1 and "last.pth.tar" in out.error and "damaged" in out.error


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "missing"])
def test_initial_checkpoints_that_are_none(train, make_folder, tmp_path, content):
    path = tmp_path / "start.pth"
    if content is not None:
        path.write_bytes(content)
    out = train(make_folder(), "--initial-checkpoint", path)
    assert out.status == 1 and str(path) in out.error


def test_an_initial_checkpoint_is_where_training_starts(train, finished):
    data = finished.parents[1] / "data"
    still = ["--sched", "constant", "--lr", "1e-30", "--weight-decay", "0", "--experiment", "second"]
    assert train(data, "--initial-checkpoint", finished / "model_best.pth.tar", *still).status == 0
    first = torch.load(finished / "model_best.pth.tar", weights_only=True)["state_dict"]
    second = torch.load(finished.parent / "second" / "last.pth.tar", weights_only=True)["state_dict"]
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_a_pickle_that_carries_code_is_never_run(run_validate, train, make_folder, tmp_path):
    flag = tmp_path / "flag"
    for suffix, write in (("zip", torch.save), ("pickle", lambda obj, path: path.write_bytes(pickle.dumps(obj)))):
        path = tmp_path / f"evil.{suffix}"
        write({"state_dict": Malicious(flag), "arch": "tnt_ti", "config": {}}, path)
        out = run_validate(path)
        assert out.status == 1 and "refused" in out.error and path.name in out.error
        out = train(make_folder(suffix), "--resume", path, "--experiment", suffix)
        assert out.status == 1 and "refused" in out.error
    assert not flag.exists()


def test_checkpoints_of_another_architecture(run_validate, train, finished, tmp_path):
    data = finished.parents[1] / "data"
    out = run_validate(data, "--model", "resnet18", "--num-classes", "3", "--checkpoint", finished / "last.pth.tar")
    assert out.status == 1 and "another architecture" in out.error and "cls_token" in out.error
    out = train(data, "--experiment", "other", "--model-kwargs", "depth=1", "--resume", finished / "last.pth.tar")
    assert out.status == 1 and "model_kwargs" in out.error
    torch.save({"weight": torch.zeros(3)}, tmp_path / "bare.pth")
    out = run_validate(tmp_path / "bare.pth")
    assert out.status == 1 and "--model NAME" in out.error
    out = train(data, "--experiment", "other", "--resume", tmp_path / "bare.pth")
    assert out.status == 1 and "no training state" in out.error


def test_validate_needs_weights_that_are_there(run_validate, finished, tmp_path):
    assert "holds no averaged weights" in run_validate(finished, "--use-ema").error
    assert run_validate(finished, "--checkpoint", finished / "last.pth.tar").status == 2
    assert "no such folder" in run_validate(finished, "--results-file", tmp_path / "nowhere" / "x.json").error


def test_validate_without_anything_to_validate(run_validate, tmp_path):
    assert run_validate().status == 2
    assert "no such checkpoint" in run_validate(tmp_path / "nothing.pth").error
    assert "no model_best.pth.tar" in run_validate(tmp_path).error
    assert "perhaps you meant tnt_s" in run_validate("--model", "tnt_x", "--dataset", "digits").error
    assert run_validate("--moodel", "x").status == 2
    assert "batch_size" in run_validate(tmp_path, "-b", "zero").error


def test_validate_on_other_classes(run_validate, finished, make_folder):
    out = run_validate(finished, "--data-dir", make_folder("other", classes=("ant", "bee", "cow")))
    assert out.status == 1 and "cat" in out.error and "cow" in out.error
    out = run_validate(make_folder("four", classes="abcd"), "--model", "resnet18")
    assert out.status == 1 and "1000 classes" in out.error and "--num-classes 4" in out.error


def test_images_of_every_mode_are_read(train, make_folder):
    data = make_folder()
    for split in ("train", "val"):
        base = Image.open(data / split / "ant" / "0.png")
        Image.fromarray(np.full((40, 48), 30000, dtype=np.uint16)).save(data / split / "bee" / "deep.png")
        base.convert("L").save(data / split / "ant" / "grey.png")
        base.convert("P").save(data / split / "bee" / "palette.png")
        base.convert("RGBA").save(data / split / "cat" / "alpha.png")
        base.convert("CMYK").save(data / split / "cat" / "cmyk.jpg")
        base.save(data / split / "ant" / "really_a_png.JPEG", format="PNG")
    out = train(data)
    assert out.status == 0 and "warning" not in out.out and "30 training and 18 validation images" in out.out
