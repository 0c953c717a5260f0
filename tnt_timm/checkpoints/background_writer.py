"""Write checkpoints in a background thread, so that training only waits for the copy off the device."""

import contextlib
import os
import sys
import threading
from typing import Any, Callable, Optional

import torch

from tnt_timm.errors import UserError, one_line

NICE = 10  # priority of the writer: training gets the CPU first


def copied(value: Any) -> Any:
    """Copy nested dicts, lists and tuples, with their tensors on the CPU, so that training can change the originals.

    The copies from a GPU are asynchronous: synchronize the device before you use them.
    """
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
    """Run one job at a time in a thread. An error is kept until `wait` returns it."""

    def __init__(self) -> None:
        self.thread: Optional[threading.Thread] = None
        self.error: Optional[UserError] = None

    def start(self, job: Callable[[], None]) -> None:
        """Start a job, after the previous one has finished."""
        self.error = self.wait()
        thread = threading.Thread(target=self._run, args=[job], name="checkpoint writer")
        thread.start()
        self.thread = thread

    def wait(self) -> Optional[UserError]:
        """Wait until the job has finished. Return the latest error since the last call."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        return error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            if sys.platform == "linux":  # where each thread has its own priority
                with contextlib.suppress(OSError):  # the run may already have a lower one
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            job()
        except UserError as error:
            self.error = error
        except BaseException as error:  # the thread would end without anyone noticing
            self.error = UserError(f"no checkpoint was written: {type(error).__name__}: {one_line(error)}")
