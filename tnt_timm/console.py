"""Log output: lines, tables, durations."""

import contextlib
import csv
import errno
import io
import logging
import os
import re
import sys
from typing import Any, Iterator, Sequence, TextIO

from tqdm import tqdm

from tnt_timm.errors import UserError, one_line

BAR_FORMAT = "{desc} {bar:8} {n_fmt}/{total_fmt}"
BAR_REFRESH_S = 1.0  # how often a live bar shows new numbers; each refresh costs a device sync


# What must not reach a terminal as it is: control characters, line separators, marks that reverse the direction of text, and
# the bytes of a name that are not UTF-8.
_UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Return a text with `\\x1b` and the like in place of what a reader cannot see, except for the characters in `keep`."""

    def escape(found: "re.Match[str]") -> str:
        letter = found[0]
        if letter in keep:
            return letter
        if "\udc80" <= letter <= "\udcff":  # a byte of a file's name, as Python decodes it
            return f"\\x{ord(letter) - 0xDC00:02x}"
        return ascii(letter)[1:-1]

    return _UNSEEN.sub(escape, text)


def say(text: str) -> None:
    """Print a line of the log, above the progress bar if there is one. If stdout is closed, continue without output."""
    with contextlib.suppress(OSError, ValueError):
        _write(printable(text))


def show(text: str) -> None:
    """Print a result, which may have several lines.

    Raises:
        UserError: it is lost because the disk is full. If the reader of a pipe has exited, it has what it wanted.
    """
    try:
        _write(printable(text.rstrip("\n"), keep="\n\t"))
    except (OSError, ValueError) as error:
        raise UserError(f"stdout: cannot be written: {one_line(error)}") from None


def write_line(text: str, stream: TextIO) -> None:
    """Write a line in one piece: ranks share a terminal, and with PYTHONUNBUFFERED `print` writes the line break separately."""
    stream.write(f"{text}\n")
    stream.flush()


def _write(text: str) -> None:
    try:
        if tqdm._instances:
            tqdm.write(f"{text}\n", file=sys.stdout, end="")
        else:
            write_line(text, sys.stdout)
    except (OSError, ValueError):
        _discard(sys.stdout)
        raise


def _discard(stream: TextIO) -> None:
    """Send the rest of a stream to nowhere, and what it still holds: Python would complain of it when it exits."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


class _Survivor:
    """A stream that drops its output once nobody can read it: the terminal or the pipe is closed. A full disk is an error."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._surviving():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._surviving():
            self.stream.flush()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            _discard(self.stream)


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Make stdout and stderr usable: closed ones (`>&-`, or later, as the terminal or the reader of a pipe is gone), and
    those whose encoding lacks a letter."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get this number, and all output
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115  (for the rest of the process)
    streams = {name: _Survivor(getattr(sys, name)) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in streams.items():
            try:
                stream.flush()  # what --help left in the buffer
            except (OSError, ValueError):
                _discard(stream.stream)
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.stream)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], format: str = "table") -> str:
    """Return rows of text under a header.

    Args:
        header: names of the columns.
        rows: one cell per column.
        format: "table" (aligned columns), "markdown" or "csv".
    """
    # Not by rich, which cuts cells to the width of the terminal and writes neither CSV nor plain Markdown.
    header, *rows = ([printable(cell) for cell in row] if format != "csv" else row for row in (header, *rows))
    if format == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue()
    if format == "markdown":
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows)]
    return "\n".join(lines) + "\n"


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = ("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()
        for line in text.split("\n"):
            say(line)


@contextlib.contextmanager
def log_to_console() -> Iterator[None]:
    """Print what this package logs, e.g. how weights were adapted. Other packages' loggers are not touched."""
    log, handler = logging.getLogger("tnt_timm"), _Console(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def duration(seconds: float) -> str:
    """Return seconds as "m:ss" or "h:mm:ss"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
