#!/usr/bin/env python3
"""Measure what interruptions cost: `python benchmarks/interruption kills --timm-train CHECKOUT`."""

import os
import shutil
import sys
from pathlib import Path
from typing import Iterator, List, Literal, Sequence

import measures
from measures import Kill, Row
from programs import SMALL, Program, Settings, this_project, timms, write_digits
from pydantic import Field

from tnt_timm.commands.runner import run
from tnt_timm.console import say, table
from tnt_timm.data.loader_processes import usable_cores
from tnt_timm.errors import ConfigError
from tnt_timm.runtime import provenance
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group, Whole

DESCRIPTION = """Measure what interruptions cost in this project and, with --timm-train, in timm's train.py. Both train timm's
tnt_s_patch16_224 at 32x32 (smaller unless --full-size) on the same image folder of digits. WHAT is kills (lost updates, and
whether a resumed run ends with the same bits), stall (how long training waits for a save), start (time to the first update of a
resumed run) or evaluation (images counted on several ranks)."""
ROOT = Path(__file__).resolve().parents[2]
WHAT = ("kills", "stall", "start", "evaluation")


class Own(Group):
    """What to measure"""

    what: str = Field("", description="kills, stall, start or evaluation")
    timm_train: str = Field("", description="checkout of pytorch-image-models (default: measure this project alone)")
    epochs: int = Field(2, gt=0, description="epochs of a run")
    recovery_interval: int = Field(10, gt=0, description="updates between two saves inside an epoch")
    kill_at: List[Whole] = Field([17, 44, 60], description="kills: during the update after these; 0 is never")
    kill_saving: List[Whole] = Field([20], description="kills: while writing the first save at or after these updates")
    kill_naming: List[Whole] = Field(
        [44], description="kills: before renaming the first save at or after these updates"
    )
    plain: bool = Field(False, description="kills: without augmentation, mixing and stochastic depth")
    train_processes: int = Field(1, gt=0, description="kills: ranks of a run")
    processes: List[Whole] = Field([1, 2, 3, 7], description="evaluation: numbers of ranks")
    updates: int = Field(44, gt=4, description="stall: updates of a run")
    repeats: int = Field(5, gt=0, description="stall, start: runs of each kind")
    full_size: bool = Field(False, description="use TNT-S's full widths and depth")
    batch_size: int = Field(32, gt=0, description="images per update and rank")
    train_images: int = Field(1437, gt=0, description="training images")
    val_images: int = Field(355, gt=0, description="validation images")
    work: str = Field("output/interruption", description="new folder for the runs; removed at the end")
    format: Literal["table", "markdown", "csv"] = Field("markdown", description="format of the table")


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    return run(benchmark, argv)


def benchmark(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: a train.py is missing, or a run failed.
    """
    own = _parse(argv)
    programs = [this_project(ROOT), *([timms(Path(own.timm_train))] if own.timm_train else ())]
    work = Path(own.work).resolve()
    if work.exists():
        raise ConfigError(f"command line: work: {work}: already exists; remove it or choose another folder")
    data = write_digits(work / "data", own.train_images, own.val_images)
    kwargs = {} if own.full_size else SMALL
    settings = Settings(data, own.epochs, own.batch_size, own.recovery_interval, kwargs, own.train_processes, own.plain)
    rows = []
    for row in _measure(own, programs, settings, work):
        rows.append(row)
        print(", ".join(row.values()), file=sys.stderr, flush=True)
    say(table(list(rows[0]), [list(row.values()) for row in rows], own.format).rstrip("\n"))
    print(_origin(programs), file=sys.stderr)
    shutil.rmtree(work)


def _measure(own: Own, programs: Sequence[Program], settings: Settings, work: Path) -> Iterator[Row]:
    if own.what == "kills":
        moments = [Kill(how, n) for how in ("kill_at", "kill_saving", "kill_naming") for n in getattr(own, how) if n]
        return measures.kills(programs, settings, moments, work)
    if own.what == "stall":
        return measures.stalls(programs, settings, own.updates, own.repeats, work)
    if own.what == "start":
        return measures.starts(programs, settings, own.kill_at[0], own.repeats, work)
    return measures.evaluations(programs, settings, own.processes, work)


def _origin(programs: Sequence[Program]) -> str:
    """Return the machine, versions and commits as one line."""
    commits = [f"{program.name} {provenance.commit(program.folder) or 'unknown commit'}" for program in programs]
    versions = [f"{name} {number}" for name, number in provenance.versions().items() if number != "not installed"]
    load = f"load average {os.getloadavg()[1]:.1f}"
    return ", ".join([provenance.processor(), f"{len(usable_cores())} cores", load, *versions, *commits])


def _parse(argv: Sequence[str]) -> Own:
    settings = {name: field for name, field in Own.model_fields.items() if name != "what"}
    parser = command_line.build_parser({Own.__doc__: settings}, DESCRIPTION, {})
    parser.usage = "%(prog)s WHAT [--KEY VALUE ...]"
    parser.add_argument("what", metavar="WHAT", choices=WHAT, help=", ".join(WHAT))
    return config.own_settings(Own, command_line.parse(parser, argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
