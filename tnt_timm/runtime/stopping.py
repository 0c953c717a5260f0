"""Being asked to stop: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGUSR2, which launchers and SLURM send before they kill.

Inside a step a signal is only noted; the loop asks at the end of each update, saves and leaves. Where nothing would be lost,
as in the first step, which may compile for minutes, or in evaluation, which follows a save, it ends the work at once. So does
a second Ctrl-C wherever it comes: whoever gives it does not want to wait for the end of the update.
"""

import contextlib
import os
import signal
from typing import Iterator, Optional

from tnt_timm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.signal: Optional[signal.Signals] = None
        self.at_once = False
        self.impatient = False  # the work was ended where something is lost
        self.pid = os.getpid()

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, number: int, frame: object) -> None:
        if os.getpid() != self.pid or self.impatient:  # a child that has not yet set its own handlers; already leaving
            return
        self.impatient = self.signal is not None and number == signal.SIGINT and not self.at_once
        self.signal = signal.Signals(number)
        if self.at_once or self.impatient:
            raise Stopped(self.signal)

    def obey(self) -> None:
        """Raises Stopped where a signal was noted."""
        if self.signal is not None:
            raise Stopped(self.signal)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """For as long as this lasts, the signals are noted. Once asked, the process leaves, and further ones change nothing:
        a scheduler and a launcher may both send one."""
        before = {number: signal.signal(number, self.note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if self.signal is None else signal.SIG_IGN)

    @contextlib.contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """For as long as this lasts, a signal (one noted before as well) raises Stopped where the process stands.

        There are places where Python swallows it, as `__del__` and the callbacks of a fork; then it comes at the end.
        """
        self.obey()
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False
        self.obey()
