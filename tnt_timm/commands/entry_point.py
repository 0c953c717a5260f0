"""Run a command: errors and signals become one line on stderr and an exit status."""

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional, Sequence, Type

import torch

from tnt_timm.atomic_files import replace_text
from tnt_timm.console import log_to_console, prepare_streams, printable, show
from tnt_timm.data.workers import worker_failure
from tnt_timm.errors import INTERRUPTED, Stopped, UserError, one_line
from tnt_timm.runtime.distributed import env_rank
from tnt_timm.settings import config
from tnt_timm.settings.schema import Group

# How long a rank stays that has lost another one: torchrun shows the error of the rank that it finds dead first.
SECOND_TO_DIE_S = 5


def run(
    command: Callable[[Any], object], argv: Optional[Sequence[str]] = None, settings: Optional[Type[Group]] = None
) -> int:
    """Run a command and return its exit status.

    Args:
        command: takes its settings or, without `settings`, its arguments.
        argv: arguments (default: those of the process).
        settings: class of the command's settings.

    Returns:
        0: success. 1: failure. 2: the command line or config is wrong. 75: stopped on request; the same command resumes.
        130: stopped by Ctrl-C.
    """
    prepare_streams()
    logging.getLogger("huggingface_hub.utils._http").addFilter(_is_no_attempt)
    argv = sys.argv[1:] if argv is None else argv
    is_main = env_rank() == 0
    try:
        with log_to_console() if is_main else contextlib.nullcontext():
            command(argv if settings is None else config.read(settings, argv))
        return 0
    except UserError as error:
        return _fail(f"error: {error}", error.exit_code, quiet=error.everywhere and not is_main)
    except (Stopped, KeyboardInterrupt) as stopped:
        return _fail(str(stopped) or "interrupted", getattr(stopped, "exit_code", INTERRUPTED), quiet=not is_main)
    except torch.OutOfMemoryError as error:
        remedy = "lower --batch-size and raise --grad-accum-steps, or add --grad-checkpointing"
        return _fail(f"error: out of GPU memory: {one_line(error, 120)}; {remedy}")
    except RuntimeError as error:
        worker_error = worker_failure(error)  # torch raises it from a signal handler, in any line of the process
        if worker_error is not None:
            return _fail(f"error: {worker_error}")
        if not _lost_another_rank(error):
            raise
        _fail(f"rank {env_rank()}: exiting because another rank failed ({one_line(error, 80)})")
        time.sleep(SECOND_TO_DIE_S)
        return 1
    except OSError as error:  # such as a file name that is too long
        return _fail(f"error: {one_line(error)}")


def put(text: str, output: str) -> None:
    """Write a command's result to a file, or to the terminal if `output` is empty."""
    if output:
        replace_text(Path(output), text)
    else:
        show(text)


def _fail(line: str, status: int = 1, quiet: bool = False) -> int:
    if not quiet:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            print(printable(line), file=sys.stderr, flush=True)
    return status


def _is_no_attempt(record: logging.LogRecord) -> bool:
    """Drop the Hub client's line about each failed attempt; the error after the last one says enough."""
    return not any(text in record.getMessage() for text in ("thrown while requesting", "Retrying in"))


def _lost_another_rank(error: RuntimeError) -> bool:
    """Return whether an error only says that another rank is gone, which has then printed the cause."""
    signs = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection closed")
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(sign in str(error) for sign in signs)
