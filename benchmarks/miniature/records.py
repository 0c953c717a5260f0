"""The folders of the study, the records of its finished runs, and the learning rates that follow from them."""

import json
from pathlib import Path
from typing import Any, Collection, Dict, List, NamedTuple, Optional, Sequence

import plan
from plan import Run

from tnt_timm.errors import ConfigError, UserError

Record = Dict[str, Any]  # what RunProcess.record returns
Records = Dict[str, Record]  # by name of the run


class Folders(NamedTuple):
    """Where the study keeps its runs."""

    output: Path

    def run(self, name: str) -> Path:
        return self.output / name

    def record(self, name: str) -> Path:
        return self.output / "records" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.txt"

    def time_before(self, name: str) -> Path:
        """Return the file that says how many seconds a run took before it was stopped."""
        return self.output / "logs" / f"{name}.seconds"


def command_of(run: Run, lr: float, output: Path) -> List[str]:
    """Return the flags of train.py that define a run."""
    seed = ["--seed", str(run.seed), "--lr", f"{lr:g}"]
    return [*run.flags, *seed, "--output", str(output), "--experiment", run.name]


def without_place(command: Sequence[str], output: Path) -> List[str]:
    """Return a command with OUTPUT for the study's folder, which may be moved, or typed in another way."""

    def replaced(part: str) -> str:
        prefix = "local-dir:" if part.startswith("local-dir:") else ""
        path = Path(part.removeprefix(prefix))
        if path == output or output in path.parents:
            return f"{prefix}OUTPUT/{path.relative_to(output)}".removesuffix("/.")
        return part

    paths = ("--output", "--data-dir", "--kd-model-name", "--pretrained-path")
    flags = ["", *command]  # the flag before each part
    return [replaced(part) if flag in paths else part for flag, part in zip(flags, command)]


def read_records(runs: Sequence[Run], folders: Folders, device: str) -> Records:
    """Return the records of the finished runs.

    Raises:
        ConfigError: a run had other settings, or was made on another kind of device (its precision is another one).
        UserError: a record is unreadable.
    """
    found: Records = {}
    for run in runs:
        path = folders.record(run.name)
        if not path.exists():
            continue
        try:
            record = json.loads(path.read_text())
            settings = without_place(command_of(run, record["lr"], folders.output), folders.output)
            before, now = [*record["command"], record["device"].partition(":")[0]], [*settings, device]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: not a record of a run; remove it to make the run again") from None
        if before != now:
            old, new = next(((a, b) for a, b in zip(before, now) if a != b), ("fewer settings", "more"))
            raise ConfigError(
                f"{path}: made with other settings ({old} instead of {new}); give the settings of before, or choose another "
                f"--output"
            )
        found[run.name] = record
    return found


def rates_to_try(run: Run, records: Records, failed: Collection[str] = ()) -> List[float]:
    """Return the learning rates that the search of a run's network tries.

    They are those of the grid, and a further one if the best is at an end of the grid. Rates whose run failed are left out.
    """
    rates = [lr for lr in plan.RATES if plan.search_name(run.network.name, lr) not in failed]
    best = _best(run, rates, records)
    further = {plan.RATES[0]: plan.LOWER_RATE, plan.RATES[-1]: plan.HIGHER_RATE}.get(best)
    if further and plan.search_name(run.network.name, further) not in failed:
        rates.append(further)
    return rates


def chosen_rate(run: Run, records: Records, failed: Collection[str] = ()) -> Optional[float]:
    """Return the learning rate with the lowest held-out loss, None if that is not known yet."""
    return _best(run, rates_to_try(run, records, failed), records)


def _best(run: Run, rates: Sequence[float], records: Records) -> Optional[float]:
    names = {lr: plan.search_name(run.network.name, lr) for lr in rates}
    if not names or any(name not in records for name in names.values()):
        return None
    return min(names, key=lambda lr: records[names[lr]]["held_out_loss"])
