"""Write a run's figures to TensorBoard event files in RUN_FOLDER/tensorboard: one scalar per column, the epoch as step.

Each start of a run adds a file. It begins with an event that makes TensorBoard drop all earlier points from the file's first
epoch on. So every epoch has one point, even if a resumed run repeats epochs or an earlier start failed to write some.

This uses TensorBoard's own RecordWriter, not torch's SummaryWriter. SummaryWriter writes in a thread, which prints a traceback if
the disk is full, and writes one record per scalar, so a killed run can leave half an epoch.
"""

import contextlib
import socket
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence, Set

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from tnt_timm.errors import one_line


class TensorBoardTracker:
    """The curves of a run, which a resumed run continues. See `open_trackers` for the arguments."""

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]], say: Callable[[str], None]):
        self.folder = folder / "tensorboard"
        self.say = say
        self.records: Optional[RecordWriter] = None
        self.next_epoch = -1  # of the open file; none yet
        self.failed = False
        shown = self._epochs_shown()
        first_missing = next((row["epoch"] for row in rows if row["epoch"] not in shown), len(rows))
        for row in rows[first_missing:]:
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        if self.failed:
            return
        epoch = row["epoch"]
        try:
            if epoch != self.next_epoch:  # the first row of this start, or the run went back to an earlier checkpoint
                self._start_file(epoch)
            values = [Summary.Value(tag=key, simple_value=value) for key, value in row.items() if key != "epoch"]
            self._write(step=epoch, summary=Summary(value=values))
            self.next_epoch = epoch + 1
        except Exception as error:
            self.failed = True  # the file may end in half a record, and readers ignore what follows that
            self.say(
                f"warning: log_tensorboard: {one_line(error)}; the run continues without it; "
                f"the same command, started again, writes the missing epochs"
            )

    def finish(self, exit_code: int, wait: bool = True) -> None:
        if self.records is not None:
            with contextlib.suppress(OSError):
                self.records.close()

    def _start_file(self, first_epoch: int) -> None:
        self.finish(0)
        self.folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names. A machine whose clock is slow must not change the order.
        second = max([int(time.time()), *(int(path.name.split(".")[3]) + 1 for path in self._files())])
        path = self.folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}"
        self.records = RecordWriter(open(path, "xb"))  # noqa: SIM115  (`finish` closes it)
        self._write(file_version="brain.Event:2")
        self._write(step=first_epoch, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **content: Any) -> None:
        self.records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self.records.flush()

    def _files(self) -> Sequence[Path]:
        return sorted(self.folder.glob("events.out.tfevents.*"))

    def _epochs_shown(self) -> Set[int]:
        """Return the epochs for which TensorBoard shows points from the files of earlier starts."""
        epochs: Set[int] = set()
        for path in self._files():
            for event in LegacyEventFileLoader(str(path)).Load():
                if event.session_log.status == SessionLog.START:
                    epochs = {epoch for epoch in epochs if epoch < event.step}
                elif event.HasField("summary"):
                    epochs.add(event.step)
        return epochs
