"""Stop a rank whose torchrun has died: it gets SIGTERM, as torchrun would have sent it.

torchrun gives each rank a session of its own, so the ranks survive when torchrun is killed, e.g. because memory ran out.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

from tnt_timm.console import write_line
from tnt_timm.errors import STOPPED
from tnt_timm.runtime.background_thread import beside
from tnt_timm.runtime.launch import Launch

CHECK_S = 1.0
GRACE_S = 300.0  # to finish the update and to save, before the process exits without it
MARK = b"TORCHELASTIC_RUN_ID="  # in the environment of what torchrun started, but not in its own
PROC = Path("/proc")


class Link(NamedTuple):
    """torchrun and the process that it has started, which may be a shell around this one."""

    launcher: int
    child: int

    def is_broken(self) -> bool:
        """Return whether the launcher is gone. A process without a parent gets another one, so its number need not be free."""
        if self.child == os.getpid():
            return os.getppid() != self.launcher
        return _parent(self.child) != self.launcher


def find_link() -> Optional[Link]:
    """Return the link to torchrun, or None if this process was not started by it."""
    if MARK[:-1].decode() not in os.environ:
        return None
    child, parent = os.getpid(), os.getppid()
    while _is_marked(parent):
        above = _parent(parent)
        if above is None:
            break
        child, parent = parent, above
    return Link(parent, child)


def _is_marked(pid: int) -> bool:
    try:
        return any(entry.startswith(MARK) for entry in (PROC / str(pid) / "environ").read_bytes().split(b"\0"))
    except OSError:  # not Linux, or another user's process
        return False


def _parent(pid: int) -> Optional[int]:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def watching_launcher(launch: Launch) -> Iterator[None]:
    """If torchrun has started this process, send it SIGTERM when torchrun is gone. Signal handlers must be installed."""
    link = find_link()
    with contextlib.nullcontext() if link is None else beside("launcher watch", _watch, link, launch):
        yield


def _watch(link: Link, launch: Launch, done: threading.Event) -> None:
    while not link.is_broken():
        if done.wait(CHECK_S):
            return
    if not launch.local_rank:  # it speaks for its machine
        with contextlib.suppress(OSError, ValueError):
            text = f"warning: rank {launch.rank}: torchrun (process {link.launcher}) has died; stopping"
            write_line(text, sys.stderr)
    # to this thread, so that a system call in which it waits is interrupted
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    if not done.wait(GRACE_S):
        os._exit(STOPPED)
