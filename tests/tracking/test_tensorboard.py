"""TensorBoard shows each epoch once, with the figures of summary.csv, however often a run was stopped or rolled back."""

import csv
import dataclasses
import importlib.util
import math
import signal
from pathlib import Path
from typing import Any, Dict, List

import pytest

from tnt_timm.evaluation.accuracy import Accuracy
from tnt_timm.training import trainer as trainer_module

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
from tnt_timm.tracking.tensorboard import TensorBoardTracker  # noqa: E402  (needs tensorboard)

SHORT = [
    "--no-aug",
    "--workers",
    "0",
    "-b",
    "8",
    "--lr",
    "1e-3",
    "--warmup-epochs",
    "0",
    "--cooldown-epochs",
    "0",
    "--log-tensorboard",
]


def curves(folder: Path) -> Dict[str, Dict[int, float]]:
    """What TensorBoard shows of a run folder: the value per epoch of each scalar. Fails if an epoch has two values."""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert all(len(dict(values)) == len(values) for values in points.values())
    return {tag: dict(values) for tag, values in points.items()}


def assert_each_epoch_once(folder: Path, epochs: int) -> None:
    found, table = curves(folder), list(csv.DictReader((folder / "summary.csv").open()))
    assert len(table) == epochs
    for column in set(table[0]) - {"epoch"}:
        assert found[column] == pytest.approx({int(row["epoch"]): float(row[column]) for row in table}), column
    for column in ("train_accuracy", "train_images_per_s", "train_data_wait"):
        assert list(found[column]) == list(range(epochs))


def files(folder: Path) -> List[Path]:
    return sorted((folder / "tensorboard").iterdir())


def test_a_resumed_run_continues_the_curves(train):
    ema = ["--model-ema", "--model-ema-decay", "0.9"]
    train(*SHORT, *ema, "--epochs", "1")
    _, folder = train(*SHORT, *ema, "--epochs", "3")
    assert_each_epoch_once(folder, 3)
    before = files(folder)
    out, _ = train(*SHORT, *ema, "--epochs", "3")
    assert "already finished" in out.out and files(folder) == before and len(before) == 2


def test_a_run_that_was_stopped_inside_an_epoch(train, monkeypatch):
    """By SIGTERM after the first update of the second epoch."""
    updates = trainer_module.Trainer.next_batch

    def next_batch(self, *args):
        if self.progress.updates == 4:
            signal.raise_signal(signal.SIGTERM)
        return updates(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "next_batch", next_batch)
        train(*SHORT, "--epochs", "2", status=75)
    _, folder = train(*SHORT, "--epochs", "2")
    assert_each_epoch_once(folder, 2)


def test_a_run_that_was_rolled_back(train, monkeypatch):
    """To the start of its second epoch, whose validation loss is not finite the first time."""
    calls: List[int] = []
    real = trainer_module.evaluate

    def evaluate(*args: Any) -> Dict[str, Accuracy]:
        calls.append(1)
        found = real(*args)
        return {"raw": dataclasses.replace(found["raw"], loss=math.nan)} if len(calls) == 2 else found

    monkeypatch.setattr(trainer_module, "evaluate", evaluate)
    _, folder = train(*SHORT, "--epochs", "3")
    assert len(calls) == 4
    assert_each_epoch_once(folder, 3)


def test_switched_on_for_a_finished_run_it_writes_the_epochs_of_summary(train):
    train(*SHORT, "--epochs", "2", "--no-log-tensorboard")
    out, folder = train(*SHORT, "--epochs", "2")
    assert "already finished" in out.out
    assert {tag: list(values) for tag, values in curves(folder).items()}["eval_top1"] == [0, 1]


def test_missing_package_is_one_error_before_anything_is_written(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, real=importlib.util.find_spec: (
        None if name == "tensorboard" else real(name)))  # fmt: skip
    out = run_train("--dataset", "digits", "--log-tensorboard", "--output", tmp_path / "out")
    assert out.status == 2 and not (tmp_path / "out").exists()
    assert "log_tensorboard: tensorboard is not installed; pip install 'tnt-timm[tensorboard]'" in out.error


def test_a_full_disk_is_one_warning_and_the_next_start_writes_what_is_missing(train, monkeypatch):
    def write(self: TensorBoardTracker, **content: Any) -> None:
        if content.get("step") == 1:
            self.records._writer.write(b"half a record")
            self.records.flush()
            raise OSError(28, "No space left on device")
        real(self, **content)

    real = TensorBoardTracker._write
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "_write", write)
        out, folder = train(*SHORT, "--epochs", "3")
    assert out.out.count("warning: ") == 1 and "log_tensorboard: [Errno 28] No space left on device" in out.out
    assert list(curves(folder)["eval_top1"]) == [0] and out.err == ""
    train(*SHORT, "--epochs", "3")
    assert list(curves(folder)["eval_top1"]) == [0, 1, 2]


def test_a_folder_that_cannot_be_read_or_written_is_one_warning(train, tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "tensorboard").write_text("a file")
    out, _ = train(*SHORT, "--epochs", "2")
    assert out.out.count("warning: log_tensorboard: ") == 1 and "done: best" in out.out


def tracker(folder: Path, finished: int, said: List[str]) -> TensorBoardTracker:
    return TensorBoardTracker(folder, [{"epoch": epoch, "loss": epoch / 2} for epoch in range(finished)], said.append)


def test_rows_that_were_saved_but_not_written_are_written_at_the_next_start(tmp_path):
    """A kill between the checkpoint and the log; a run that goes back, in the same start and in the next one."""
    said: List[str] = []
    first = tracker(tmp_path, 0, said)
    for epoch in (0, 1, 2, 1):
        first.log({"epoch": epoch, "loss": 10.0 + epoch})
    second = tracker(tmp_path, 4, said)
    assert curves(tmp_path)["loss"] == {0: 10, 1: 11, 2: 1, 3: 1.5}
    second.finish(0)
    third = tracker(tmp_path, 2, said)
    third.log({"epoch": 2, "loss": 20.0})
    third.finish(0)
    assert curves(tmp_path)["loss"] == {0: 10, 1: 11, 2: 20}
    tracker(tmp_path, 3, said).finish(0)
    assert len(files(tmp_path)) == 4 and said == []


def test_the_order_of_files_does_not_depend_on_the_clock(tmp_path, monkeypatch):
    clock = [2_000_000_000.0, 1_000_000_000.0]
    for number in range(2):
        monkeypatch.setattr("time.time", lambda now=clock[number]: now)
        log = tracker(tmp_path, number, [])
        log.log({"epoch": number, "loss": 1.0})
        log.finish(0)
    assert list(curves(tmp_path)["loss"]) == [0, 1]
