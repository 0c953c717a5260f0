"""Run the commands in processes of their own, which can be signalled and killed, and start in milliseconds.

Also the run that the tests of interruptions share: small, and with everything that is random.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np
import pytest
from PIL import Image

REPO = Path(__file__).parents[2]
PATIENCE_S = 120  # a run that has not ended by then has failed
MODEL = ["--model", "tnt_ti", "--img-size", "32", "--model-kwargs", "depth=1", "embed_dim=12", "inner_dim=4"]
MODEL += ["num_heads_inner=2", "num_heads_outer=3"]
RICH = """--aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --reprob 0.25 --aug-repeats 3 --drop 0.1 --drop-path 0.2
    --model-ema --model-ema-decay 0.9 --model-ema-warmup --opt adamw --lr 1e-2 --warmup-epochs 1 --sched-on-updates
    --cooldown-epochs 0 --epochs 2 -b 2 --grad-accum-steps 2 --log-interval 1 --device cpu --workers 0""".split()


class Starter:
    """The process of starter.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("starter.py"))],
            cwd=REPO,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, sys.path)]),
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Run:
    """The processes of a run, by rank, or the process of torchrun with its options."""

    def __init__(
        self,
        starter: Starter,
        log: Path,
        argv: Sequence[object],
        processes: int = 1,
        before: str = "",
        program: str = "train",
        torchrun: Optional[Sequence[object]] = None,
    ):
        ranks: List[Dict[str, str]] = [{}]
        if torchrun is not None:
            argv = [*torchrun, "--start-method=fork", "--run-path", f"{program}.py", *argv]
            program = "torchrun"
        elif processes > 1:
            shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        self.starter = starter
        self.log = log
        for ending in (".out", ".err"):
            log.with_name(log.name + ending).touch()
        argv = [str(arg) for arg in argv]
        self.command = f"{program} {shlex.join(argv)}"
        self.pids = starter.ask(program=program, argv=argv, ranks=ranks, log=str(log), before=before)

    @property
    def out(self) -> str:
        return self.log.with_name(self.log.name + ".out").read_text()

    @property
    def err(self) -> str:
        return self.log.with_name(self.log.name + ".err").read_text()

    @property
    def updates(self) -> List[str]:
        """The updates in the log, as epoch/update: ["1/1", "1/2", ...]."""
        return [f"{epoch}/{update}" for epoch, update in re.findall(r"^epoch (\d+)/\d+  update (\d+)/", self.out, re.M)]

    def statuses(self) -> List[Optional[int]]:
        """Return the exit statuses, None for processes that are still running."""
        return self.starter.ask(ended=self.pids)

    def send(self, number: int, rank: Optional[int] = None) -> None:
        """Send a signal to one rank, or to the whole process group with its workers."""
        if rank is None:
            os.killpg(self.pids[0], number)
        else:
            os.kill(self.pids[rank], number)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition. The run must not end before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert any(status is None for status in self.statuses()), f"ended before: {self.out}{self.err}"
            assert time.monotonic() < deadline, f"waited in vain: {self.out}{self.err}"
            time.sleep(0.002)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.out

    def reached(self, update: str) -> Callable[[], bool]:
        return lambda: update in self.updates

    def wait(self) -> int:
        """Wait until all ranks have ended, and return their exit status, which must be the same."""
        return self.end(PATIENCE_S, agree=True)[0]

    def end(self, patience_s: float, agree: bool = False) -> List[int]:
        deadline = time.monotonic() + patience_s
        while None in (statuses := self.statuses()):
            if time.monotonic() > deadline:
                self.send(signal.SIGABRT)  # faulthandler prints the stacks
                time.sleep(1)
                self.send(signal.SIGKILL)
                raise AssertionError(f"did not end: {self.command}\n{self.out}{self.err}")
            time.sleep(0.003)
        assert not agree or len(set(statuses)) == 1, (statuses, self.out, self.err)
        return statuses

    def kill(self) -> None:
        """Kill everything at once, like a crash of the machine."""
        self.send(signal.SIGKILL)
        self.end(PATIENCE_S)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Run]]:
    """Start a command; arguments as of Run."""
    starter = Starter()
    yield lambda *args, **options: Run(starter, *args, **options)
    starter.process.kill()  # faster than letting it take PyTorch apart
    starter.process.wait()


@pytest.fixture
def start(launch: Callable[..., Run], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start a command that is killed at the end of the test."""
    runs: List[Run] = []

    def start(argv: Sequence[object], *args: Any, **options: Any) -> Run:
        runs.append(launch(tmp_path / f"log{len(runs)}", argv, *args, **options))
        return runs[-1]

    yield start
    for run in runs:
        if None in run.statuses():
            run.kill()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of different colours: 25 and 13 images, so that nothing divides evenly."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for split, counts in (("train", (9, 8, 8)), ("val", (5, 4, 4))):
        for number, count in enumerate(counts):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, number] += 90
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def argv(data: Path, tmp_path: Path) -> Callable[..., List[object]]:
    """The arguments of a run with everything that is random. Later arguments win."""
    return lambda *more: [data, *MODEL, *RICH, "--output", tmp_path, "--experiment", "run", *more]


@pytest.fixture(scope="session")
def straight(launch: Callable[..., Run], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of the same run without an interruption, and without saves inside an epoch."""
    done: Dict[Any, Path] = {}

    def straight(processes: int = 1, *more: object) -> Path:
        if (processes, more) not in done:
            folder = tmp_path_factory.mktemp("straight")
            command = [data, *MODEL, *RICH, "--recovery-minutes", "0", *more, "--output", folder, "--experiment", "run"]
            assert launch(folder / "log", command, processes).wait() == 0
            done[processes, more] = folder / "run"
        return done[processes, more]

    return straight


@pytest.fixture
def ends_straight(straight: Callable[..., Path], assert_same_bits: Callable[..., None]) -> Callable[..., None]:
    """Compare a run folder with that of the same run without an interruption."""
    return lambda folder, processes=1, *more: assert_same_bits(straight(processes, *more), folder)
