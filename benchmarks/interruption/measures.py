"""The four measurements: kills, saves, starts and evaluation. Programs alternate, and times are medians."""

import argparse
import csv
import itertools
import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import torch
from programs import Events, Program, Settings, execute, train, validate_arguments

Row = Dict[str, str]  # column -> cell
STATES = {
    "weights": "state_dict",
    "EMA": "state_dict_ema",
    "optimizer": "optimizer",
}  # keys of both programs' checkpoints
UNTRAINED = ("--lr", "1e-30", "--min-lr", "0", "--warmup-epochs", "0", "--epochs", "1")  # an update changes no weight
YES = {True: "yes", False: "no"}


class Kill(NamedTuple):
    """When a run is killed: a key of the probe, and a number of updates."""

    how: str
    update: int

    def __str__(self) -> str:
        moment = f"the first save at or after update {self.update}"
        return {
            "kill_at": f"after update {self.update}",
            "kill_saving": f"while writing {moment}",
            "kill_naming": f"before renaming {moment}",
        }[self.how]


def kills(programs: Sequence[Program], settings: Settings, moments: Sequence[Kill], folder: Path) -> Iterator[Row]:
    """Run each program twice without a kill, then resume from each kill in each of the program's ways."""
    total = settings.epochs * settings.updates_per_epoch

    def row(program: Program, way: str, kill: str, lost: int, run: Path, reference: Path, left: str) -> Row:
        """`lost`: updates that had been done before the kill and are not in the checkpoint that the run resumed from."""
        final, expected = _state(run / "last.pth.tar"), _state(reference / "last.pth.tar")
        return {
            "program": program.name,
            "resumed by": way,
            "killed": kill,
            "updates lost": str(lost),
            f"final updates (of {total})": str(_updates(final)),
            **{name: YES[_equal(final[key], expected[key])] for name, key in STATES.items()},
            "summary.csv": YES[(run / "summary.csv").read_bytes() == (reference / "summary.csv").read_bytes()],
            "checkpoints left by the kill": left,
        }

    for number, program in enumerate(programs):
        reference, again = (folder / f"{number}-{name}" for name in ("straight", "again"))
        for run in (reference, again):
            train(program, settings, run)
        yield row(program, "run twice", "none", 0, again, reference, "")
        for kill in moments:
            run = folder / f"{number}-{kill.how}-{kill.update}"
            events = train(program, settings, run, **{kill.how: kill.update})
            done = max((event.get("update", 0) for event in events), default=0)
            tried = []
            for way, find in program.ways.items():
                copy = folder / f"{run.name}-resumed"
                shutil.copytree(run, copy)
                checkpoint, more = find(copy) or (None, [])
                resume = (checkpoint and checkpoint.name, len(more))
                if resume not in tried:  # two ways may resume alike
                    tried.append(resume)
                    start = _updates(_state(checkpoint)) if checkpoint else 0
                    train(program, settings, copy, more)
                    yield row(program, way, str(kill), done - start, copy, reference, _left(run))
                shutil.rmtree(copy)


def _state(path: Path) -> Dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm's `args`
        return torch.load(path, map_location="cpu", weights_only=True)


def _updates(state: Mapping[str, Any]) -> int:
    """Return the number of updates of a checkpoint's weights, as the optimizer counts them."""
    return max((int(values["step"]) for values in state["optimizer"]["state"].values()), default=0)


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
    for path in sorted(run.glob("*.pth.tar*")):
        try:
            _state(path)
            found.append(path.name)
        except Exception:  # torch has a different one for each kind of broken file
            found.append(f"{path.name} (torn)")
    return ", ".join(found) or "nothing"


