"""Exceptions that end a command with one line on stderr and an exit status."""

import signal

STOPPED = 75  # EX_TEMPFAIL of sysexits.h, "try again": run the same command to resume
INTERRUPTED = 130  # what a shell reports after Ctrl-C


class UserError(Exception):
    """A mistake in a config, a dataset, a checkpoint or a path.

    The message is one line: the place, what is wrong, the remedy. Commands print it without a traceback and exit with
    ``exit_code``: 2 for a command line or config that cannot be understood, 1 for everything that fails later.

    Args:
        message: that line.
        everywhere: every rank raises the same error, so only rank 0 prints it.
    """

    exit_code = 1

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class ConfigError(UserError):
    """A command line or YAML file that cannot be understood. Raised before anything is written to disk."""

    exit_code = 2


class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception, so that no `except Exception` on its way up swallows it.

    Args:
        number: the signal.
        saved: the progress that the last checkpoint holds, if later work is lost.
    """

    def __init__(self, number: signal.Signals, saved: str = ""):
        rest = "progress is saved; run the same command to resume"
        if saved:
            rest = f"work after {saved} is lost; run the same command to resume from there"
        super().__init__(f"stopped by {number.name}: {rest}")
        self.number = number
        self.exit_code = INTERRUPTED if number == signal.SIGINT else STOPPED


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return a library's error message as one line of at most ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
