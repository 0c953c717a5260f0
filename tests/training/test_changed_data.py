"""The data changed between two starts of a run: it says what differs, and continues only where that is meaningful."""

import json
import os
import shutil
import signal

import pytest

from tnt_timm.checkpoints import checksum, file_format
from tnt_timm.training.trainer import Trainer

QUICK = (
    "--workers 0 -b 8 --warmup-epochs 0 --cooldown-epochs 0 --sched constant --lr 0.01 --opt sgd".split()
)  # 3 updates
ALLOW = "--allow-data-change"


def grow(data, split):
    """Every class folder gets one more image."""
    for folder in (data / split).iterdir():
        shutil.copy(folder / "0.png", folder / "more.png")


@pytest.fixture
def stopped(train, monkeypatch):
    """A run of two epochs that was stopped inside the second, or in its evaluation."""

    def stopped(name="run", evaluating=False):
        def stop(self, *args):
            if self.progress.updates == 5 or (evaluating and self.progress.epoch == 1):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, *args)

        method = "evaluate_epoch" if evaluating else "train_step"
        real = getattr(Trainer, method)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, method, stop)
            return train(*QUICK, "--epochs", "2", name=name, status=75)[1]

    return stopped


@pytest.mark.parametrize("split, text", [("train", "train: 24 -> 27 images"), ("val", "validation: 12 -> 15 images")])
def test_a_finished_run_says_that_its_data_changed(train, tmp_path, split, text):
    _, folder = train(*QUICK, "--epochs", "1")
    grow(tmp_path / "data", split)
    for more in ([], [ALLOW]):
        out, _ = train(*QUICK, "--epochs", "1", *more, status=1)
        assert f"{folder}/last.pth.tar: the run is finished, but its data has changed ({text})" in out.error
        assert (
            "choose another --experiment" in out.error
            and f"more --epochs to train it further with {ALLOW}" in out.error
        )


def test_training_data_must_not_change_inside_an_epoch(stopped, train, tmp_path, assert_same_bits):
    stopped("straight"), stopped()
    grow(tmp_path / "data", "train")
    for more in ([], [ALLOW]):
        out, _ = train(*QUICK, "--epochs", "2", *more, status=1)
        assert "train: 24 -> 27 images" in out.error and "stopped inside epoch 2" in out.error
        assert "put the data back as it was" in out.error
    for image in (tmp_path / "data").rglob("more.png"):
        image.unlink()
    _, straight = train(*QUICK, "--epochs", "2", name="straight")
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    out, folder = train(*QUICK, "--epochs", "2", "--data-dir", moved)
    assert "(the images are the same)" in out.out
    assert_same_bits(straight, folder)


def test_the_best_accuracy_is_not_compared_across_validation_sets(train, tmp_path):
    _, folder = train(*QUICK, "--epochs", "2", "--eval-metric", "top1")
    grow(tmp_path / "data", "val")
    shutil.rmtree(tmp_path / "data/val/cat")
    shutil.copytree(tmp_path / "data/val/bee", tmp_path / "data/val/cat")
    out, _ = train(*QUICK, "--epochs", "4", status=1)
    assert "holds a run on other data (validation: 12 -> 15 images)" in out.error and ALLOW in out.error
    out, _ = train(*QUICK, "--epochs", "4", "--lr", "1e-30", ALLOW)
    assert "notice: the validation data changed: 12 -> 15 images" in out.out
    assert "notice: the validation data changed, so the best top1 so far" in out.out
    progress = file_format.read(folder / "last.pth.tar")["progress"]
    best = file_format.read(folder / "model_best.pth.tar")
    assert progress["best_since"] == 2 and best["epoch"] == 3 and best["metrics"]["top1"] == progress["best"]
    assert best["data"]["validation"]["images"] == 15
    assert "already finished" in train(*QUICK, "--epochs", "4", "--lr", "1e-30")[0].out


def test_in_an_evaluation_only_the_validation_set_counts(stopped, train, tmp_path):
    stopped(evaluating=True)
    grow(tmp_path / "data", "train")
    grow(tmp_path / "data", "val")
    out, _ = train(*QUICK, "--epochs", "2", status=1)
    assert "train: 24 -> 27 images; validation: 12 -> 15 images" in out.error and "inside" not in out.error
    out, folder = train(*QUICK, "--epochs", "2", ALLOW)
    assert "done: best" in out.out
    assert file_format.read(folder / "last.pth.tar")["progress"]["best_since"] == 1


def test_other_images_of_the_same_names_are_other_data(train, tmp_path):
    train(*QUICK, "--epochs", "1")
    image = tmp_path / "data/train/ant/0.png"
    shutil.copy(tmp_path / "data/train/bee/0.png", image)
    out, _ = train(*QUICK, "--epochs", "2", status=1)
    assert "other file contents" in out.error


def test_a_training_image_may_be_repaired_inside_an_epoch(stopped, train, tmp_path):
    stopped()
    (tmp_path / "data/train/ant/0.png").write_bytes((tmp_path / "data/train/ant/1.png").read_bytes() + b"x")
    out, _ = train(*QUICK, "--epochs", "2", status=1)
    assert "train: other file lengths, other file contents" in out.error and "inside" not in out.error
    assert "done: best" in train(*QUICK, "--epochs", "2", ALLOW)[0].out


def test_another_preprocessing_of_the_evaluation_starts_a_new_comparison(train):
    train(*QUICK, "--epochs", "1")
    out, folder = train(*QUICK, "--epochs", "2", "--crop-pct", "0.5")
    assert "notice: the preprocessing changed (crop_pct), so the best top1 so far" in out.out
    assert file_format.read(folder / "model_best.pth.tar")["epoch"] == 2


def test_older_checkpoints_do_not_say_which_data_they_had(train, tmp_path):
    _, folder = train(*QUICK, "--epochs", "1")
    saved = file_format.read(folder / "last.pth.tar")
    del saved["data"], saved["resumed_from"], saved["progress"]["best_since"]
    with (folder / "last.pth.tar").open("wb") as file:
        checksum.save(saved, file)
    grow(tmp_path / "data", "train")
    assert "already finished" in train(*QUICK, "--epochs", "1")[0].out
    out, _ = train(*QUICK, "--epochs", "2")
    assert "done: best" in out.out
    identity = file_format.read(folder / "last.pth.tar")["data"]
    assert identity["train"]["images"] == 27 and json.dumps(identity)
