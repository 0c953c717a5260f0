"""Worker processes of a DataLoader: how they stop, why one died, and what they need from the machine."""

import math
import os
import re
import shutil
import signal
import threading
from itertools import chain
from pathlib import Path
from typing import Any, Iterator, List, Optional, Set, Tuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from tnt_timm.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that a worker prepares ahead: torch's default
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CHECK = "run `tnt-check` to find out if an image causes it"
# torch's message when a worker dies or cannot pass on its batch -> cause and remedy. The first match counts.
FAILURES = {
    r"</torch_\d|DataLoader worker.*Bus error": (
        "{shm} has no room for the next batch of a worker; "
        "enlarge it (docker run --shm-size=16g, or --ipc=host), or lower --workers or --batch-size"
    ),
    r"DataLoader worker.*killed by signal: Killed": (
        "the system killed a worker, most likely because memory ran out; lower --workers or --batch-size"
    ),
    r"DataLoader worker.*killed by signal: (?P<signal>Terminated|Hangup|Interrupt)": (
        "another program ended a worker ({signal}); run the same command to resume"
    ),
    r"DataLoader worker.*killed by signal: (?P<signal>[^.]*)": f"a worker crashed ({{signal}}); {CHECK}",
    r"DataLoader worker.*exited unexpectedly": f"a worker exited without an error message; {CHECK}",
    r"Too many open files. Communication with the workers|received 0 items of ancdata": (
        "the workers need more open files than allowed; raise the limit (ulimit -n 65536) or lower --workers"
    ),
}


class WorkerLoader(DataLoader):
    """A DataLoader of (image, numbers or tensors..., damage) samples that fails with a UserError of one line.

    Its workers ignore the signals that ask a run to stop, because the loop needs them until it has saved.

    Args:
        samples: the dataset.
        workers: number of worker processes. 0 loads in the loop.
        device: for which batches are meant.
        options: of `DataLoader`.
    """

    def __init__(self, samples: Dataset, workers: int, device: torch.device, **options: Any):
        super().__init__(
            samples,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=_start_signal_thread,
            **options,
        )

    def check_worker_number_rationality(self) -> None:
        """Replace torch's warning, which counts the workers of one rank only, by `shortages`."""

    def __iter__(self) -> Iterator[List[Any]]:
        try:
            # Workers, and all of their threads, start with the signals blocked
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                batches = super().__iter__()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield from batches
        except UserError as error:  # from a worker, it comes with the traceback in front
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
        except (RuntimeError, OSError, EOFError) as error:
            raise worker_failure(error, fetching=True) or error from None


def _start_signal_thread(worker: int) -> None:
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_exit_on_request_of_the_loop, daemon=True).start()
    else:  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _exit_on_request_of_the_loop() -> None:
    """Exit on a SIGTERM of the parent: Python sends it at exit, then waits for the worker. Ignore that of others."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _collate(samples: List[Tuple[Any, ...]]) -> List[Any]:
    """Stack the tensors, make tensors of the numbers, and join the lists of damage."""
    *columns, damage = zip(*samples)
    try:
        tensors = list(map(default_collate, columns))  # in a worker, it stacks into shared memory
        # torch shares tensors in a thread. An error would be lost there, and the loop would wait forever.
        for tensor in tensors if get_worker_info() else ():
            tensor.share_memory_()
    except RuntimeError as error:
        raise worker_failure(error) or error from None
    return [*tensors, list(chain.from_iterable(damage))]


def worker_failure(error: BaseException, fetching: bool = False) -> Optional[UserError]:
    """Return the error that explains why a worker died, or None if `error` has another cause.

    Args:
        error: torch raises RuntimeError from a signal handler, wherever the main process is.
        fetching: it was raised while fetching a batch, so a broken connection is one to a worker.
    """
    messages, cause = [], error
    while cause is not None:  # torch raises one error from another, and the first knows most
        if fetching and isinstance(cause, (EOFError, ConnectionError)):
            messages.append("DataLoader worker exited unexpectedly")
        elif isinstance(cause, (RuntimeError, OSError)):
            messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for pattern, meaning in FAILURES.items():
        if found := re.search(pattern, "\n".join(messages)):
            return UserError("workers: " + meaning.format(shm=_shared_memory()[1], **found.groupdict()))
    return None


def usable_cores() -> Set[int]:
    """Return the cores that this process may use. Launchers may give each rank its own, so count their union."""
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def shortages(workers: int, ranks: int, cores: int, batch_bytes: int) -> List[str]:
    """Return one line for each thing that the workers of a machine lack: cores, shared memory.

    Args:
        workers: per rank.
        ranks: on this machine.
        cores: that all of them may use.
        batch_bytes: size of the largest batch of a rank. Images are uint8 here, so batch x 3 x height x width.
    """
    found = []
    share = max(1, cores // ranks)
    if workers > share:
        total = f"{workers} x {_count(ranks, 'rank')} = {workers * ranks} workers"
        found.append(f"workers: {total} share {_count(cores, 'core')}; --workers {share} gives each its own core")
    free, name = _shared_memory()
    per_worker = PREFETCH * batch_bytes * ranks
    if workers * per_worker > free:
        found.append(
            f"workers: {name}, but workers may need {size_text(workers * per_worker)} ({_count(ranks, 'rank')} x "
            f"{_count(workers, 'worker')} x {PREFETCH} batches of {size_text(batch_bytes)}); enlarge it "
            f"(docker run --shm-size=16g, or --ipc=host), or pass --workers {free // per_worker}"
        )
    return found


def loading_remedy(
    workers: int, ranks: int, cores: int, batch_bytes: int, moves: bool, shards: float = math.inf
) -> str:
    """Return what a user whose GPUs wait for images can do.

    Args:
        workers, ranks, cores, batch_bytes: as of `shortages`.
        moves: `--augment-on device` would move a part of the augmentation to the GPU.
        shards: of a stream, per rank. Each worker needs one.
    """
    share = max(1, cores // ranks)
    ways = ["--augment-on device"] if moves else []
    if workers < share and workers >= shards:
        ways.append("more shards, because each worker needs one")
    elif workers < share:
        fits = not shortages(share, ranks, cores, batch_bytes)
        ways.append(f"--workers {share}, one per core{'' if fits else ', with more shared memory'}")
    return f"try {' or '.join(ways)}" if ways else "more CPU cores would help"


def _shared_memory() -> Tuple[float, str]:
    """Return the free bytes of shared memory, and its name and size for messages."""
    try:
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # a system without /dev/shm
        return math.inf, "shared memory"
    return free, f"{SHARED_MEMORY} ({size_text(total)}, {size_text(free)} free)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def size_text(num_bytes: float) -> str:
    """Return a size in the fitting unit, such as "64 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
