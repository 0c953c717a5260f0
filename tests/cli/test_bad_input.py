"""Bad input as users give it: one clear line, a non-zero status, and nothing lost."""

import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

QUICK = ["-b", "4", "--lr", "1e-3", "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "0"]


@pytest.fixture
def train(run_train, tiny, tmp_path):
    def train(*argv):
        return run_train(*tiny, *QUICK, "--output", tmp_path / "out", "--experiment", "run", *argv)

    return train


@pytest.fixture
def refusal(train, tmp_path):
    """Train with a mistake; returns the error line. Nothing may have been written."""

    def refusal(*argv, status=1):
        out = train(*argv)
        assert out.status == status and not (tmp_path / "out").exists()
        return out.error

    return refusal


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_config_mistakes_exit_2(refusal, tmp_path):
    (tmp_path / "typo.yaml").write_text("weigth_decay: 0.3\n")
    error = refusal("--config", tmp_path / "typo.yaml", status=2)
    assert "typo.yaml: weigth_decay: no such setting" in error and "weight_decay" in error
    assert "--epochs" in refusal("--epoch", "3", status=2)


def test_print_config(train, tmp_path):
    out = train("--print-config", "--log-wandb")
    assert out.status == 0 and "model: tnt_ti\n" in out.out and out.err == ""
    assert not (tmp_path / "out").exists()


def test_no_data(refusal, tmp_path):
    error = refusal()
    assert "data_dir" in error and "--dataset digits" in error
    assert f"{tmp_path / 'nowhere'}: no such folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "argv, status, part",
    [
        ("--num-classes 10", 1, "num_classes: 10: the data has 3 classes"),
        ("-b 100", 1, "batch_size: 100 .*24 training images"),
        ("--model-kwargs dpeth=3", 1, "dpeth"),
        ("--img-size 33", 1, "patch_size"),
        ("--model-kwargs in_chans=1", 1, "see model_kwargs"),
        ("--model-kwargs num_classes=7", 2, "num_classes has a setting of its own"),
        ("--gp max", 1, "global_pool 'max'"),
        ("--opt adahessian", 1, "second derivatives"),
        ("--opt adamx", 2, "opt: 'adamx': no such optimizer; perhaps you meant"),
        ("--aa magic", 1, "aa: 'magic'"),
        ("--augment-on gpu", 2, "augment_on: 'gpu': expected 'worker' or 'device'"),
        ("--augment-on device --aa augmix-m5", 1, "augment_on: device does not support AugMixAugment"),
        (
            "--augment-on device --train-interpolation lanczos",
            1,
            "device does not support the filter lanczos of train_interp",
        ),
        ("--dataset cifar", 1, "dataset: 'cifar'"),
        ("--torchcompile inductr", 1, "torchcompile: inductr"),
        ("--eval-metric top5", 2, "eval_metric: top5: every prediction is right with 3 classes"),
        ("--lr 1e-6", 2, "min_lr: 1e-05: above lr 1e-06, so the rate would rise"),
        ("--warmup-epochs 1", 2, "command line: warmup_epochs: 1: lr would not be reached"),
        ("--experiment ..", 2, "experiment: '..': cannot be the name of a folder"),
        ("--output $NOWHERE_TO_BE_FOUND/x", 2, "output: .*NOWHERE_TO_BE_FOUND is not set"),
    ],
)
def test_settings_that_do_not_fit(refusal, make_folder, argv, status, part):
    assert re.search(part, refusal(make_folder(), *argv.split(), status=status))


@pytest.mark.parametrize("model, refused", [("resnet18", True), ("tnt_ti", False)])
def test_a_batch_of_one_image_has_no_statistics(run_train, make_folder, tmp_path, model, refused):
    """Only where a batch norm sees one value per channel: at 32 pixels, the last stage of a ResNet."""
    size = ["--model", model, "--img-size", "32", "--model-kwargs", *(["depth=1", "embed_dim=24"] * (not refused))]
    out = run_train(
        make_folder(train=1, val=1), *size, *QUICK, "-b", "1", "--output", tmp_path / "out", "--experiment", "run"
    )
    assert out.status == refused and (tmp_path / "out").exists() != refused
    if refused:
        assert "batch_size: 1: the batch norm layer4.0.bn1 has one value per channel then" in out.error


def test_a_class_whose_name_is_not_utf8(train, run_validate, run_script, make_folder, tmp_path):
    data = make_folder()
    for split in ("train", "val"):
        os.rename(data / split / "ant", os.fsencode(data / split) + b"/\xe9\n\x1b[31m")
    assert train(data).status == 0
    folder = tmp_path / "out" / "run"
    assert not list(folder.glob("*.tmp"))
    assert (folder / "classes.txt").read_text().splitlines()[0] == "\\udce9\\n\\x1b[31m"
    out = run_validate(folder, "--per-class", "--confusion-matrix", tmp_path / "counts.csv")
    assert out.status == 0 and "\\udce9\\n\\x1b[31m  top-1" in out.out
    assert b"\\udce9\n\x1b[31m" in (tmp_path / "counts.csv").read_bytes()
    out = run_script("figures", "confusion", tmp_path / "counts.csv", "--output", tmp_path / "counts_drawn.png")
    assert out.status == 0, out.err


