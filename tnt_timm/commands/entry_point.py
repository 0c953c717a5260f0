"""Run a command: errors and signals become one line on stderr and an exit status."""

import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, Type

import torch

from tnt_timm.atomic_files import replace_text
from tnt_timm.console import log_to_console, printable, show, usable_streams, write_line
from tnt_timm.data.workers import worker_failure
from tnt_timm.errors import INTERRUPTED, Stopped, UserError, one_line
from tnt_timm.runtime.launch import ALONE, Launch, read_launch
from tnt_timm.runtime.launcher_watch import watching_launcher
from tnt_timm.runtime.meeting import Meeting, OtherRankFailed, meet
from tnt_timm.runtime.signals import SIGNALS, WITHOUT_CTRL_C, StopRequest
from tnt_timm.settings import config
from tnt_timm.settings.schema import Group

# How long a rank stays that has lost another one: torchrun shows the error of the rank that it finds dead first.
SECOND_TO_DIE_S = 5


def run(
    command: Callable[[Any], object], argv: Optional[Sequence[str]] = None, settings: Optional[Type[Group]] = None
) -> int:
    """Run a command in this process alone, and return its exit status.

    Args:
        command: takes its settings or, without `settings`, its arguments.
        argv: arguments (default: those of the process).
        settings: class of the command's settings.

    Returns:
        0: success. 1: failure. 2: the command line or config is wrong. 75: stopped on request; the same command resumes.
        130: stopped by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    return _Execution().run(lambda meeting: command(argv if settings is None else config.read(settings, argv)))


def run_on_ranks(
    command: Callable[[Sequence[str], Meeting], object],
    argv: Optional[Sequence[str]] = None,
    stop: Optional[StopRequest] = None,
) -> int:
    """Run a command that several ranks do together, and return its exit status, as `run` does.

    Args:
        command: takes its arguments, and the ranks, which have met.
        argv: arguments (default: those of the process).
        stop: notes the signals for a command that obeys it itself, because it saves. Other commands are stopped at once.
    """
    argv = sys.argv[1:] if argv is None else argv
    return _Execution(stop, on_ranks=True).run(lambda meeting: command(argv, meeting))


class _Execution:
    """One run of a command in this process; arguments as of `run_on_ranks`."""

    def __init__(self, stop: Optional[StopRequest] = None, on_ranks: bool = False):
        self.saves = stop is not None
        self.stop = StopRequest() if stop is None else stop  # one without a signal is false
        self.on_ranks = on_ranks
        self.launch: Launch = ALONE
        self.meeting = Meeting()

    def run(self, command: Callable[[Meeting], object]) -> int:
        logging.getLogger("huggingface_hub.utils._http").addFilter(_is_no_attempt)
        with usable_streams():
            try:
                self.launch = read_launch() if self.on_ranks else ALONE
                with self.stop.listening(SIGNALS if self.saves else WITHOUT_CTRL_C), watching_launcher(self.launch):
                    self._with_the_others(command)
                return 0
            except (Stopped, KeyboardInterrupt) as stopped:
                return self._stopped(stopped)
            except Exception as error:
                if self.stop and _lost_another_rank(error, self.launch):  # both were stopped
                    return self._stopped(Stopped(self.stop.signal))
                return self._failed(error)

    def _with_the_others(self, command: Callable[[Meeting], object]) -> None:
        at_once = contextlib.nullcontext() if self.saves else self.stop.ending_at_once()
        log = log_to_console() if self.launch.rank == 0 else contextlib.nullcontext()
        with at_once, log, contextlib.ExitStack() as stack:
            with self.stop.ending_at_once():
                self.meeting = stack.enter_context(meet(self.launch))
            try:
                command(self.meeting)
            except RuntimeError as error:
                if _lost_another_rank(error, self.launch) and not isinstance(error, OtherRankFailed):
                    raise self.meeting.explain_loss(error) from None
                raise

    def _stopped(self, stopped: BaseException) -> int:
        text = str(stopped) or "interrupted"
        if isinstance(stopped, Stopped) and not self.saves:
            text = f"stopped by {stopped.number.name}; run the same command again"
        if self.launch.rank == 0:
            _print_error(text)
        return getattr(stopped, "exit_code", INTERRUPTED)

    def _failed(self, error: Exception) -> int:
        """Print the line of the error that is being handled, and return the exit status. Raise it if it is a bug."""
        if isinstance(error, UserError):
            if self.launch.rank == 0 or not error.everywhere:
                _print_error(f"error: {error}")
            return error.exit_code
        if isinstance(error, torch.OutOfMemoryError):
            remedy = "lower --batch-size and raise --grad-accum-steps, or add --grad-checkpointing"
            _print_error(f"error: out of GPU memory: {one_line(error, 120)}; {remedy}")
            return 1
        if _lost_another_rank(error, self.launch):
            _print_error(f"rank {self.launch.rank}: exiting because another rank failed ({one_line(error, 100)})")
            time.sleep(SECOND_TO_DIE_S)
            return 1
        if isinstance(error, RuntimeError):  # torch raises it from a signal handler, in any line of the process
            error = worker_failure(error) or error
        if isinstance(error, UserError):
            _print_error(f"error: {error}")
            return 1
        if isinstance(error, OSError):  # such as a file name that is too long
            _print_error(f"error: {one_line(error)}")
            return 1
        raise error


def put(text: str, output: str) -> None:
    """Write a command's result to a file, or to the terminal if `output` is empty."""
    if output:
        replace_text(Path(output), text)
    else:
        show(text)


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        write_line(printable(line), sys.stderr)


def _is_no_attempt(record: logging.LogRecord) -> bool:
    """Drop the Hub client's line about each failed attempt; the error after the last one says enough."""
    return not any(text in record.getMessage() for text in ("thrown while requesting", "Retrying in"))


def _lost_another_rank(error: BaseException, launch: Launch) -> bool:
    """Return whether an error only says that another rank is gone, which has then printed the cause."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection closed")
    if isinstance(error, OtherRankFailed):
        return True
    return launch.size > 1 and isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
