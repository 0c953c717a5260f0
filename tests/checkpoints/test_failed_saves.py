"""A run that cannot save: it goes on after one failure, and stops after two, with its state somewhere else."""

import contextlib
import re
import shlex
import shutil
import tempfile
import types
from pathlib import Path
from typing import Iterator

import pytest

from tnt_timm.checkpoints import file_format, saver
from tnt_timm.errors import UserError

SMALL = ["--workers", "0", "--device", "cpu", "-b", "24", "--epochs", "2", "--lr", "1e-2", "--warmup-epochs", "0"]
SMALL += ["--cooldown-epochs", "0", "--model-ema", "--model-ema-decay", "0.9", "--drop", "0.1"]  # one update an epoch


@contextlib.contextmanager
def full_after(number: int, temporary: Path) -> Iterator[None]:
    """After so many checkpoints, none can be written into the run folder."""

    def write(path: Path, *rest, **more) -> None:
        writes.append(path)
        if len(writes) > number and path.parent.name == "run":
            raise UserError(f"{path}: cannot be written: the disk is full; the old file is intact")
        real(path, *rest, **more)

    real, writes = file_format.write, []
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setattr(file_format, "write", write)
        yield


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_run_that_cannot_save_twice_stops_and_leaves_its_state_elsewhere(train, assert_same_bits, tmp_path, number):
    """After the start, the training of an epoch, its best weights, and its evaluation."""
    settings = [*SMALL, "--eval-metric", "loss"]  # improves after each epoch
    _, straight = train(*settings, name="straight")
    with full_after(number, tmp_path / "temporary files"):
        out, folder = train(*settings, status=1)
    assert out.out.count("warning: ") == 1
    rescued = Path(re.search(r"its state is in (.*last\.pth\.tar) on \S+; make room, then run", out.error)[1])
    assert rescued.is_relative_to(tmp_path / "temporary files")
    assert shlex.split(out.error)[-2:] == ["--resume", str(rescued)]
    state, own = (file_format.read(path)["progress"] for path in (rescued, folder / "last.pth.tar"))
    assert state["updates"] > own["updates"]
    out, _ = train(*settings, "--resume", rescued)
    assert f"resuming from {rescued}" in out.out
    assert_same_bits(straight, folder)
    assert "already finished" in train(*settings, "--resume", rescued)[0].out
    shutil.rmtree(folder)
    assert f"resuming from {rescued}" in train(*settings, "--resume", rescued)[0].out
    assert_same_bits(straight, folder)


def test_if_only_an_evaluation_could_not_be_saved_the_same_command_repeats_it(train, assert_same_bits, tmp_path):
    _, straight = train(*SMALL, name="straight")
    with full_after(5, tmp_path / "temporary"):
        out, folder = train(*SMALL, status=1)
    assert out.error.endswith("the run stops, with all its training saved; make room, then run the same command")
    assert not list((tmp_path / "temporary").iterdir())
    train(*SMALL)
    assert_same_bits(straight, folder)


def test_a_state_that_can_be_saved_nowhere(train, tmp_path, monkeypatch):

    def mkdtemp(prefix: str) -> str:
        raise OSError(28, "No space left on device")

    with full_after(1, tmp_path / "temporary"), monkeypatch.context() as patch:
        patch.setattr(saver, "tempfile", types.SimpleNamespace(mkdtemp=mkdtemp))
        out, _ = train(*SMALL, status=1)
    assert out.error.endswith("it cannot be saved elsewhere either: [Errno 28] No space left on device")


def test_one_failed_save_is_a_warning(train, assert_same_bits, monkeypatch):
    _, straight = train(*SMALL, name="straight")
    real, writes = file_format.write, []

    def write(path: Path, *rest, **more) -> None:
        writes.append(path)
        if len(writes) in (2, 5):
            raise UserError(f"{path}: cannot be written: the disk is full")
        real(path, *rest, **more)

    monkeypatch.setattr(file_format, "write", write)
    out, folder = train(*SMALL)
    assert out.out.count("training continues and retries at the next checkpoint") == 2
    assert_same_bits(straight, folder)
