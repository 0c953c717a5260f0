"""Graceful shutdown on SIGTERM, SIGINT (Ctrl-C), SIGHUP (closed terminal), and SIGUSR1 and SIGUSR2, which SLURM may send.

During a step, a signal is only recorded: the training loop checks for it after each update, saves and exits. Where no work
would be lost (in the first step, which may compile for minutes, or in evaluation, which follows a save) the signal raises
`Stopped` immediately. So does a second Ctrl-C, anywhere.
"""

import contextlib
import os
import signal
from typing import Iterator, Optional, Sequence

from tnt_timm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WITHOUT_CTRL_C = tuple(number for number in SIGNALS if number != signal.SIGINT)


class StopRequest:
    """True once a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.signal: Optional[signal.Signals] = None
        self.at_once = False  # a signal raises Stopped immediately
        self.impatient = False  # a second Ctrl-C came, and work is lost
        self.pid = os.getpid()

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, number: int, frame: object) -> None:
        """Handle a signal."""
        if os.getpid() != self.pid or self.impatient:  # a forked child without handlers of its own, or already exiting
            return
        self.impatient = self.signal is not None and number == signal.SIGINT and not self.at_once
        self.signal = signal.Signals(number)
        if self.at_once or self.impatient:
            raise Stopped(self.signal)

    def obey(self) -> None:
        """Raise Stopped if a signal was recorded."""
        if self.signal is not None:
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def listening(self, signals: Sequence[int] = SIGNALS) -> Iterator[None]:
        """Handle the signals until the context ends. After a request to stop, later signals are ignored from then on:
        a scheduler and a launcher may both send one.

        SIGHUP stays ignored if it is (nohup). The others do not: a job script ignores SIGUSR2 only until this handler is set.
        """
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            signals = [number for number in signals if number != signal.SIGHUP]
        before = {number: signal.signal(number, self.note) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if self.signal is None else signal.SIG_IGN)

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Raise Stopped immediately at a signal until the context ends, and for one recorded before.

        Python swallows exceptions in some places, e.g. `__del__` and fork callbacks. Then Stopped is raised at the end.
        """
        self.obey()
        before, self.at_once = self.at_once, True
        try:
            yield
        finally:
            self.at_once = before
        self.obey()
