"""Check a dataset: `tnt-check DIR [-j 8] [--output report.json]`.

The exit status is 0 if training can use the dataset as it is, 1 if it has problems, 2 if the command line is wrong, and 130
after Ctrl-C; the report then covers the images that were read.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Optional, Sequence

from pydantic import NonNegativeInt
from tqdm import tqdm

from tnt_timm.atomic_files import replace_text
from tnt_timm.commands.entry_point import run
from tnt_timm.console import BAR_FORMAT, BAR_REFRESH_S, duration, say
from tnt_timm.data.check.reading import inspect_all
from tnt_timm.data.check.report import Report, SplitTally
from tnt_timm.data.class_maps import read_class_map
from tnt_timm.data.folders import Survey, split_folder
from tnt_timm.data.workers import usable_cores
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group, OutputFile

LINE_EVERY_S = 30.0  # without a terminal


class Settings(Group):
    """Read every image of a dataset of class folders once, as training would, and report what is wrong. Changes nothing. The
    exit status is 1 if there are problems for training."""

    dir: PathText = setting("", "dataset folder, as --data-dir", positional="DIR")
    data_dir: PathText = setting("", "dataset folder; also the first argument without a flag")
    train_split: str = setting("train", "name of the training split", min_length=1)
    val_split: str = setting("validation", "name of the validation split", min_length=1)
    class_map: PathText = setting("", "file that maps class names to indices")
    workers: Optional[NonNegativeInt] = setting(
        None, "workers that read images (default: one per core); 0 reads in this process", flag="-j"
    )
    output: OutputFile = setting("", "JSON file for all findings")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run(check, argv, Settings)


def check(settings: Settings) -> None:
    """Read the dataset, print the findings, and write the report if one is wanted.

    Raises:
        UserError: the dataset does not exist or has problems for training.
    """
    if settings.dir and settings.data_dir:
        raise ConfigError(f"command line: {settings.dir} and --data-dir {settings.data_dir}: give one of them")
    root = settings.dir or settings.data_dir
    if not root:
        raise ConfigError("command line: no dataset given; pass its folder")
    report = _survey(Path(root), settings)
    start = time.perf_counter()
    try:
        _read(report, len(usable_cores()) if settings.workers is None else settings.workers)
        report.finished = True
    finally:
        report.seconds = time.perf_counter() - start
        for line in report.lines():
            say(line)
        of = "" if report.finished else f" of {report.num_images:,}"
        say(f"checked    {report.num_checked:,}{of} images in {duration(report.seconds)}")
        if settings.output:
            replace_text(Path(settings.output), json.dumps(report.as_json(), indent=1) + "\n")
    if verdict := report.verdict():
        raise UserError(f"{root}: {verdict}")
    say("no problem found")


def _survey(root: Path, settings: Settings) -> Report:
    """Return a report with the findings that need no file to be opened."""
    if not root.is_dir():
        raise UserError(f"data_dir: {root}: no such folder")
    class_map = read_class_map(settings.class_map) if settings.class_map else None
    by_map = class_map is not None
    report, missing = Report(str(root)), []
    for name in (settings.train_split, settings.val_split):
        try:
            folder = split_folder(root, name)
        except UserError as error:
            missing.append(error)
            report.add("missing_split", name, str(error))
        else:
            report.survey(SplitTally(name, Survey(folder), class_map), by_map, name == settings.train_split)
    if len(missing) == 2:
        raise missing[0]
    report.compare_classes(by_map)
    return report


def _read(report: Report, workers: int) -> None:
    with contextlib.closing(_Progress(report)) as progress:
        for split in sorted(report.splits, key=lambda split: split.num_images):
            paths = (path for path, label in split.survey.images() if label in split.classes)
            with contextlib.closing(inspect_all(paths, workers)) as inspected:  # after Ctrl-C, its workers end first
                for path, found in inspected:
                    report.add_image(split, path, found)
                    progress.advance()


class _Progress:
    """A progress bar on a terminal, else a line now and then."""

    def __init__(self, report: Report):
        self.report = report
        self.start = self.last = time.perf_counter()
        self.interval = BAR_REFRESH_S if sys.stdout.isatty() else LINE_EVERY_S
        self.bar = tqdm(
            desc="reading",
            total=report.num_images,
            bar_format=BAR_FORMAT,
            dynamic_ncols=True,
            leave=False,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
        )

    def close(self) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Count an image that has been read."""
        self.bar.update(1)
        now, done, total = time.perf_counter(), self.report.num_checked, self.report.num_images
        if now - self.last < self.interval:
            return
        self.last = now
        images_per_s = done / (now - self.start)
        unreadable = self.report.findings["unreadable"].count
        text = f"{images_per_s:.0f} img/s  left {duration((total - done) / images_per_s)}  {unreadable:,} unreadable"
        if self.bar.disable:
            say(f"reading    {done:,} of {total:,} images  {text}")
        else:
            self.bar.bar_format = f"{BAR_FORMAT}  {text}"
            self.bar.refresh()
