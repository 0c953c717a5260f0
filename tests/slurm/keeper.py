"""Runs the daemons of a test cluster: `keeper.py FOLDER PARENT`, with slurm.conf and munge.key in FOLDER.

It keeps them until it is terminated, or its parent is gone, however that ended. Then it kills all that they have started
and removes FOLDER. A daemon that ends earlier is a line on stdout.

The processes of jobs outlive the daemons, and are children of neither them nor the tests; as their "subreaper" the keeper
becomes the parent of each process whose own parent has ended, so that it finds them all.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List

PR_SET_CHILD_SUBREAPER = 36
NODES = ("n0", "n1")


def keep(folder: Path, parent: int) -> None:
    stopped: List[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopped.append(number))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        watch(start(folder), lambda: stopped or os.getppid() != parent)
    finally:
        end_children()
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path) -> Dict[int, str]:
    """All daemons. Returns the name of each by its process."""
    daemons: Dict[int, str] = {}
    for name, command in commands(folder).items():
        files = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(folder / f"{name}.err"), os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        # not by subprocess, which would wait for its end by itself
        pid = os.posix_spawnp(command[0], command, os.environ, file_actions=files)
        daemons[pid] = name
        if name == "munged":
            wait_for(folder / "munge.socket")  # the others ask it at once
    return daemons


def wait_for(path: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            print(f"no {path.name} after {seconds} s", flush=True)
            return
        time.sleep(0.05)


def watch(daemons: Dict[int, str], over: Callable[[], object]) -> None:
    while not over():
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # no child at all
            pid = 0
        if pid in daemons:
            print(f"{daemons[pid]} ended with status {os.waitstatus_to_exitcode(status)}", flush=True)
        elif pid == 0:
            time.sleep(0.1)


def commands(folder: Path) -> Dict[str, List[str]]:
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    return {
        "munged": ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        "slurmctld": ["slurmctld", "-D"],
        **{node: ["slurmd", "-D", "-N", node] for node in NODES},
    }


def end_children(seconds: float = 30) -> None:
    """Kill until there is none: the children of a killed one become ours."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):  # raised when no child is left
        while time.monotonic() < deadline:
            for pid in children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                pass
            time.sleep(0.05)


def children() -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid():
                yield int(stat.parent.name)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), int(sys.argv[2]))
