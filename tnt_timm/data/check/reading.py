"""Read many files in parallel, in order, with bounded read-ahead."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Deque, Iterable, Iterator, List, Tuple

from PIL import Image

from tnt_timm.data.check.images import Inspection, inspect_image

CHUNK = 8  # files per task
AHEAD = 4  # tasks per worker that are being read or wait for their turn


def inspect_all(paths: Iterable[str], workers: int) -> Iterator[Tuple[str, Inspection]]:
    """Yield each path with its inspection, in order. A file whose decoder crashes the worker counts as unreadable.

    Args:
        paths: consumed as needed.
        workers: processes that read. 0 reads in this process.
    """
    paths = iter(paths)
    Image.init()  # load Pillow's decoders once instead of in each worker
    if not workers:
        yield from ((path, inspect_image(path)) for path in paths)
        return
    pool = _start(workers)
    pending: Deque[Tuple[List[str], Future]] = deque()
    try:
        while True:
            while len(pending) < AHEAD * workers and (chunk := list(islice(paths, CHUNK))):
                try:
                    task = pool.submit(_inspect_chunk, chunk)
                except BrokenProcessPool:  # a crash, reported below when its chunk has its turn
                    pool = _start(workers)
                    task = pool.submit(_inspect_chunk, chunk)
                pending.append((chunk, task))
            if not pending:
                return
            chunk, task = pending.popleft()
            try:
                found = task.result()
            except BrokenProcessPool:
                found = _inspect_carefully(chunk)
            yield from zip(chunk, found)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, initializer=_prepare_worker)


def _inspect_chunk(chunk: List[str]) -> List[Inspection]:
    return [inspect_image(path) for path in chunk]


def _inspect_carefully(chunk: List[str]) -> List[Inspection]:
    """Find the file that crashed a worker: inspect the chunk in a new worker and, if that crashes, file by file."""
    with _start(1) as pool:
        try:
            return pool.submit(_inspect_chunk, chunk).result()
        except BrokenProcessPool:
            if len(chunk) == 1:
                return [Inspection("its decoder crashes")]
    return [found for path in chunk for found in _inspect_carefully([path])]


def _prepare_worker() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all its processes; the parent handles them
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent is killed: a worker of an executor would wait for its next task forever."""
    multiprocessing.parent_process().join()
    os._exit(1)
