"""What is measured: what a kill costs, how long the loop waits for a save, how soon a run goes on, what evaluation counts.

Programs take turns, and where a clock decides the median counts.
"""

import argparse
import csv
import itertools
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import torch
from programs import Program, Settings, execute, train, validate_arguments

STATES = {"weights": "state_dict", "EMA": "state_dict_ema", "optimizer": "optimizer"}  # both scripts' keys
UNTRAINED = ("--lr", "1e-30", "--min-lr", "0", "--warmup-epochs", "0", "--epochs", "1")  # an update changes no weight


@dataclass(frozen=True)
class Kill:
    """When a run is killed: a key of the probe, and after how many updates."""

    how: str
    update: int

    def __str__(self) -> str:
        return {
            "kill_at": f"after update {self.update}",
            "kill_saving": f"amid writing the first save from update {self.update} on",
            "kill_naming": f"before the rename of the first save from update {self.update} on",
        }[self.how]


@dataclass(frozen=True)
class Outcome:
    """How a run ended that was killed and went on.

    lost: updates that were done and had to be done again, or were never done again.
    in_the_end: updates that its final weights have had.
    same: of each of STATES and of summary.csv, whether it equals the uninterrupted run's bit by bit.
    left: checkpoints that the kill left, "torn" where one cannot be read.
    """

    program: str
    way: str
    kill: str
    lost: int
    in_the_end: int
    same: Mapping[str, bool]
    left: str


def outcomes(programs: Sequence[Program], settings: Settings, kills: Sequence[Kill], folder: Path) -> Iterator[Outcome]:
    """Each program twice without a kill, then each kill with each way of going on."""
    for number, program in enumerate(programs):
        reference, again = (folder / f"{number}-{name}" for name in ("straight", "again"))
        for run in (reference, again):
            train(program, settings, run)
        end = _updates(_state(again / "last.pth.tar"))
        yield Outcome(program.name, "run twice", "none", 0, end, _same(again, reference), "")
        for kill in kills:
            run = folder / f"{number}-{kill.how}-{kill.update}"
            killed = train(program, settings, run, **{kill.how: kill.update})
            done = max((event.get("update", 0) for event in killed.events), default=0)
            tried = set()
            for way, find in program.ways.items():
                place = folder / f"{run.name}-{len(tried)}"
                shutil.copytree(run, place)
                checkpoint, more = find(place) or (None, [])
                start = _updates(_state(checkpoint)) if checkpoint else 0
                name = (checkpoint.name if checkpoint else "", len(more))
                if name not in tried:
                    train(program, settings, place, more)
                    end = _updates(_state(place / "last.pth.tar"))
                    same = _same(place, reference)
                    yield Outcome(program.name, way, str(kill), done - start, end, same, _left(run))
                tried.add(name)
                shutil.rmtree(place)


def _state(path: Path) -> Dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm's `args`
        return torch.load(path, map_location="cpu", weights_only=True)


def _updates(state: Mapping[str, Any]) -> int:
    """How many updates a checkpoint's weights have had, by the optimizer's own count."""
    return max((int(values["step"]) for values in state["optimizer"]["state"].values()), default=0)


def _same(run: Path, reference: Path) -> Dict[str, bool]:
    one, two = _state(run / "last.pth.tar"), _state(reference / "last.pth.tar")
    same = {name: _equal(one[key], two[key]) for name, key in STATES.items()}
    same["summary.csv"] = (run / "summary.csv").read_bytes() == (reference / "summary.csv").read_bytes()
    return same


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return one == two


def _left(run: Path) -> str:
    found = []
    for path in sorted(path for path in run.iterdir() if ".pth.tar" in path.name):
        try:
            _state(path)
            found.append(path.name)
        except Exception:  # torch has a different one for each kind of broken file
            found.append(f"{path.name} (torn)")
    return ", ".join(found) or "nothing"


@dataclass(frozen=True)
class Stall:
    """What saving costs the loop, in milliseconds (medians).

    wait_ms: what the loop waits for a save inside an epoch.
    saves: how many waits were measured.
    step_ms: an update, and what comes with it, in a run without saves.
    with_save_ms, next_ms: an update with a save before it, and the one after that.
    """

    program: str
    wait_ms: float
    saves: int
    step_ms: float
    with_save_ms: float
    next_ms: float


