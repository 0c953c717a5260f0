"""`--resume FILE`: obeyed or refused, and the same command continues the run after an interruption."""

import os
import shutil
import signal

import pytest

from tnt_timm.checkpoints import file_format
from tnt_timm.training.trainer import Trainer

QUICK = (
    "--workers 0 -b 24 --warmup-epochs 0 --cooldown-epochs 0 --sched constant --lr 0.1 --opt sgd".split()
)  # 1 update/epoch


@pytest.fixture
def runs(train, monkeypatch):
    """runs(name, ..., stop=UPDATES): a run, which may be asked to stop after so many updates."""

    def runs(name, *argv, stop=None, status=0):
        def train_step(self, *args):
            if self.progress.updates == stop - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, *args)

        real = Trainer.train_step
        with monkeypatch.context() as patch:
            if stop is not None:
                patch.setattr(Trainer, "train_step", train_step)
            return train(*QUICK, *argv, name=name, status=status if stop is None else 75)

    return runs


@pytest.fixture
def first(runs):
    """The last checkpoint of a finished run."""
    return runs("first", "--epochs", "2")[1] / "last.pth.tar"


def test_the_same_command_continues_after_an_interruption(runs, first, tmp_path, assert_same_bits):
    """However the file's path is written, and even if the file is gone or was copied by then."""
    command = ["--epochs", "5", "--resume", first]
    _, straight = runs("straight", *command)
    assert file_format.read(straight / "last.pth.tar")["resumed_from"]["path"] == str(first)
    runs("second", *command, stop=3)
    copy = shutil.copy(first, tmp_path / "copy.pth.tar")
    out, second = runs("second", *command[:-1], copy, stop=4)
    assert f"resuming from {tmp_path / 'out/second'}/last.pth.tar" in out.out
    first.unlink()
    out, second = runs("second", *command[:-1], os.path.relpath(first))
    assert f"resuming from {second}/last.pth.tar" in out.out
    assert_same_bits(straight, second)
    assert "already finished" in runs("second", "--epochs", "5")[0].out


def test_another_file_is_refused(runs, first):
    _, second = runs("second", "--seed", "7", "--epochs", "3", stop=2)
    before = (second / "last.pth.tar").read_bytes()
    out, _ = runs("second", "--seed", "7", "--epochs", "3", "--resume", first, status=2)
    assert f"resume: {first}: is not the file from which the run in {second} started" in out.error
    assert "leave --resume out to continue that run, or choose another --experiment" in out.error
    assert (second / "last.pth.tar").read_bytes() == before
    out, _ = runs("second", "--seed", "7", "--epochs", "3", "--resume", first.with_name("nothing"), status=1)
    assert f"{first.with_name('nothing')}: no such checkpoint" in out.error


@pytest.mark.parametrize("name", ["last.pth.tar", "epoch_start.pth.tar", ""])
def test_the_folders_own_last_checkpoint_may_be_named(runs, first, name):
    out, _ = runs("first", "--epochs", "3", "--resume", first.parent / name)
    assert f"resuming from {first}: 2 of 3 epochs are done" in out.out


def test_an_older_checkpoint_of_the_folder_is_refused(runs, first):
    previous = first.with_name("previous.pth.tar")
    out, _ = runs("first", "--epochs", "3", "--resume", previous, status=2)
    assert f"resume: {previous}: is older than last.pth.tar" in out.error
    out, other = runs("other", "--epochs", "3", "--resume", previous)
    assert f"resuming from {previous}" in out.out


def test_a_file_that_was_written_anew(runs, first):
    """The command continues its run, with a warning; a finished run is none of the new file."""
    command = ["--epochs", "5", "--resume", first]
    runs("second", *command, stop=3)
    runs("first", "--epochs", "3")
    out, second = runs("second", *command)
    warning = f"warning: {first}: has changed since the run in {second} started from it; continuing that run"
    assert warning in out.out
    out, _ = runs("second", *command, status=2)
    assert f"resume: {first}: has changed since" in out.error and "that run is finished" in out.error


def test_a_run_that_resumes_from_elsewhere_saves_before_it_trains(runs, first, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs("second", "--epochs", "3", "--resume", first)
    saved = file_format.read(first.parents[1] / "second" / "last.pth.tar")
    assert saved["resumed_from"]["path"] == str(first) and saved["progress"]["epoch"] == 2
