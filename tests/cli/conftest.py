"""Runs of train.py as processes of their own, which can be signalled and killed, and start in milliseconds."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence

import pytest

REPO = Path(__file__).parents[2]
PATIENCE_S = 120  # until a run that does not end has failed


class Starter:
    """Talks to starter.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("starter.py"))],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Run:
    """The processes of a run, by rank."""

    def __init__(self, starter: Starter, log: Path, argv: Sequence[object], processes: int, before: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        self.starter = starter
        self.log = log
        for ending in (".out", ".err"):
            log.with_name(log.name + ending).touch()
        self.command = shlex.join([str(arg) for arg in argv])
        self.pids = starter.ask(
            argv=[str(arg) for arg in argv], ranks=ranks if processes > 1 else [{}], log=str(log), before=before
        )

    @property
    def out(self) -> str:
        return self.log.with_name(self.log.name + ".out").read_text()

    @property
    def err(self) -> str:
        return self.log.with_name(self.log.name + ".err").read_text()

    def statuses(self) -> List[Optional[int]]:
        """Of the processes that have ended; None for the others."""
        return self.starter.ask(ended=self.pids)

    def send(self, number: int, rank: Optional[int] = None) -> None:
        """A signal, to one process or to the whole group with its loader processes."""
        if rank is None:
            os.killpg(self.pids[0], number)
        else:
            os.kill(self.pids[rank], number)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition; the run must not end before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert any(status is None for status in self.statuses()), f"ended before: {self.out}{self.err}"
            assert time.monotonic() < deadline, f"waited in vain: {self.out}{self.err}"
            time.sleep(0.002)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.out

    def wait(self) -> int:
        """The exit status that all processes agree on; they must end by themselves."""
        return self.end(PATIENCE_S, agree=True)[0]

    def end(self, patience_s: float, agree: bool = False) -> List[int]:
        deadline = time.monotonic() + patience_s
        while None in (statuses := self.statuses()):
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"did not end: {self.command}\n{self.out}{self.err}")
            time.sleep(0.003)
        assert not agree or len(set(statuses)) == 1, (statuses, self.out, self.err)
        return statuses

    def kill(self) -> None:
        """As the system does when memory runs out, or a machine is lost: everything, at once."""
        self.send(signal.SIGKILL)
        self.end(PATIENCE_S)


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Run]]:
    """Starts train.py: where its output goes, arguments, number of processes, code to run in each of them before."""
    starter = Starter()
    yield lambda log, argv, processes=1, before="": Run(starter, log, argv, processes, before)
    starter.process.kill()  # faster than letting it take PyTorch apart
    starter.process.wait()


@pytest.fixture
def start(launch: Callable[..., Run], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """The same for the time of a test: what is left of a run at its end is killed."""
    runs: List[Run] = []

    def start(argv: Sequence[object], processes: int = 1, before: str = "") -> Run:
        runs.append(launch(tmp_path / f"log{len(runs)}", argv, processes, before))
        return runs[-1]

    yield start
    for run in runs:
        if None in run.statuses():
            run.kill()
