#!/usr/bin/env python3
"""Measure what interruptions cost: `python benchmarks/interruption kills --timm-train CHECKOUT`.

This project's train.py and, with --timm-train, timm's train timm's tnt_s_patch16_224 at 32x32 (smaller unless --full-size) on the
same image folder of digits. The measurements:

    kills        lost updates, and whether a resumed run ends with the same bits
    stall        how long training waits for a save
    start        time to the first update of a resumed run
    evaluation   images counted on several ranks
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Iterator, NoReturn, Sequence

import measures
from measures import Kill, Row
from programs import SMALL, Program, Settings, this_project, timms, write_digits

from tnt_timm.commands.entry_point import run
from tnt_timm.console import show, table
from tnt_timm.data.workers import usable_cores
from tnt_timm.errors import ConfigError
from tnt_timm.runtime import provenance

ROOT = Path(__file__).resolve().parents[2]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parser() -> Parser:
    found = Parser("interruption", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("what", choices=("kills", "stall", "start", "evaluation"))
    add("--timm-train", type=Path, help="checkout of pytorch-image-models (default: measure this project alone)")
    add("--epochs", type=positive, default=2, help="epochs of a run")
    add("--recovery-interval", type=positive, default=10, help="updates between two saves inside an epoch")
    add("--kill-at", type=int, nargs="+", default=[17, 44, 60], help="kills: during the update after these; 0 is never")
    add(
        "--kill-saving",
        type=int,
        nargs="+",
        default=[20],
        help="kills: while writing the first save from these updates on",
    )
    add("--kill-naming", type=int, nargs="+", default=[44], help="kills: before renaming the first save from these on")
    add("--plain", action="store_true", help="kills: without augmentation, mixing and stochastic depth")
    add("--train-processes", type=positive, default=1, help="kills: ranks of a run")
    add("--processes", type=positive, nargs="+", default=[1, 2, 3, 7], help="evaluation: numbers of ranks")
    add("--updates", type=positive, default=44, help="stall: updates of a run, at least 5")
    add("--repeats", type=positive, default=5, help="stall, start: runs of each kind")
    add("--full-size", action="store_true", help="use TNT-S's full widths and depth")
    add("--batch-size", type=positive, default=32, help="images per update and rank")
    add("--train-images", type=positive, default=1437, help="training images")
    add("--val-images", type=positive, default=355, help="validation images")
    add("--work", type=Path, default="output/interruption", help="new folder for the runs; removed at the end")
    add("--format", choices=("table", "markdown", "csv"), default="markdown", help="format of the table")
    return found


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    return run(study, argv)


def study(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: a train.py is missing, or a run failed.
    """
    options = parser().parse_args(argv)
    programs = [this_project(ROOT), *([timms(options.timm_train)] if options.timm_train else ())]
    work = options.work.resolve()
    if work.exists():
        raise ConfigError(f"command line: work: {work}: already exists; remove it or choose another folder")
    settings = Settings(
        write_digits(work / "data", options.train_images, options.val_images),
        options.epochs,
        options.batch_size,
        options.recovery_interval,
        {} if options.full_size else SMALL,
        options.train_processes,
        options.plain,
    )
    rows = []
    for row in measure(options, programs, settings, work):
        rows.append(row)
        print(", ".join(row.values()), file=sys.stderr, flush=True)
    show(table(list(rows[0]), [list(row.values()) for row in rows], options.format))
    print(origin(programs), file=sys.stderr)
    shutil.rmtree(work)


def measure(options: argparse.Namespace, programs: Sequence[Program], settings: Settings, work: Path) -> Iterator[Row]:
    if options.what == "kills":
        hows = ("kill_at", "kill_saving", "kill_naming")
        moments = [Kill(how, update) for how in hows for update in getattr(options, how) if update]
        return measures.kills(programs, settings, moments, work)
    if options.what == "stall":
        return measures.stalls(programs, settings, options.updates, options.repeats, work)
    if options.what == "start":
        return measures.starts(programs, settings, options.kill_at[0], options.repeats, work)
    return measures.evaluations(programs, settings, options.processes, work)


def origin(programs: Sequence[Program]) -> str:
    """Return the machine, versions and commits as one line."""
    commits = [f"{program.name} {provenance.commit(program.folder) or 'unknown commit'}" for program in programs]
    versions = [f"{name} {number}" for name, number in provenance.versions().items() if number != "not installed"]
    load = f"load average {os.getloadavg()[1]:.1f}"
    return ", ".join([provenance.processor(), f"{len(usable_cores())} cores", load, *versions, *commits])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
