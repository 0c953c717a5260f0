"""Make the runs of the study: train.py and validate.py as processes, several side by side, with one progress view.

A finished run has a record, records/NAME.json, and is skipped. An interrupted run resumes, as train.py does.
"""

import contextlib
import csv
import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from plan import Run
from records import Folders, Record, chosen_rate, command_of, rates_to_try, read_records, without_place
from tqdm import tqdm

from tnt_timm.atomic_files import replace_text
from tnt_timm.console import BAR_FORMAT, duration, say
from tnt_timm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 0.5  # between two looks at the processes
SAVE_S = 60  # for a stopped run to save
MOST_FAILURES = 5  # until no more runs are started
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
LIBC = ctypes.CDLL(None)
POSITION = re.compile(rb"epoch (\d+)/(\d+)  (?:update (\d+)/(\d+))?")  # in train.py's log


class RunProcess:
    """The processes of a run, one after the other.

    Args:
        run: the run.
        lr: its learning rate.
        folders: of the study.
        device_flags: of train.py and validate.py.
    """

    def __init__(self, run: Run, lr: float, folders: Folders, device_flags: Sequence[str]):
        self.run, self.lr, self.folders = run, lr, folders
        self.command = command_of(run, lr, folders.output)
        self.steps: List[List[str]] = [["train.py", *self.command, *run.place, *device_flags]]
        self.results = folders.log(run.name).with_suffix(".json")
        if run.test_split:
            test = [str(folders.run(run.name)), "--val-split", run.test_split, "--results-file", str(self.results)]
            self.steps.append(["validate.py", *test, *device_flags])
        before = folders.time_before(run.name)
        self.start_s = time.monotonic() - (float(before.read_text()) if before.exists() else 0.0)
        self.log = open(folders.log(run.name), "ab")  # noqa: SIM115  (as long as its processes)
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        program, *arguments = self.steps.pop(0)
        # a session of its own: Ctrl-C reaches the study alone, which then stops its runs
        return subprocess.Popen(
            [sys.executable, str(ROOT / program), *arguments],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def advance(self) -> Optional[int]:
        """Start the next process if one has ended. Return the exit status of the last one, None while one runs."""
        status = self.process.poll()
        if status == 0 and self.steps:
            self.process = self._start()
            return None
        if status is not None:
            self.log.close()
        return status

    def share(self) -> float:
        """Return how much of the training is done, from its log."""
        with contextlib.suppress(OSError, IndexError, ZeroDivisionError):
            tail = _tail(self.folders.log(self.run.name))
            epoch, epochs, update, updates = POSITION.findall(tail)[-1]
            within = int(update) / int(updates) if updates else 1.0  # an epoch's own line comes at its end
            return (int(epoch) - 1 + within) / int(epochs)
        return 0.0

    def record(self) -> Record:
        """Return what the run has measured."""
        rows = summary(self.folders.run(self.run.name))
        best = max(rows, key=lambda row: float(row["eval_top1"]))
        test = json.loads(self.results.read_text()) if self.run.test_split else {}
        provenance = json.loads((self.folders.run(self.run.name) / "run.json").read_text())
        return {
            "name": self.run.name,
            "network": self.run.network.name,
            "seed": self.run.seed,
            "lr": self.lr,
            "images": self.run.images,
            "epochs": self.run.epochs,
            "held_out_top1": float(best["eval_top1"]),
            "held_out_loss": float(best["eval_loss"]),
            "best_epoch": int(best["epoch"]) + 1,
            "test_top1": test.get("top1"),
            "test_loss": test.get("loss"),
            "test_images": test.get("num_images"),
            "seconds": self.seconds(),
            "device": provenance["device"],
            "instruction_set": provenance["instruction_set"],
            "versions": provenance["versions"],
            "commit": provenance["commit"],
            "command": without_place(self.command, self.folders.output),
        }

    def seconds(self) -> float:
        """Return how long the run has taken, before it was stopped as well."""
        return round(time.monotonic() - self.start_s, 1)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(UserError):  # a full disk must not keep the other runs from being stopped
            replace_text(self.folders.time_before(self.run.name), str(self.seconds()))

    def wait(self) -> None:
        """Wait until a stopped run has saved, and kill it if that takes too long."""
        try:
            self.process.wait(SAVE_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the study is killed, so that no run outlives it."""
    LIBC.prctl(DEATH_SIGNAL, signal.SIGTERM)


def _tail(path: Path, size: int = 4096) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - size))
        return file.read()


def summary(folder: Path) -> List[Dict[str, str]]:
    """Return the rows of a run's summary.csv, one per epoch."""
    with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Study:
    """All runs, and what is known of them.

    Args:
        runs: in the order in which they are made.
        work: cost of each run, in any unit, by name.
        folders: of the study.
        device: "cpu" or "cuda".
        device_flags: of train.py and validate.py.

    Raises:
        UserError: finished runs have other settings.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        work: Dict[str, float],
        folders: Folders,
        device: str,
        device_flags: Sequence[str] = (),
    ):
        self.runs, self.work, self.folders, self.device_flags = runs, work, folders, device_flags
        self.records = read_records(runs, folders, device)
        self.failed: Dict[str, str] = {}
        self.running: List[RunProcess] = []

    def wanted(self) -> List[Run]:
        """Return the runs without the learning rates that no search needs, as far as that is known."""
        return [run for run in self.runs if not run.lr or run.lr in rates_to_try(run, self.records, self.failed)]

    def make(self, jobs: int, until: float) -> None:
        """Make the runs that are not finished, `jobs` at a time, until a time of `time.monotonic`.

        Raises:
            UserError: runs failed, or another study uses the folder. No run is started after five failures, nor one that
                needs a failed run.
        """
        for folder in (self.folders.log("x").parent, self.folders.record("x").parent):
            folder.mkdir(parents=True, exist_ok=True)
        with self._locked(), self._progress() as show:
            try:
                while time.monotonic() < until:
                    if len(self.failed) < MOST_FAILURES:
                        self._start(jobs)
                    if not self.running:
                        break
                    time.sleep(LOOK_S)
                    self._collect()
                    show()
            finally:
                for running in self.running:
                    running.stop()
                for running in self.running:
                    running.wait()
                self.running = []
        if self.failed:
            name, why = next(iter(self.failed.items()))
            raise UserError(f"{self.folders.log(name)}: {len(self.failed)} runs failed, the first with: {why}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folders.output / ".lock", "w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"output: {self.folders.output}: another study is using this folder") from None
            yield

    def _start(self, jobs: int) -> None:
        started = {*self.records, *self.failed, *(running.run.name for running in self.running)}
        for run in self.wanted():
            if len(self.running) >= jobs:
                return
            lr = run.lr or chosen_rate(run, self.records, self.failed)
            if run.name not in started and lr and (not run.needs or run.needs in self.records):
                self.running.append(RunProcess(run, lr, self.folders, self.device_flags))

    def _collect(self) -> None:
        """Record the runs that have ended."""
        for running in list(self.running):
            status = running.advance()
            if status is None:
                continue
            self.running.remove(running)
            name = running.run.name
            if status:
                lines = _tail(self.folders.log(name)).decode(errors="replace").strip().splitlines()
                self.failed[name] = lines[-1] if lines else f"exit status {status}"
                say(f"{name}: failed: {self.failed[name]}")
                continue
            record = self.records[name] = running.record()
            replace_text(self.folders.record(name), json.dumps(record, indent=1) + "\n")
            self.folders.time_before(name).unlink(missing_ok=True)
            test = f", test {record['test_top1']:.2f} %" if running.run.test_split else ""
            took = duration(record["seconds"])
            say(
                f"{len(self.records)}/{len(self.wanted())}  {name}: held-out {record['held_out_top1']:.2f} %{test}, {took}"
            )

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Any]:
        """Yield a function that updates the progress bar of all runs, on a terminal."""
        begin, begin_s = self._done(), time.monotonic()
        with tqdm(
            total=100, bar_format=BAR_FORMAT.replace("{n_fmt}/{total_fmt}", "{percentage:.1f} %") + "{postfix}",
            file=sys.stdout, disable=not sys.stdout.isatty(), leave=False, dynamic_ncols=True,
        ) as bar:  # fmt: skip

            def show() -> None:
                wanted, done = self.wanted(), self._done()
                total = sum(self.work[run.name] for run in wanted)
                speed = (done - begin) / (time.monotonic() - begin_s)
                bar.n = 100 * done / total
                bar.set_description(f"{len(self.records)}/{len(wanted)} runs", refresh=False)
                left = f", left {duration((total - done) / speed)}" if speed else ""
                bar.set_postfix_str(", ".join(running.run.name for running in self.running) + left)

            yield show

    def _done(self) -> float:
        under_way = sum(running.share() * self.work[running.run.name] for running in self.running)
        return under_way + sum(self.work[name] for name in self.records)
