"""Log output: lines, tables, durations."""

import contextlib
import csv
import errno
import io
import logging
import os
import sys
from typing import Any, Iterator, Sequence

from tqdm import tqdm

BAR_FORMAT = "{desc} {bar:8} {n_fmt}/{total_fmt}"
BAR_REFRESH_S = 1.0  # how often a live bar shows new numbers; each refresh costs a device sync


def say(text: str) -> None:
    """Print a line of the log, above the progress bar if there is one. If stdout is closed, continue without output."""
    try:
        if tqdm._instances:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
    except (OSError, ValueError):  # the reader of the pipe has exited
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)


class _Survivor:
    """A stream that drops its output once nobody can read it: the terminal or the pipe is closed. A full disk is an error."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._surviving():
            return self.stream.write(text)
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
            with contextlib.suppress(OSError):  # a stream without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def surviving_a_closed_terminal() -> Iterator[None]:
    """Let neither output nor the flush at exit fail because the terminal or the reader of a pipe is gone."""
    streams = {name: _Survivor(getattr(sys, name)) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in streams.items():
            stream.flush()
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
        say(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())


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