def stalls(programs: Sequence[Program], settings: Settings, updates: int, repeats: int, folder: Path) -> Iterator[Row]:
    """Measure how long training waits for a save inside an epoch, in runs with and without saves."""
    names = [program.name for program in programs]
    waits, steps, with_save, following = ({name: [] for name in names} for _ in range(4))  # milliseconds
    for _, program, interval in itertools.product(range(repeats), programs, (settings.recovery_interval, 0)):
        now = settings._replace(recovery_interval=interval)
        events = train(program, now, folder / "run", stop_after=updates, saving=program.saving)
        shutil.rmtree(folder / "run")
        clock = [1e3 * event["seconds"] for event in events if "update" in event]
        gaps = [after - before for before, after in itertools.pairwise(clock)]  # gaps[0] ends with update 2
        saves = {event["after"]: 1e3 * event["save_s"] for event in events if event.get("after", 0) > 1}
        waits[program.name] += saves.values()
        with_save[program.name] += [gaps[after - 1] for after in saves if after <= len(gaps)]
        following[program.name] += [gaps[after] for after in saves if after < len(gaps)]
        steps[program.name] += [] if interval else gaps[1:]  # the first ones warm up
    for name in names:
        wait, step = median(waits[name]), median(steps[name])
        yield {
            "program": name,
            "wait per save ms": f"{wait:.1f}",
            "saves": str(len(waits[name])),
            "step ms": f"{step:.1f}",  # without saves
            "wait / step": f"{100 * wait / step:.1f} %",
            "step with a save ms": f"{median(with_save[name]):.1f}",
            "next step ms": f"{median(following[name]):.1f}",
        }


def starts(programs: Sequence[Program], settings: Settings, kill_at: int, repeats: int, folder: Path) -> Iterator[Row]:
    """Measure the time to the first update of a new run, and of one that is resumed in the program's first way."""
    for program in programs:
        train(program, settings, folder / f"killed {program.name}", kill_at=kill_at)
    ways = {program.name: next(iter(program.ways)) for program in programs}
    seconds: Dict[Any, List[float]] = {(program.name, resumed): [] for program in programs for resumed in (False, True)}
    for _, program, resumed in itertools.product(range(repeats), programs, (False, True)):
        run, more = folder / "run", []
        if resumed:
            shutil.copytree(folder / f"killed {program.name}", run)
            more = program.ways[ways[program.name]](run)[1]
        events = train(program, settings, run, more, stop_after=1)
        seconds[program.name, resumed].append(first_update_s(events))
        shutil.rmtree(run)
    for name, way in ways.items():
        fresh, resumed = median(seconds[name, False]), median(seconds[name, True])
        yield {
            "program": name,
            "resumed by": way,
            "fresh s": f"{fresh:.2f}",
            "resumed s": f"{resumed:.2f}",
            "ratio": f"{resumed / fresh:.2f}",
        }


def first_update_s(events: Events) -> float:
    """Return the seconds from the start of the process to the end of its first update."""
    return next(event["seconds"] for event in events if "update" in event)


def evaluations(
    programs: Sequence[Program], settings: Settings, processes: Sequence[int], folder: Path
) -> Iterator[Row]:
    """Evaluate the same weights, trained for one epoch, with each program and each number of ranks."""
    total = len(list(settings.data.glob("validation/*/*.png")))

    def row(program: Program, script: str, number: int, events: Events, top1: float) -> Row:
        return {
            "program": program.name,
            "script": script,
            "processes": str(number),
            f"images counted (of {total})": str(sum(event.get("evaluated", 0) for event in events)),
            "top-1": f"{top1:.4f}",
        }

    trained, weights, results, run = (folder / name for name in ("trained", "weights.pth", "results.json", "run"))
    train(programs[0], settings, trained)
    torch.save(_state(trained / "last.pth.tar")["state_dict"], weights)
    for program, number in itertools.product(programs, processes):
        now = settings._replace(processes=number, recovery_interval=0, ema=False)
        events = train(program, now, run, ["--initial-checkpoint", str(weights), *UNTRAINED])
        with open(run / "summary.csv", newline="") as file:
            *_, last = csv.DictReader(file)
        yield row(program, "train.py", number, events, float(last["eval_top1"]))
        shutil.rmtree(run)
        if number == 1 or program.validates_distributed:
            events = execute(program, "validate.py", validate_arguments(program, settings, weights, results), number)
            found = json.loads(results.read_text())
            yield row(program, "validate.py", number, events, (found[0] if isinstance(found, list) else found)["top1"])
