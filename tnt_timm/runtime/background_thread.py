"""A thread that runs beside a block of code and ends with it."""

import contextlib
import threading
from typing import Any, Callable, Iterator


@contextlib.contextmanager
def beside(name: str, watch: Callable[..., object], *args: Any) -> Iterator[None]:
    """Run `watch(*args, done)` in a thread until the context ends, which sets the event `done` and waits for the thread."""
    done = threading.Event()
    thread = threading.Thread(target=watch, args=[*args, done], name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
