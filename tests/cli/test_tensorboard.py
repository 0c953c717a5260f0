"""Event files of a run of several processes that is killed."""

import signal

import pytest

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

KILLED = """
import os, signal
from tnt_timm.tracking.tensorboard import TensorBoardTracker
log = TensorBoardTracker.log

def killed_before_the_second(self, row):
    if row["epoch"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    log(self, row)

TensorBoardTracker.log = killed_before_the_second
"""


def test_killed_between_saving_and_logging_on_two_processes(start, argv, tmp_path):
    run = start(argv("--log-tensorboard"), 2, before=KILLED)
    assert run.end(60)[0] == -signal.SIGKILL
    run = start(argv("--log-tensorboard"), 2)
    assert run.wait() == 0, run.err
    folder = tmp_path / "run" / "tensorboard"
    assert len(list(folder.iterdir())) == 2  # the first rank alone writes, a file per start
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("eval_ema_top1")] == [0, 1]
