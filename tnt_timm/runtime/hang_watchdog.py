"""Print stack traces when a rank makes no progress for a long time."""

import contextlib
import sys
import threading
import time
import traceback
from typing import Iterator

from tnt_timm.console import write_line
from tnt_timm.runtime.background_thread import beside


class Watchdog:
    """Print the stack of every thread if `feed` is not called for `patience_s` seconds, and again after each such time.

    It runs from before the ranks connect, so it also shows a rank that waits for others, or for its data. All ranks that
    wait in a collective look alike: the one that stands somewhere else is the cause.

    Args:
        name: of the process, in each line: ranks may print at the same time (faulthandler cannot add it).
        patience_s: seconds until the first step, and from one step to the next.
    """

    def __init__(self, name: str, patience_s: float):
        self.name = name
        self.patience_s = patience_s
        self.feed()

    def feed(self) -> None:
        """Report progress."""
        self.last_s = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the context ends."""
        self.feed()
        with beside("watchdog", self._watch):
            yield

    def _watch(self, done: threading.Event) -> None:
        printed_s = self.last_s
        while not done.wait(min(self.patience_s / 4, 5.0)):
            now = time.monotonic()
            if now - max(self.last_s, printed_s) >= self.patience_s:
                printed_s = now
                title = f"warning: {self.name}: no step for {now - self.last_s:.0f} s; current stacks:"
                write_line("\n".join([title, *self._stacks()]), sys.stderr)

    def _stacks(self) -> Iterator[str]:
        """Yield the lines of every thread's stack but this one's."""
        frames = sys._current_frames()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and thread.ident in frames:
                yield f"{self.name}: thread {thread.name}:"
                for line in "".join(traceback.format_stack(frames[thread.ident])).rstrip().split("\n"):
                    yield f"{self.name}: {line}"
