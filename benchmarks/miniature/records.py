"""The folders of the study, and the records of its finished runs."""

import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import plan
from plan import Run

from tnt_timm.errors import ConfigError, UserError

Record = Dict[str, Any]  # what Running.record returns


class Folders(NamedTuple):
    """Where the study keeps its runs."""

    output: Path

    def run(self, name: str) -> Path:
        return self.output / name

    def record(self, name: str) -> Path:
        return self.output / "records" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.output / "logs" / f"{name}.txt"

    def seconds(self, name: str) -> Path:
        """Return the file with the seconds that a run took before it was stopped."""
        return self.output / "logs" / f"{name}.seconds"


def command_of(run: Run, lr: float, output: Path) -> List[str]:
    """Return the flags of train.py that define a run."""
    seed = ["--seed", str(run.seed), "--lr", f"{lr:g}"]
    return [*run.flags, *seed, "--output", str(output), "--experiment", run.name]


def anywhere(command: Sequence[str], output: Path) -> List[str]:
    """Return a command without the place of the study, which may be moved."""
    return [part.replace(str(output), "OUTPUT") for part in command]


def read_records(runs: Sequence[Run], folders: Folders) -> Dict[str, Record]:
    """Return the records of the finished runs, by name.

    Raises:
        UserError: a record is of a run with other settings, or unreadable.
    """
    found: Dict[str, Record] = {}
    for run in runs:
        path = folders.record(run.name)
        if not path.exists():
            continue
        try:
            record = json.loads(path.read_text())
            settings = anywhere(command_of(run, record["lr"], folders.output), folders.output)
            same = record["command"] == settings
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a record of a run; remove it to make the run again") from None
        if not same:
            raise ConfigError(
                f"{path}: made with other settings ({_first_difference(record['command'], settings)}); "
                f"give the settings of before, or choose another --output"
            )
        found[run.name] = record
    return found


def _first_difference(before: Sequence[str], now: Sequence[str]) -> str:
    pairs = [(old, new) for old, new in zip([*before, "nothing"], [*now, "nothing"]) if old != new]
    return f"{pairs[0][0]} instead of {pairs[0][1]}" if pairs else "another length"


def chosen_rate(run: Run, records: Dict[str, Record]) -> Optional[float]:
    """Return the learning rate of a run: its own, or the one with the best held-out accuracy. None if that is not known yet."""
    if run.lr:
        return run.lr
    names = [plan.run_name(run.network.name, plan.SEARCH_SEED, lr) for lr in plan.RATES]
    if any(name not in records for name in names):
        return None
    best = max((records[name] for name in names), key=lambda found: (found["held_out_top1"], -found["held_out_loss"]))
    return best["lr"]
