"""Validate a checkpoint, a run folder or any timm model."""

import csv
import io
import json
from pathlib import Path
from typing import Any, Dict, Literal, Optional, Sequence

import torch
from pydantic import Field

from tnt_timm.commands.runner import run
from tnt_timm.console import say
from tnt_timm.data import imagenet_sets
from tnt_timm.errors import ConfigError
from tnt_timm.evaluation.accuracy import Accuracy, PerImageResults
from tnt_timm.evaluation.validation import (
    SETTINGS,
    ValidationSet,
    model_source,
    open_validation_set,
    validate_model,
)
from tnt_timm.files import replace_text
from tnt_timm.runtime.distributed import world
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group

DESCRIPTION = """Validate a run folder, a checkpoint, or a timm model. A checkpoint of this project says itself what it is, what
data it was validated on and how: no flag is needed, and each one given here wins over what it says."""


class Own(Group):
    """What to validate"""

    use_ema: Optional[bool] = Field(None, description="the averaged or the raw weights (default: those selected)")
    results_file: str = Field("", description="write the results to this .json file as well")
    per_class: bool = Field(False, description="show the accuracy of each class as well")
    confusion_matrix: str = Field(
        "", description="write how many images of each class (row) were taken for which (column) to this .csv file"
    )
    test_set: Literal[("", *imagenet_sets.NAMES)] = Field(
        "", description="data_dir is one of ImageNet's other test sets, for a model of its 1000 classes"
    )


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(validate, argv)


def validate(argv: Sequence[str]) -> Accuracy:
    """Run validate.py's command line.

    Raises:
        UserError: anything that keeps the number from being computed.
    """
    sections = {
        Own.__doc__: Own.model_fields,
        "How; these settings of train.py win over the checkpoint's": {key: config.FIELDS[key] for key in SETTINGS},
    }
    parser = command_line.build_parser(sections, DESCRIPTION, {"batch_size": ["-b"], "workers": ["-j"]}, defaults=False)
    parser.usage = "%(prog)s [RUN_FOLDER | CHECKPOINT | DIR] [--model NAME] [--KEY VALUE ...]"
    parser.add_argument(
        "path", metavar="PATH", nargs="?", help="run folder or checkpoint; with --model, the data's folder"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights for --model")
    given = command_line.parse(parser, argv)
    path, checkpoint = given.pop("path", None), given.pop("checkpoint", None)
    own = own_settings({key: given.pop(key) for key in Own.model_fields if key in given})
    config.validate(given, dict.fromkeys(given, "command line"))  # mistakes in it come first

    for key in ("results_file", "confusion_matrix"):
        file = getattr(own, key)
        if file and not Path(file).parent.is_dir():
            raise ConfigError(f"{key}: {file}: no such folder")
    source = model_source(given, path, checkpoint)
    settings = source.settings
    with world(settings.compute.device) as here:
        with here.together():
            validation_set = open_validation_set(settings.data, own.test_set)
        by_class = own.per_class or own.confusion_matrix
        if by_class and validation_set.labels is not None:
            raise ConfigError(
                f"test_set: {own.test_set}: an image has several right classes, so there is no table of them"
            )
        found, results = validate_model(source, validation_set, here, own.use_ema)
        accuracy = found.accuracy()
        if here.is_main:
            _show(accuracy, settings.network.model)
            if own.results_file:
                replace_text(Path(own.results_file), json.dumps(results, indent=2) + "\n")
            if by_class:
                _show_classes(found, validation_set, own)
    return accuracy


def own_settings(given: Dict[str, Any]) -> Own:
    """The settings of this command alone; raises ConfigError for a value that is none."""
    return config.own_settings(Own, given)


def _show(accuracy: Accuracy, name: str) -> None:
    say(
        f"{name}: top-1 {accuracy.top1:.3f}  top-5 {accuracy.top5:.3f}  loss {accuracy.loss:.6f}  "
        f"({accuracy.num_images} images, each counted once)"
    )


def _show_classes(found: PerImageResults, validation_set: ValidationSet, own: Own) -> None:
    """Accuracy by class, and the confusion matrix (classes, classes) with the names as first row and column."""
    names = validation_set.classes or [str(n) for n in range(int(torch.cat([found.target, found.predicted]).max()) + 1)]
    names = names if validation_set.columns is None else [names[column] for column in validation_set.columns]
    confusion = found.confusion(len(names))
    if own.per_class:
        width = max(map(len, names))
        for name, row, right in zip(names, confusion.sum(dim=1).tolist(), confusion.diag().tolist()):
            accuracy = f"{100 * right / row:7.3f}" if row else "      -"
            say(f"{name:<{width}}  top-1 {accuracy}  ({right} of {row} images)")
    if own.confusion_matrix:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["", *names])
        writer.writerows([name, *row] for name, row in zip(names, confusion.tolist()))
        replace_text(Path(own.confusion_matrix), text.getvalue())
        say(f"confusion matrix of {len(names)} classes in {own.confusion_matrix}")
