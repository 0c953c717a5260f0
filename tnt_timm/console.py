"""What every command shares: lines of the log, and how mistakes and interruptions become one line and an exit status."""

import contextlib
import csv
import io
import logging
import os
import sys
import time
from typing import Callable, Iterator, Sequence

import torch
from tqdm import tqdm

from tnt_timm.data.loader_processes import why_it_ended
from tnt_timm.errors import INTERRUPTED, Stopped, UserError, one_line

# How long a process that has lost another one stays: torchrun shows the error of whichever it finds dead first, and then
# ends the others.
SECOND_TO_DIE_S = 5


def env_rank() -> int:
    """This process's rank, before anything else is known."""
    return int(os.environ.get("RANK", 0))


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


def _no_attempt(record: logging.LogRecord) -> bool:
    """Whether a line of the Hub's client is more than one of its attempts; that all have failed is told by the error."""
    return not any(text in record.getMessage() for text in ("thrown while requesting", "Retrying in"))


def run(command: Callable[[Sequence[str]], object], argv: Sequence[str]) -> int:
    """Run a command for a person or a launcher: what goes wrong is one line on stderr and a status.

    Returns:
        0; 1 for what failed; 2 for a command line or config that cannot be understood; 75 when the run was asked to stop
        and the same command goes on (130 after Ctrl-C).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a name that the terminal cannot show must not end a run
    logging.getLogger("huggingface_hub.utils._http").addFilter(_no_attempt)
    try:
        with saying_the_log() if env_rank() == 0 else contextlib.nullcontext():
            command(argv)
    except UserError as error:
        if env_rank() == 0 or not error.everywhere:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (Stopped, KeyboardInterrupt) as stopped:
        if env_rank() == 0:
            print(str(stopped) or "interrupted", file=sys.stderr, flush=True)
        return getattr(stopped, "exit_code", INTERRUPTED)
    except torch.OutOfMemoryError as error:
        mend = "lower --batch-size and raise --grad-accum-steps, or add --grad-checkpointing"
        print(f"error: out of GPU memory: {one_line(error, 120)}; {mend}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        ended = why_it_ended(error)  # torch tells of it by a signal, wherever the process stands
        if ended is not None:
            print(f"error: {ended}", file=sys.stderr, flush=True)
            return 1
        if not _lost_a_process(error):
            raise
        print(
            f"process {env_rank()}: ends, for another one has ended ({one_line(error, 80)})",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(SECOND_TO_DIE_S)
        return 1
    except OSError as error:  # the machine's, as a name that is too long
        print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether an error says no more than that another process is gone; that one has said why."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection closed")
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(text in str(error) for text in gone)
