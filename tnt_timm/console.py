"""Log output: lines, tables, durations."""

import contextlib
import csv
import io
import logging
import os
import sys
from typing import Iterator, Sequence

from tqdm import tqdm

BAR_FORMAT = "{desc} {bar:8} {n_fmt}/{total_fmt}"
BAR_REFRESH_S = 1.0  # a live bar shows new numbers this often, for each costs a sync


def say(text: str) -> None:
    """One line of the log; a progress bar makes way for it. Where nobody listens any more, the run goes on in silence."""
    try:
        if tqdm._instances:
            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)
    except (OSError, ValueError):  # the reader of a pipe has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], format: str = "table") -> str:
    """Rows of text under a header.

    Args:
        header: names of the columns.
        rows: a cell for each of them.
        format: "table" (columns that line up), "markdown" or "csv".
    """
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


class _SayingHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())


@contextlib.contextmanager
def saying_the_log() -> Iterator[None]:
    """What this project's modules log (as what became of loaded weights) is said aloud; nobody else's log is touched."""
    log, handler = logging.getLogger("tnt_timm"), _SayingHandler(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def duration(seconds: float) -> str:
    """Seconds as "m:ss" or "h:mm:ss"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