def test_a_gpu_that_does_not_exist(refusal, make_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refusal(make_folder(), "--device", "cuda")


def side_by_side(data: Path) -> None:
    for split in ("train", "val"):
        for image in sorted(data.glob(f"{split}/*/*.png")):
            image.rename(data / split / f"{image.parent.name}{image.name}")
        for folder in data.glob(f"{split}/*/"):
            folder.rmdir()


def empty_class(data: Path, split: str) -> None:
    (data / split / "dog").mkdir()
    (data / split / "dog" / "notes.txt").write_text("no image")


def deeper(data: Path) -> None:
    (data / "train/ant/inner").mkdir()
    (data / "train/ant/0.png").rename(data / "train/ant/inner/0.png")


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda data: shutil.rmtree(data / "val"), "no validation folder.*val"),
        (lambda data: shutil.rmtree(data / "train"), "no train folder"),
        (lambda data: (data / "val").rename(data / "test"), "no validation folder.*/test, pass --val-split test"),
        (lambda data: empty_class(data, "train"), "data/train: class folder dog holds no images"),
        (lambda data: empty_class(data, "val"), "data/val: class folder dog holds no images"),
        (lambda data: (data / "val/cat").rename(data / "val/dog"), "only train has cat.*only validation has dog"),
        (side_by_side, "one folder per class"),
        (deeper, "deeper than a class folder"),
    ],
)
def test_folders_that_are_no_dataset(refusal, make_folder, change, part):
    data = make_folder()
    change(data)
    assert re.search(part, refusal(data))


def test_one_folder_where_class_folders_belong(refusal, run_validate, make_folder, tiny):
    data = make_folder(classes=["images"])
    assert f"{data}/train: a single class, images: accuracy would always be 100 %" in refusal(data)
    out = run_validate(data, *tiny, "--num-classes", "1")
    assert out.status == 1 and f"{data}/val: a single class" in out.error


def test_a_mistyped_name_in_a_class_map(refusal, run_validate, make_folder, tiny, tmp_path):
    data = make_folder()
    (tmp_path / "classes.txt").write_text("ant\nBee\ncat\n")
    option = ["--class-map", tmp_path / "classes.txt"]
    assert f"class_map: {data}/train: no images of Bee; the nearest" in refusal(data, *option)
    out = run_validate(data, *tiny, "--num-classes", "3", *option)
    assert out.status == 1 and f"class_map: {data}/val: no images of Bee" in out.error


@pytest.mark.parametrize("blocker", ["file", "read-only"])
def test_an_output_folder_that_cannot_be_written(run_train, tiny, make_folder, tmp_path, blocker):
    (tmp_path / "a file").write_text("")
    output = tmp_path / "a file" if blocker == "file" else "/proc/output"
    out = run_train(make_folder(), *tiny, *QUICK, "--output", output)
    assert out.status == 1 and "cannot be written" in out.error and str(output) in out.error


def twelve_bits_in_16(path):
    Image.fromarray(np.full((40, 48), 4000, np.uint16)).save(path)


def unknown_to_its_decoder(path):
    """Pillow raises NotImplementedError."""
    Image.new("RGB", (8, 8)).save(path, "DDS")
    content = path.read_bytes()
    path.write_bytes(content[:80] + b"\4\0\0\0NONE" + content[88:])


@pytest.mark.parametrize("damage", [twelve_bits_in_16, unknown_to_its_decoder])
def test_a_validation_image_that_cannot_be_used_is_named(train, run_validate, make_folder, tmp_path, damage):
    data = make_folder()
    victim = data / "val" / "bee" / "3.png"
    damage(victim)
    out = train(data)
    assert out.status == 1 and f"{victim}: damaged validation image" in out.error and "Traceback" not in out.err
    out = run_validate("--model", "resnet18", "--num-classes", "3", data, "--device", "cpu", "--workers", "0")
    assert out.status == 1 and f"{victim}: damaged validation image" in out.error and "Traceback" not in out.err


@pytest.mark.parametrize(
    "damage",
    [truncate, lambda path: path.write_text(""), lambda path: path.write_text("I am no image"), unknown_to_its_decoder],
    ids=["truncated", "empty", "text", "unknown"],
)
def test_a_damaged_training_image_is_named_counted_and_replaced(train, make_folder, damage):
    data = make_folder()
    victim = data / "train" / "bee" / "3.png"
    damage(victim)
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
def test_damaged_validation_images_are_named_and_fixing_them_resumes(train, make_folder, number):
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
    assert out.status == 2 and "model_kwargs" in out.error
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
    assert "no such file, folder or model" in run_validate(tmp_path / "nothing.pth").error
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
