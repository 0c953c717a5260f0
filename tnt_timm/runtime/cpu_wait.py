"""Measure how long this process's threads wait for a free CPU core."""

import time
from pathlib import Path
from typing import Dict, Optional

import torch

WINDOW_S = 20.0  # length of a measurement; a shorter one would report passing load
NOTABLE = 0.15  # share of the threads' time: below 0.02 on a quiet machine, 0.3 to 0.6 with a busy process on two cores


class CpuWait:
    """Warn once if the threads of a run get much less CPU time than they could use.

    Parallel threads wait for the slowest one, so a core that another process occupies can cost a run far more than that
    core's share of the machine. Linux only: other systems do not report it, and no warning is given.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")):
        self.tasks = tasks
        self.warned = False
        self.restart()

    def restart(self) -> None:
        """Start a new measurement."""
        self.start = time.perf_counter()
        self.waits = self._waits()

    def share(self) -> float:
        """Return the share of the time since the start during which a thread waited for a core, averaged over threads."""
        waited_ns = sum(ns - self.waits.get(thread, 0) for thread, ns in self._waits().items())
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return waited_ns / 1e9 / seconds / torch.get_num_threads()

    def warning(self, on_cpu: bool) -> Optional[str]:
        """Return what is wrong and what to do, once, after a window in which the threads waited long; otherwise None.

        Args:
            on_cpu: whether the run computes on the CPU, so that its number of threads matters.
        """
        if self.warned or time.perf_counter() - self.start < WINDOW_S:
            return None
        share = self.share()
        if share < NOTABLE:
            self.restart()
            return None
        self.warned = True
        count = torch.get_num_threads()
        threads = "thread" if count == 1 else f"{count} threads"
        remedy = "stop other processes, or lower --workers"
        if on_cpu and count > 1:
            remedy += ", or rerun with --threads 1, or with the environment variable OMP_WAIT_POLICY=passive (idle threads sleep)"
        return f"too few free CPU cores: this run's {threads} waited for one {100 * share:.0f} % of the time; {remedy}"

    def _waits(self) -> Dict[str, int]:
        """Return the nanoseconds that each thread has waited for a core since it started."""
        found = {}
        for file in self.tasks.glob("*/schedstat"):
            try:
                found[file.parent.name] = int(file.read_text().split()[1])
            except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
                continue
        return found
