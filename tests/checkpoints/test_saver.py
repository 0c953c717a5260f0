"""No checkpoint is lost: interrupted writes, damaged files, full disks, and a save that fails once or always."""

import io
import os
import random
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import Callable, List

import pytest
import torch

from tnt_timm import atomic_files
from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError
from tnt_timm.training.trainer import Trainer

SMALL = ["--model", "tnt_ti", "--img-size", "32", "--model-kwargs", "depth=1", "embed_dim=12", "inner_dim=4"]
SMALL += ["num_heads_inner=2", "num_heads_outer=3", "--workers", "0", "--device", "cpu", "-b", "24", "--epochs", "2"]
SMALL += ["--lr", "1e-2", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--model-ema", "--model-ema-decay", "0.9"]
SMALL += ["--drop", "0.1", "--aa", "rand-m9-mstd0.5-inc1"]  # one update an epoch


@pytest.fixture
def train(run_train, make_folder, tmp_path) -> Callable:
    """Train; return the outcome and the run's folder."""
    data = make_folder()

    def train(name: str, *more: object, status: int = 0):
        out = run_train(data, *SMALL, "--output", tmp_path, "--experiment", name, *more)
        assert out.status == status, out.out + out.err
        return out, tmp_path / name

    return train


def test_the_log_says_how_long_training_waited_for_saves(train, monkeypatch):
    """One save at the start and two per epoch. On a slow disk, a save waits until the previous one is written."""
    line = re.compile(r"^saved (\d+) times, for which training waited (\S+) s \((\S+) %\)$", re.M)
    write = file_format.write
    fast = line.search(train("fast")[0].out)
    monkeypatch.setattr(file_format, "write", lambda *args, **options: (time.sleep(0.3), write(*args, **options)))
    slow = line.search(train("slow")[0].out)
    assert fast[1] == slow[1] == "5"
    assert float(slow[2]) > float(fast[2]) + 0.3 and 0 < float(slow[3]) < 100


@pytest.fixture
def straight(train) -> Path:
    """The folder of an uninterrupted run."""
    return train("straight")[1]


def test_killed_at_every_moment_of_every_write(train, straight, assert_same_bits, tmp_path, monkeypatch):
    """Copy what a kill would leave, with half of a checkpoint written, and before and after each rename. Then resume."""
    kept: List[Path] = []
    seen: List[dict] = []

    def keep() -> None:
        files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "run.json"}
        if files not in seen:
            seen.append(files)
            kept.append(Path(shutil.copytree(tmp_path / "run", tmp_path / f"moment{len(kept)}")))

    def save(state, file) -> None:
        buffer = io.BytesIO()
        real_save(state, buffer)
        content = buffer.getvalue()
        file.write(content[: len(content) // 2])
        file.flush()
        keep()
        file.write(content[len(content) // 2 :])

    def replace(source, target) -> None:
        keep()
        real_replace(source, target)
        keep()

    real_save, real_replace = torch.save, os.replace
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr(os, "replace", replace)
        _, folder = train("run")
    assert_same_bits(straight, folder)
    between = [f for f in kept if (f / "previous.pth.tar").exists() and not (f / "last.pth.tar").exists()]
    halves = [f for f in kept for path in f.glob("*.pth.tar.tmp") if not zipfile.is_zipfile(path)]
    assert len(between) == 4 and len(halves) >= 6  # five saves, the first without an older file, and the best
    for folder in kept:
        train(folder.name)
        assert_same_bits(straight, folder)
        assert not list(folder.glob("*.tmp")), folder


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "one bit flipped": lambda content: flipped(content, len(content) // 2),
    "first bit flipped": lambda content: flipped(content, 0),
    "a record becomes a folder": lambda content: flipped(content, content.index(b"PK\1\2") + 38, 4),
    "emptied": lambda content: b"",
    "cut after three bytes": lambda content: content[:3],
    "zeros": lambda content: bytes(len(content)),
    "noise": lambda content: random.Random(0).randbytes(len(content)),
}


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def flip_middle(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))


def warning_of(out) -> str:
    """The only one."""
    (warning,) = [line for line in out.out.splitlines() if line.startswith("warning: ")]
    return warning


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(train, straight, assert_same_bits, tmp_path):
    for number, (kind, damage) in enumerate(DAMAGE.items()):
        folder = shutil.copytree(straight, tmp_path / str(number))
        bad = damage((folder / "last.pth.tar").read_bytes())
        (folder / "last.pth.tar").write_bytes(bad)
        out, _ = train(folder.name)
        warning = warning_of(out)
        assert f"{folder}/last.pth.tar: " in warning and "damaged" in warning, (kind, warning)
        assert warning.endswith("resuming from previous.pth.tar instead of last.pth.tar")
        assert f"resuming from {folder}/previous.pth.tar: 1 of 2 epochs are done" in out.out
        assert (folder / "last.pth.tar.damaged").read_bytes() == bad
        assert_same_bits(straight, folder)


def test_two_damaged_checkpoints_are_one_error_and_stay_as_they_are(train, straight):
    for name in ("last.pth.tar", "previous.pth.tar"):
        (straight / name).write_bytes((straight / name).read_bytes()[:-1000])
    before = {path.name: path.read_bytes() for path in straight.iterdir() if path.name != ".lock"}
    out, _ = train("straight", status=1)
    assert f"{straight}/last.pth.tar: not a readable checkpoint (truncated or damaged?)" in out.error
    assert {path.name: path.read_bytes() for path in straight.iterdir() if path.name != ".lock"} == before


def test_the_start_of_the_epoch_is_a_third_checkpoint_and_costs_no_space(
    train, straight, assert_same_bits, monkeypatch
):
    """At an epoch's end it is a link to the last one, or a copy if the file system has no links."""
    start = "epoch_start.pth.tar"
    assert (straight / start).samefile(straight / "last.pth.tar")

    def no_links(*names) -> None:
        raise OSError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_links)
        _, folder = train("copied")
    assert not (folder / start).samefile(folder / "last.pth.tar")
    for name in ("last.pth.tar", "previous.pth.tar"):
        (folder / name).write_bytes(flipped((folder / name).read_bytes(), 1000))
    out, _ = train("copied")
    assert out.out.count("resuming from epoch_start.pth.tar instead of ") == 2
    assert "already finished: 2 epochs" in out.out
    shutil.copy(folder / start, folder / "last.pth.tar")
    assert_same_bits(straight, folder)


LOSSES = {"missing": Path.unlink, "damaged": flip_middle}


@pytest.mark.parametrize("kind", LOSSES)
def test_lost_best_weights_are_restored_from_a_checkpoint_of_their_epoch(train, assert_same_bits, monkeypatch, kind):
    """For a finished run from the last one. For one that was stopped in an evaluation, from the previous one."""
    settings = ["--eval-metric", "loss"]  # improves after each epoch
    _, straight = train("straight", *settings)
    folder = shutil.copytree(straight, straight.with_name("finished"))
    best = folder / "model_best.pth.tar"
    LOSSES[kind](best)
    (folder / "model.safetensors").unlink()
    warning = warning_of(train("finished", *settings)[0])
    assert f"{best}: {kind}; it held epoch 2 (loss " in warning and warning.endswith("restoring it from last.pth.tar")
    assert_same_bits(straight, folder)
    assert best.with_name("model_best.pth.tar.damaged").exists() == (kind == "damaged")
    assert "warning: " not in train("finished", *settings)[0].out

    def evaluate(self):
        if self.progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    real = Trainer.evaluate_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate_epoch", evaluate)
        _, folder = train("stopped", *settings, status=75)
    LOSSES[kind](folder / "model_best.pth.tar")
    warning = warning_of(train("stopped", *settings)[0])
    assert "it held epoch 1 (loss " in warning and warning.endswith("restoring it from previous.pth.tar")
    assert_same_bits(straight, folder)


@pytest.mark.parametrize("kind", LOSSES)
def test_lost_best_weights_that_no_checkpoint_has_are_replaced_by_later_ones(train, kind):
    """If all epochs are alike, the first one is the best."""
    settings = ["--lr", "1e-30", "--min-lr", "0", "--weight-decay", "0"]
    _, folder = train("run", *settings, "--epochs", "2")
    best = folder / "model_best.pth.tar"
    assert file_format.read(best)["epoch"] == 1
    LOSSES[kind](best)
    warning = warning_of(train("run", *settings, "--epochs", "2")[0])
    assert f"{best}: {kind}; it held epoch 1 (top1 " in warning and "use last.pth.tar, or train longer" in warning
    warning = warning_of(train("run", *settings, "--epochs", "4")[0])
    assert "it held epoch 1 (top1 " in warning and "the best of the remaining epochs will replace it" in warning
    assert file_format.read(best)["epoch"] == 3
    assert "warning: " not in train("run", *settings, "--epochs", "4")[0].out


def test_a_file_damaged_on_its_way_to_the_disk_replaces_no_other(train, straight, assert_same_bits, monkeypatch):
    """A bit flips in one save; the next one is intact."""
    read_back: List[Path] = []
    real = file_format._check_whole

    def check(path: Path) -> None:
        read_back.append(path)
        if len(read_back) == 3:
            flip_middle(path)
        real(path)

    monkeypatch.setattr(file_format, "_check_whole", check)
    out, folder = train("run")
    warning = warning_of(out)
    assert (
        "cannot be written: it was damaged on its way to the disk" in warning
        and "retries at the next checkpoint" in warning
    )
    assert_same_bits(straight, folder)


def test_no_room_for_the_checkpoints_is_an_error_before_training(train, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=100_000))
    monkeypatch.setattr(Trainer, "train_step", None)
    out, folder = train("run", status=1)
    assert f"output: {folder}: 0.00 GB free" in out.error and "another --output" in out.error
    assert not list(folder.glob("*.tar*"))


def test_a_folder_that_cannot_be_written_is_an_error_before_training(train, monkeypatch):
    """For example because of a quota, which the free space does not show."""

    def full(file) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Trainer, "train_step", None)
    out, folder = train("run", status=1)
    assert "cannot be written: [Errno 28] No space left on device" in out.error


