"""The command: `tnt-check DIR [-j 8] [--output report.json]`.

Exit status 0 where nothing would hurt a run, 1 where something would, 2 for a command line that cannot be understood, 130
after Ctrl-C, when the report covers what was read until then.
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Optional, Sequence

from pydantic import Field
from tqdm import tqdm

from tnt_timm.commands.runner import run
from tnt_timm.console import BAR_FORMAT, BAR_REFRESH_S, duration, say
from tnt_timm.data.check.reading import inspect_all
from tnt_timm.data.check.report import Report, SplitTally
from tnt_timm.data.folders import Survey, images_of, read_class_map, split_folder
from tnt_timm.data.workers import usable_cores
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.files import replace_text
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group

DESCRIPTION = """Read every image of a data set of class folders once, as training would, and say what is wrong. Nothing in it is
changed. Exit status: 0 when nothing would hurt a run, 1 when something would."""
LINE_EVERY_S = 30.0  # where there is no terminal


class Own(Group):
    """What to check"""

    data_dir: str = Field("", description="folder of the data set; also the first argument without a flag")
    train_split: str = Field("train", min_length=1, description="name of the training split")
    val_split: str = Field("validation", min_length=1, description="name of the validation split")
    class_map: str = Field("", description="file that maps class names to indices")
    workers: Optional[int] = Field(None, ge=0, description="processes that read (default: one per core); 0 reads here")
    output: str = Field("", description="write everything found to this .json file")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(check, argv)


def check(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: there is no such data set, or something in it would hurt a run.
    """
    own = _parse(argv)
    report = _survey(own)
    start = time.perf_counter()
    try:
        _read(report, len(usable_cores()) if own.workers is None else own.workers)
        report.finished = True
    finally:
        report.seconds = time.perf_counter() - start
        for line in report.lines():
            say(line)
        of = "" if report.finished else f" of {report.num_images:,}"
        say(f"checked    {report.num_checked:,}{of} images in {duration(report.seconds)}")
        if own.output:
            replace_text(Path(own.output), json.dumps(report.as_json(), indent=1) + "\n")
    if verdict := report.verdict():
        raise UserError(f"{own.data_dir}: {verdict}")
    say("no problem found")


def _parse(argv: Sequence[str]) -> Own:
    parser = command_line.build_parser({Own.__doc__: Own.model_fields}, DESCRIPTION, {"workers": ["-j"]})
    parser.usage = "%(prog)s DIR [-j PROCESSES] [--output FILE.json] [--KEY VALUE ...]"
    parser.add_argument("dir", metavar="DIR", nargs="?", help="folder of the data set")
    given = command_line.parse(parser, argv)
    folder = given.pop("dir", None)
    if folder is not None:
        if "data_dir" in given:
            raise ConfigError(f"command line: {folder} and --data-dir {given['data_dir']}: give one of them")
        given["data_dir"] = folder
    if not given.get("data_dir"):
        raise ConfigError("command line: no data set given; pass its folder")
    own = config.own_settings(Own, given)
    if own.output and not Path(own.output).absolute().parent.is_dir():
        raise ConfigError(f"output: {own.output}: no such folder")  # found now, not after hours
    return own


def _survey(own: Own) -> Report:
    """What can be known without opening a file."""
    root = Path(own.data_dir)
    if not root.is_dir():
        raise UserError(f"data_dir: {root}: no such folder")
    class_map = read_class_map(own.class_map) if own.class_map else None
    by_map = class_map is not None
    report, missing = Report(str(root)), []
    for name in (own.train_split, own.val_split):
        try:
            folder = split_folder(root, name)
        except UserError as error:
            missing.append(error)
            report.add("missing_split", name, str(error))
        else:
            report.survey(SplitTally(name, Survey(folder), class_map), by_map)
    if len(missing) == 2:
        raise missing[0]
    report.compare_classes(by_map)
    return report


def _read(report: Report, processes: int) -> None:
    with _Progress(report.num_images) as progress:
        for split in sorted(report.splits, key=lambda split: split.num_images):
            paths = (path for path, label in images_of(split.survey.folder) if label in split.classes)
            with contextlib.closing(
                inspect_all(paths, processes)
            ) as inspections:  # after Ctrl-C, its workers end first
                for path, found in inspections:
                    report.add_image(split, path, found)
                    progress.advance(report)


class _Progress:
    """A bar on a terminal, else a line now and then."""

    def __init__(self, total: int):
        self.total = total
        self.bar: Optional[tqdm] = None
        self.start = self.last = time.perf_counter()

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            settings = dict(desc="reading", bar_format=BAR_FORMAT, dynamic_ncols=True, leave=False, file=sys.stdout)
            self.bar = tqdm(total=self.total, **settings)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, report: Report) -> None:
        """After an image has been read."""
        if self.bar is not None:
            self.bar.update(1)
        now, done = time.perf_counter(), report.num_checked
        if now - self.last < (BAR_REFRESH_S if self.bar is not None else LINE_EVERY_S):
            return
        self.last = now
        images_per_s = done / (now - self.start)
        left = duration((self.total - done) / images_per_s)
        text = f"{images_per_s:.0f} img/s  left {left}  {report.findings['unreadable'].count:,} unreadable"
        if self.bar is not None:
            self.bar.bar_format = f"{BAR_FORMAT}  {text}"
            self.bar.refresh()
        else:
            say(f"reading    {done:,} of {self.total:,} images  {text}")
