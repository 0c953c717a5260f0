"""How a command ends early: by a mistake in what the user gave, whose text is the one clear line, or asked to stop."""

import signal

STOPPED = 75  # exit status "try again" (EX_TEMPFAIL of sysexits.h): the same command goes on
INTERRUPTED = 130  # what a shell reports after Ctrl-C


class UserError(Exception):
    """A mistake in a config, a data set, a checkpoint or a path.

    The message is one line that names the place and the mend. The commands print it without a traceback and exit with
    ``exit_code``: 2 for a command or config that cannot be understood, 1 for everything that fails later.

    Args:
        message: that line.
        everywhere: every process of the run raises the same error, so that one of them is enough to print it.
    """

    exit_code = 1

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


class ConfigError(UserError):
    """A command line or YAML file that cannot be understood; nothing has been created on disk when it is raised."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(message, everywhere=True)


class Stopped(BaseException):
    """The run was asked to stop. Not an Exception, so that nothing on its way up swallows it.

    Args:
        number: the signal.
        saved: the place of the last checkpoint, where more than that was done.
    """

    def __init__(self, number: signal.Signals, saved: str = ""):
        rest = "what was done is saved, and the same command goes on"
        if saved:
            rest = f"what was done after {saved} is lost, and the same command goes on from there"
        super().__init__(f"stopped by {number.name}; {rest}")
        self.number = number
        self.exit_code = INTERRUPTED if number == signal.SIGINT else STOPPED


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of somebody else's exception, folded to one line of at most ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
