"""Measure how long this process's threads wait for a free CPU core."""

import time
from pathlib import Path
from typing import Dict, Optional

import torch

WINDOW_S = 20.0  # one measurement; shorter ones would report what passes by itself
# Share of the threads' time: a quiet machine stays below 0.02, one busy process on two cores gives 0.3 to 0.6
NOTABLE = 0.15
TASKS = Path("/proc/self/task")


class CpuWait:
    """Warns once when the threads of a run get much less CPU time than they could use.

    Threads that work in parallel wait for the slowest of them, so one core that another process uses can cost a run far
    more than its share of the machine. Linux only: elsewhere nothing is measured, and nothing said.
    """

    def __init__(self, tasks: Path = TASKS):
        self.tasks = tasks
        self.said = False
        self.restart()

    def restart(self) -> None:
        """Begin a new window, without what happened before it."""
        self.start = time.perf_counter()
        self.waits = self._waits()

    def share(self) -> float:
        """The part of the window for which a thread was ready to run and had no core, on average over the threads."""
        now = self._waits()
        waited_ns = sum(now[thread] - self.waits.get(thread, 0) for thread in now)
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return waited_ns / 1e9 / seconds / torch.get_num_threads()

    def warning(self, on_cpu: bool) -> Optional[str]:
        """After a window in which the threads waited long: what is wrong and what to do; None otherwise. Never twice.

        Args:
            on_cpu: the run computes on the CPU, so that its number of threads matters.
        """
        if self.said or time.perf_counter() - self.start < WINDOW_S:
            return None
        share = self.share()
        if share < NOTABLE:
            self.restart()
            return None
        self.said = True
        threads = torch.get_num_threads()
        remedy = "stop other processes, or lower --workers"
        if on_cpu and threads > 1:
            remedy += (
                ", or start the same command again with --threads 1, or with OMP_WAIT_POLICY=passive in the environment "
                "(idle threads then sleep)"
            )
        many = "thread" if threads == 1 else f"{threads} threads"
        return f"too few CPU cores are free: this run's {many} waited for one {100 * share:.0f} % of the time; {remedy}"

    def _waits(self) -> Dict[str, int]:
        """Nanoseconds that each thread has waited for a core since it started."""
        found = {}
        for file in self.tasks.glob("*/schedstat"):
            try:
                found[file.parent.name] = int(file.read_text().split()[1])
            except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
                continue
        return found
