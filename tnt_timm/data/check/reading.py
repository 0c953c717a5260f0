"""Many files at once: processes that read, in the order asked for, never more than a few chunks ahead."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.synchronize import Event
from typing import Deque, Generator, Iterable, Iterator, List, Tuple

from PIL import Image

from tnt_timm.data.check.images import Look, look_at

CHUNK = 16  # files per task
AHEAD = 4  # tasks per process that wait to be read or to be reported

Task = Tuple[List[str], Future]  # a chunk of paths, and their Looks to come
_stop: Event  # in a process that reads: set when nobody waits for what it reads


def look_at_all(paths: Iterable[str], processes: int) -> Iterator[Tuple[str, Look]]:
    """Each path with its Look, in order. A file whose decoder ends its process is named as unreadable like any other.

    Args:
        paths: consumed as they are needed.
        processes: that read; 0 reads here.
    """
    paths = iter(paths)
    Image.init()  # Pillow's decoders, here once instead of in each process
    while processes:
        under_way = yield from _until_a_process_ends(paths, processes)
        if not under_way:
            return
        for chunk, task in under_way:
            whole = task.done() and not task.cancelled() and task.exception() is None
            yield from zip(chunk, task.result() if whole else _look_carefully(chunk))
    for path in paths:
        yield path, look_at(path)


def _until_a_process_ends(paths: Iterator[str], processes: int) -> Generator[Tuple[str, Look], None, List[Task]]:
    """Yields paths and Looks; returns the tasks that were under way when a process ended, none where all files were read."""
    stop = multiprocessing.Event()
    pool = ProcessPoolExecutor(processes, initializer=_prepare_process, initargs=(stop,))
    waiting: Deque[Task] = deque()
    try:
        while True:
            while len(waiting) < AHEAD * processes and (chunk := list(islice(paths, CHUNK))):
                waiting.append((chunk, _submit(pool, chunk)))
            if not waiting:
                return []
            looks = waiting[0][1].result()
            chunk, _ = waiting.popleft()
            yield from zip(chunk, looks)
    except BrokenProcessPool:
        return list(waiting)
    finally:
        stop.set()  # whoever is within a chunk leaves the rest of it
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunk: List[str]) -> Future:
    try:
        return pool.submit(_look_at_chunk, chunk)
    except BrokenProcessPool as error:  # found out at once, and told when the chunk's turn comes
        broken: Future = Future()
        broken.set_exception(error)
        return broken


def _look_at_chunk(chunk: List[str]) -> List[Look]:
    return [look_at(path) for path in chunk if not _stop.is_set()]


def _look_carefully(chunk: List[str]) -> List[Look]:
    """Files of which one may have ended a process: in a new process and, if that ends too, one by one."""
    with ProcessPoolExecutor(1, initializer=_prepare_process, initargs=(multiprocessing.Event(),)) as pool:
        try:
            return pool.submit(_look_at_chunk, chunk).result()
        except BrokenProcessPool:
            if len(chunk) == 1:
                return [Look("ends the process that decodes it")]
    return [look for path in chunk for look in _look_carefully([path])]


def _prepare_process(stop: Event) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed tells nobody, and a process of the pool would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
