"""Run a command: errors and signals become one line on stderr and an exit status."""

import contextlib
import logging
import os
import sys
import time
from typing import Callable, Optional, Sequence

import torch

from tnt_timm.console import saying_the_log
from tnt_timm.data.workers import worker_failure
from tnt_timm.errors import INTERRUPTED, Stopped, UserError, one_line
from tnt_timm.runtime.distributed import env_rank

# How long a process that has lost another one stays: torchrun shows the error of whichever it finds dead first, and then
# ends the others.
SECOND_TO_DIE_S = 5


def _no_attempt(record: logging.LogRecord) -> bool:
    """Whether a line of the Hub's client is more than one of its attempts; that all have failed is told by the error."""
    return not any(text in record.getMessage() for text in ("thrown while requesting", "Retrying in"))


def run(command: Callable[[Sequence[str]], object], argv: Optional[Sequence[str]]) -> int:
    """Run a command for a person or a launcher.

    Args:
        command: takes the arguments.
        argv: the arguments (default: those of the process).

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
            command(sys.argv[1:] if argv is None else argv)
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
        ended = worker_failure(error)  # torch tells of it by a signal, wherever the process stands
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
