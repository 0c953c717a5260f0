#!/usr/bin/env python3
"""What interruptions cost: `python benchmarks/interruption kills --timm-train CHECKOUT`.

Wiring only; the work is in tnt_timm/analysis/interruption/.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import List, Literal, Sequence, Tuple

import measures
from measures import STATES, Kill
from programs import SMALL, Program, Settings, this_project, timms, write_digits
from pydantic import Field

from tnt_timm.commands.runner import run
from tnt_timm.console import say, table
from tnt_timm.data.workers import usable_cores
from tnt_timm.errors import ConfigError
from tnt_timm.runtime import provenance
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group, Whole

DESCRIPTION = """Measure what interruptions cost this project and, with --timm-train, timm's train.py: on the same digits as an
image folder, with timm's tnt_s_patch16_224 at 32x32, smaller unless --full-size. WHAT is kills (what is lost, and whether a run
ends with the same bits), stall (what the loop waits for a save), start (time to the first update of a run that goes on) or
evaluation (images counted on several processes)."""
ROOT = Path(__file__).resolve().parents[1]
WHAT = ("kills", "stall", "start", "evaluation")
YES = {True: "yes", False: "no"}


class Own(Group):
    """What to measure"""

    what: str = Field("", description="kills, stall, start or evaluation")
    timm_train: str = Field("", description="checkout of pytorch-image-models (default: measure this project alone)")
    epochs: int = Field(2, gt=0, description="of a run")
    recovery_interval: int = Field(10, gt=0, description="updates between two saves inside an epoch")
    kill_at: List[Whole] = Field([17, 44, 60], description="kills: amid the update after these; 0 is never")
    kill_saving: List[Whole] = Field([20], description="kills: amid writing the first save from these updates on")
    kill_naming: List[Whole] = Field([44], description="kills: before the rename of the first save from these on")
    plain: bool = Field(False, description="kills: without augmentation, mixing and stochastic depth")
    train_processes: int = Field(1, gt=0, description="kills: processes of a run")
    processes: List[Whole] = Field([1, 2, 3, 7], description="evaluation: on so many processes each")
    updates: int = Field(44, gt=4, description="stall: updates of a run")
    repeats: int = Field(5, gt=0, description="stall, start: runs of each kind")
    full_size: bool = Field(False, description="all of TNT-S's widths and depth")
    batch_size: int = Field(32, gt=0, description="images of an update, per process")
    train_images: int = Field(1437, gt=0, description="digits to train with")
    val_images: int = Field(355, gt=0, description="digits to evaluate on")
    work: str = Field("output/interruption", description="new folder for the runs; removed in the end")
    format: Literal["table", "markdown", "csv"] = Field("markdown", description="of the table")


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    return run(benchmark, argv)


def benchmark(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: there is no train.py where it should be, or a run failed that should not.
    """
    own = _parse(argv)
    programs = [this_project(ROOT), *([timms(Path(own.timm_train))] if own.timm_train else ())]
    work = Path(own.work).resolve()
    if work.exists():
        raise ConfigError(f"command line: work: {work}: is there already; remove it, or choose another")
    settings = Settings(
        write_digits(work / "data", own.train_images, own.val_images),
        own.epochs,
        own.batch_size,
        own.recovery_interval,
        () if own.full_size else tuple(SMALL.items()),
        own.train_processes,
        own.plain,
    )
    header, rows = {"kills": _kills, "stall": _stall, "start": _start, "evaluation": _evaluation}[own.what](
        own, programs, settings, work
    )
    say(table(header, rows, own.format).rstrip("\n"))
    print(_origin(programs), file=sys.stderr)
    shutil.rmtree(work)


Table = Tuple[Sequence[str], List[List[str]]]


def _kills(own: Own, programs: Sequence[Program], settings: Settings, work: Path) -> Table:
    hows = ("kill_at", "kill_saving", "kill_naming")
    moments = [Kill(how, update) for how in hows for update in getattr(own, how) if update]
    total = own.epochs * settings.updates_per_epoch
    header = ("program", "goes on by", "killed", "updates lost", f"updates in the end (of {total})", *STATES)
    rows = []
    for found in measures.outcomes(programs, settings, moments, work):
        same = [YES[equal] for equal in found.same.values()]
        rows.append([found.program, found.way, found.kill, str(found.lost), str(found.in_the_end), *same, found.left])
        _tell(rows[-1])
    return (*header, "summary.csv", "checkpoints that the kill left"), rows


def _stall(own: Own, programs: Sequence[Program], settings: Settings, work: Path) -> Table:
    header = ("program", "wait per save ms", "saves", "step ms", "wait / step", "step with a save ms", "next step ms")
    rows = []
    for found in measures.stalls(programs, settings, own.updates, own.repeats, work):
        steps = [f"{ms:.1f}" for ms in (found.with_save_ms, found.next_ms)]
        share = f"{100 * found.wait_ms / found.step_ms:.1f} %"
        rows.append([found.program, f"{found.wait_ms:.1f}", str(found.saves), f"{found.step_ms:.1f}", share, *steps])
    return header, rows


def _start(own: Own, programs: Sequence[Program], settings: Settings, work: Path) -> Table:
    rows = []
    for found in measures.starts(programs, settings, own.kill_at[0], own.repeats, work):
        seconds = [f"{found.fresh_s:.2f}", f"{found.resumed_s:.2f}", f"{found.resumed_s / found.fresh_s:.2f}"]
        rows.append([found.program, found.way, *seconds])
    return ("program", "goes on by", "fresh s", "going on s", "ratio"), rows


def _evaluation(own: Own, programs: Sequence[Program], settings: Settings, work: Path) -> Table:
    rows = []
    for found in measures.counts(programs, settings, own.processes, work):
        rows.append([found.program, found.script, str(found.processes), str(found.images), f"{found.top1:.4f}"])
        _tell(rows[-1])
    return ("program", "script", "processes", f"images counted (of {own.val_images})", "top-1"), rows


def _tell(row: Sequence[str]) -> None:
    print(", ".join(row), file=sys.stderr, flush=True)


def _origin(programs: Sequence[Program]) -> str:
    """Machine, versions and commits, as one line."""
    commits = [f"{program.name} {provenance.commit(program.folder) or 'of no known commit'}" for program in programs]
    versions = [f"{name} {number}" for name, number in provenance.versions().items() if number != "not installed"]
    load = f"load average {os.getloadavg()[1]:.1f}"
    return ", ".join([provenance.processor(), f"{len(usable_cores())} cores", load, *versions, *commits])


def _parse(argv: Sequence[str]) -> Own:
    settings = {name: field for name, field in Own.model_fields.items() if name != "what"}
    parser = command_line.build_parser({Own.__doc__: settings}, DESCRIPTION, {})
    parser.usage = "%(prog)s WHAT [--KEY VALUE ...]"
    parser.add_argument("what", metavar="WHAT", choices=WHAT, help=", ".join(WHAT))
    given = command_line.parse(parser, argv)
    return config.own_settings(Own, given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
