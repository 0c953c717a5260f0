"""What loader processes need of the machine, said before they go short of it; and why one ended, in one line."""

import contextlib
import os
import re
import warnings
from pathlib import Path
from typing import Iterator, List, Optional, Set, Union

from tnt_timm.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
CHECK = "`tnt-check` names the image, if it is one"
# What torch says when a loader process ends or cannot hand over its batch -> cause and mend.
ENDS = {
    r"</torch_\d|DataLoader worker.*Bus error": (
        "{shm} has no room for the next batch that a loader process hands over; "
        "give it more room (docker run --shm-size=16g, or --ipc=host), or lower --workers or --batch-size"
    ),
    r"DataLoader worker.*killed by signal: Killed": (
        "the system ended a loader process, most likely because memory ran out; lower --workers or --batch-size"
    ),
    r"DataLoader worker.*killed by signal: (?P<signal>Terminated|Hangup|Interrupt)": (
        "a loader process was ended from outside ({signal})"
    ),
    r"DataLoader worker.*killed by signal: (?P<signal>[^.]*)": f"a loader process crashed ({{signal}}); {CHECK}",
    r"DataLoader worker.*exited unexpectedly": f"a loader process ended without saying why; {CHECK}",
    r"Too many open files. Communication with the workers|received 0 items of ancdata": (
        "loader processes hold more files open than allowed; raise the limit (ulimit -n 65536) or lower --workers"
    ),
}


def why_it_ended(error: BaseException, fetching: bool = False) -> Optional[UserError]:
    """One line for the ways in which loader processes end, whichever part of the training process hears of it.

    Args:
        error: what was raised: torch raises RuntimeError out of a signal handler, wherever the training process stands.
        fetching: it was raised while a batch was fetched, so that a broken connection is one to a loader process.

    Returns:
        the error to raise instead, or None for one that has to do with something else.
    """
    said, cause = [], error
    while cause is not None:  # torch raises one error out of the other, and the first of them knows most
        if fetching and isinstance(cause, (EOFError, ConnectionError)):
            said.append("DataLoader worker exited unexpectedly")
        elif isinstance(cause, (RuntimeError, OSError)):
            said.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for pattern, meaning in ENDS.items():
        found = re.search(pattern, "\n".join(said))
        if found:
            return UserError("workers: " + meaning.format(shm=_room_text(), **found.groupdict()))
    return None


def usable_cores() -> Set[int]:
    """The cores that this process may run on. Launchers may give each process its own: the union over them counts."""
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def shortages(workers: int, processes: int, cores: int, batch_bytes: int, prefetch: int = 2) -> List[str]:
    """What the loader processes of one machine may lack, one line each; nothing where all is well.

    Args:
        workers: loader processes per training process.
        processes: training processes on this machine.
        cores: that all of them may use.
        batch_bytes: of the largest batch of one process: images are uint8 on their way, so batch x 3 x height x width.
        prefetch: batches that a loader process has ready (torch: 2).
    """
    found = []
    fair = max(1, cores // processes)
    if workers > fair:
        total = f"{workers} x {_many(processes, 'process')} = {workers * processes} loader processes"
        found.append(f"workers: {total} share {_many(cores, 'core')}; --workers {fair} gives each a core of its own")
    room = _room()
    needed = workers * prefetch * batch_bytes * processes
    if room is not None and needed > room:
        fits = int(room // (prefetch * batch_bytes * processes))
        found.append(
            f"workers: {_room_text()}, and loader processes may fill {size_text(needed)} ({_many(processes, 'process')} x "
            f"{_many(workers, 'worker')} x {prefetch} batches of {size_text(batch_bytes)}); give it more room "
            f"(docker run --shm-size=16g, or --ipc=host), or pass --workers {min(fits, workers)}"
        )
    return found


@contextlib.contextmanager
def without_torchs_count() -> Iterator[None]:
    """torch's own warning, several lines from each process, counts loader processes of one training process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def _room() -> Optional[int]:
    """Free bytes of shared memory; None where a system has it elsewhere."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_frsize * found.f_bavail


def _room_text() -> str:
    room = _room()
    if room is None:
        return "shared memory"
    found = os.statvfs(SHARED_MEMORY)
    return f"{SHARED_MEMORY} ({size_text(found.f_frsize * found.f_blocks)}, {size_text(room)} free)"


def _many(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number} {what}{plural}"


def size_text(number: Union[int, float]) -> str:
    """Of so many bytes."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