def test_a_stop_does_not_say_saved_when_the_disk_is_full(train, monkeypatch):
    """It is stopped in evaluation, and the save before it has failed."""
    real = file_format.write
    writes: List[Path] = []

    def write(path: Path, *rest, **more) -> None:
        writes.append(path)
        if len(writes) > 1:
            raise UserError(f"{path}: cannot be written: the disk is full")
        real(path, *rest, **more)

    monkeypatch.setattr(file_format, "write", write)
    monkeypatch.setattr(Trainer, "evaluate_epoch", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    out, folder = train("run", status=1)
    assert "last.pth.tar: cannot be written: the disk is full" in out.error and "stopped by" not in out.err
    assert file_format.read(folder / "last.pth.tar")["progress"]["updates"] == 0


def test_any_exception_in_the_background_is_reported(train, monkeypatch):
    monkeypatch.setattr(file_format, "_check_whole", lambda path: 1 / 0)
    out, _ = train("run", status=1)
    assert "no checkpoint was written: ZeroDivisionError: division by zero" in out.error


def test_a_kill_during_a_link_does_not_endanger_the_linked_file(tmp_path, monkeypatch):
    """The temporary file that it leaves is a link to an intact file, which the next save must not write into."""
    start, last = tmp_path / "start", tmp_path / "last"
    start.write_text("where the epoch began")
    last.write_text("old")

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill)
        atomic_files.link(start, last)
    assert last.read_text() == "old"
    atomic_files.replace_text(last, "new")
    assert (start.read_text(), last.read_text()) == ("where the epoch began", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"start", "last"}
