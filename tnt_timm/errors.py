"""The one exception for mistakes in what the user gave: its text is the one clear line that the user sees."""


class UserError(Exception):
    """A mistake in a config, a data set, a checkpoint or a path.

    The message is one line that names the place and the mend. The commands print it without a traceback and exit with
    ``exit_code``: 2 for a command or config that cannot be understood, 1 for everything that fails later.
    """

    exit_code = 1


class ConfigError(UserError):
    """A command line or YAML file that cannot be understood; nothing has been created on disk when it is raised."""

    exit_code = 2


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of somebody else's exception, folded to one line of at most ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