def stalls(programs: Sequence[Program], settings: Settings, updates: int, repeats: int, folder: Path) -> List[Stall]:
    """Runs of so many updates with and without saves."""
    names = [program.name for program in programs]
    waits, steps, with_save, following = ({name: [] for name in names} for _ in range(4))
    for _ in range(repeats):
        for program in programs:
            for interval in (settings.recovery_interval, 0):
                now = replace(settings, recovery_interval=interval)
                ran = train(program, now, folder / "run", stop_after=updates, saving=program.saving)
                shutil.rmtree(folder / "run")
                clock = [1e3 * event["seconds"] for event in ran.events if "update" in event]
                gaps = [after - before for before, after in itertools.pairwise(clock)]  # the first is update 2's
                saves = {event["after"]: 1e3 * event["save_s"] for event in ran.events if event.get("after", 0) > 1}
                waits[program.name] += saves.values()
                with_save[program.name] += [gaps[after - 1] for after in saves if after <= len(gaps)]
                following[program.name] += [gaps[after] for after in saves if after < len(gaps)]
                steps[program.name] += [] if interval else gaps[1:]  # the first ones warm up
    return [
        Stall(name, median(waits[name]), len(waits[name]), *(median(of[name]) for of in (steps, with_save, following)))
        for name in names
    ]


@dataclass(frozen=True)
class Start:
    """Seconds from the start of the process to the end of its first update (medians)."""

    program: str
    way: str
    fresh_s: float
    resumed_s: float


def starts(programs: Sequence[Program], settings: Settings, kill_at: int, repeats: int, folder: Path) -> List[Start]:
    """A fresh run beside one that goes on after a kill in its first epoch, in the first way of each program."""
    seconds: Dict[Tuple[str, bool], List[float]] = {}
    for number, program in enumerate(programs):
        train(program, settings, folder / f"killed{number}", kill_at=kill_at)
    for _ in range(repeats):
        for number, program in enumerate(programs):
            for resumed in (False, True):
                run, more = folder / "run", []
                if resumed:
                    shutil.copytree(folder / f"killed{number}", run)
                    more = next(iter(program.ways.values()))(run)[1]
                ran = train(program, settings, run, more, stop_after=1)
                seconds.setdefault((program.name, resumed), []).append(ran.first_update_s())
                shutil.rmtree(run)
    return [
        Start(p.name, next(iter(p.ways)), median(seconds[p.name, False]), median(seconds[p.name, True]))
        for p in programs
    ]


@dataclass(frozen=True)
class Count:
    """How many images an evaluation judged, and the top-1 that it reported."""

    program: str
    script: str
    processes: int
    images: int
    top1: float


def counts(programs: Sequence[Program], settings: Settings, processes: Sequence[int], folder: Path) -> Iterator[Count]:
    """The same weights, of an epoch of training, evaluated by each program on so many processes."""
    trained, weights, results = folder / "trained", folder / "weights.pth", folder / "results.json"
    train(programs[0], settings, trained)
    torch.save(_state(trained / "last.pth.tar")["state_dict"], weights)
    for program in programs:
        for number in processes:
            run, now = folder / "run", replace(settings, processes=number, recovery_interval=0, ema=False)
            ran = train(program, now, run, ["--initial-checkpoint", str(weights), *UNTRAINED])
            with open(run / "summary.csv", newline="") as file:
                top1 = float(list(csv.DictReader(file))[-1]["eval_top1"])
            yield Count(program.name, "train.py", number, ran.evaluated(), top1)
            shutil.rmtree(run)
            if number == 1 or program.validates_on_many:
                arguments = validate_arguments(program, settings, weights, results)
                ran = execute(program, "validate.py", arguments, number)
                yield Count(program.name, "validate.py", number, ran.evaluated(), _top1(results))


def _top1(results: Path) -> float:
    found = json.loads(results.read_text())
    return (found[0] if isinstance(found, list) else found)["top1"]
