"""Writes checkpoints beside the loop, which waits only for the copy off the device.

One job at a time: a new one waits for the one before. Trouble (a full disk) is kept for the loop to report; the files that
were there before are whole.
"""

import contextlib
import os
import sys
import threading
from typing import Any, Callable, Optional

import torch

from tnt_timm.errors import UserError, one_line

NICE = 10  # the writer's; training has the processor first where both want it


def copied(value: Any) -> Any:
    """The same nest of dicts, lists and tuples with its tensors copied to the CPU, so that training can go on changing them."""
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value.detach().clone()
        return value.detach().to("cpu", non_blocking=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value


class BackgroundWriter:
    """Runs one job at a time in a thread of its own."""

    def __init__(self) -> None:
        self.thread: Optional[threading.Thread] = None
        self.trouble: Optional[UserError] = None

    def start(self, job: Callable[[], None]) -> None:
        """Start a job when the one before it is done; of that one's trouble the next `wait` tells."""
        self.trouble = self.wait()

        def work() -> None:
            try:
                _make_way()
                job()
            except UserError as error:
                self.trouble = error
            except BaseException as error:  # whatever it is, nobody else would hear of it
                self.trouble = UserError(f"no checkpoint was written: {type(error).__name__}: {one_line(error)}")

        thread = threading.Thread(target=work, name="checkpoint writer")
        thread.start()
        self.thread = thread

    def wait(self) -> Optional[UserError]:
        """Until nothing is being written. Returns what went wrong with it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        trouble, self.trouble = self.trouble, None
        return trouble


def _make_way() -> None:
    """On Linux a thread has a priority of its own: what training leaves of the processor is enough."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # the whole run may be nicer than that already
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
