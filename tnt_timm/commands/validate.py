"""Validate a run folder, a checkpoint or a timm model: `tnt-validate output/tnt_s`."""

import json
from pathlib import Path
from typing import Literal, Optional, Sequence

import torch

from tnt_timm.atomic_files import replace_text
from tnt_timm.commands.entry_point import run_on_ranks
from tnt_timm.console import say, table
from tnt_timm.data import imagenet_sets
from tnt_timm.data.identity import identity_of
from tnt_timm.errors import ConfigError
from tnt_timm.evaluation import validation
from tnt_timm.evaluation.accuracy import PerImageResults
from tnt_timm.runtime.distributed import choose_device, world
from tnt_timm.runtime.meeting import Meeting
from tnt_timm.runtime.same_start import REMEDY, facts_of_data, facts_of_rank
from tnt_timm.settings import config
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group, OutputFile


class Common(Group):
    """Settings of tnt-validate and tnt-validate-all."""

    use_ema: Optional[bool] = setting(None, "averaged (EMA) or raw weights (default: the ones that were best)")
    test_set: Literal[("", *imagenet_sets.NAMES)] = setting(
        "", "evaluate on this ImageNet test set in data_dir; the model must have the 1000 classes"
    )


class Settings(Common):
    """Validate a run folder, a checkpoint or a timm model. A checkpoint of this project holds the model, the dataset and the
    preprocessing, so it needs no flags; a flag overrides the checkpoint."""

    path: Optional[PathText] = setting(
        None, "run folder or checkpoint; with --model, the dataset folder", positional="PATH"
    )
    checkpoint: Optional[PathText] = setting(None, "weights file for --model; all shapes must match")
    results_file: OutputFile = setting("", "JSON file for the results")
    per_class: bool = setting(False, "print the accuracy of each class")
    confusion_matrix: OutputFile = setting(
        "", "CSV file for the confusion matrix: true classes are rows, predicted classes are columns"
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run_on_ranks(validate, argv)


def validate(argv: Sequence[str], meeting: Meeting) -> None:
    """Validate, print the accuracy, and write the files that are wanted.

    Raises:
        UserError: the command line is wrong, or the accuracy cannot be computed.
    """
    fields = {key: config.FIELDS[key] for key in validation.SETTINGS}
    sections = {"training settings; they override the checkpoint's": fields}
    with meeting.together():
        own, given = config.read_with(Settings, argv, sections, False)
        config.validate(given, dict.fromkeys(given, "command line"))  # report mistakes before the checkpoint is read
        source = validation.model_source(given, own.path, own.checkpoint)
        settings = source.settings
        device = choose_device(settings.compute.device, meeting.launch)
    if meeting.size > 1:
        meeting.agree(facts_of_rank({**config.flat(settings), **own.model_dump()}, device), REMEDY)
    with world(device, meeting) as here:
        with here.together():
            validation_set = validation.open_validation_set(settings.data, own.test_set)
            by_class = own.per_class or own.confusion_matrix
            if by_class and validation_set.labels is not None:
                raise ConfigError(
                    f"test_set: {own.test_set}: its images have several right classes; "
                    f"remove --per-class and --confusion-matrix"
                )
        if here.size > 1:
            here.agree(facts_of_data(validation=identity_of(validation_set.images)), REMEDY)
        found, results = validation.validate_model(source, validation_set, here, own.use_ema)
        if not here.is_main:
            return
        accuracy = found.accuracy()
        say(
            f"{results['model']}: top-1 {accuracy.top1:.3f}  top-5 {accuracy.top5:.3f}  loss {accuracy.loss:.6f}  "
            f"({accuracy.num_images} images, each counted once)"
        )
        if own.results_file:
            replace_text(Path(own.results_file), json.dumps(results, indent=2) + "\n")
        if by_class:
            _report_classes(found, validation_set, own)


def _report_classes(found: PerImageResults, validation_set: validation.ValidationSet, own: Settings) -> None:
    """Print the accuracy of each class and write the confusion matrix, (classes, classes) with names in row and column 0."""
    classes, columns = validation_set.classes, validation_set.columns
    names = classes or [str(n) for n in range(int(torch.cat([found.target, found.predicted]).max()) + 1)]
    names = names if columns is None else [names[column] for column in columns]
    confusion = found.confusion(len(names))
    if own.per_class:
        width = max(map(len, names))
        for name, count, right in zip(names, confusion.sum(dim=1).tolist(), confusion.diag().tolist()):
            accuracy = f"{100 * right / count:7.3f}" if count else "      -"
            say(f"{name:<{width}}  top-1 {accuracy}  ({right} of {count} images)")
    if own.confusion_matrix:
        rows = [[name, *map(str, row)] for name, row in zip(names, confusion.tolist())]
        replace_text(Path(own.confusion_matrix), table(["", *names], rows, "csv"))
        say(f"confusion matrix of {len(names)} classes: {own.confusion_matrix}")
