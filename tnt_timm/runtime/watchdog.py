"""Says where a process stands that has not moved for a long time."""

import contextlib
import sys
import threading
import time
import traceback
from typing import Iterator


class Watchdog:
    """Prints the stack of every thread when `feed` was not called for a while, and again after each further while.

    It watches from before the processes meet, so that one that waits there, or for its data, is shown as well.

    A collective that waits for another process looks the same from here: the process that stands somewhere else is the
    one to look at.

    Args:
        name: of the process, for the message.
        patience_s: how long it may take to the first step, and from one step to the next.
    """

    def __init__(self, name: str, patience_s: float):
        self.name = name
        self.patience_s = patience_s
        self.last_s = time.monotonic()
        self.done = threading.Event()

    def feed(self) -> None:
        self.last_s = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.feed()
        thread.start()
        try:
            yield
        finally:
            self.done.set()
            thread.join()

    def _watch(self) -> None:
        told_s = self.last_s
        while not self.done.wait(min(self.patience_s / 4, 5.0)):
            now = time.monotonic()
            if now - max(self.last_s, told_s) < self.patience_s:
                continue
            told_s = now
            silent_s = now - self.last_s
            print(
                f"warning: {self.name}: no step for {silent_s:.0f} s; it stands here:\n{self._stacks()}",
                file=sys.stderr,
            )

    def _stacks(self) -> str:
        """Every thread's but this one's. The process is named in each line: others may print theirs at the same time."""
        frames, lines = sys._current_frames(), []
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.ident in frames:
                lines.append(f"thread {thread.name}:")
                lines += "".join(traceback.format_stack(frames[thread.ident])).rstrip().split("\n")
        return "\n".join(f"{self.name}: {line}" for line in lines)
