"""Export: `python scripts/export.py output/digits --output exported --formats timm onnx`."""

from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Sequence, Tuple

from pydantic import Field

from tnt_timm.checkpoints.open_model import open_model, preprocessing_for
from tnt_timm.commands.runner import run
from tnt_timm.console import say
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.export.formats import FORMATS, OPSET, check_packages
from tnt_timm.export.formats import export as write_and_check
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group

DESCRIPTION = """Write a model in formats that other programs read. Each file is loaded back and compared with the model before it
takes its place. INPUT is a run folder, a checkpoint of this project (which says itself what it is), a file of weights with
--model NAME, a folder that timm reads, or with --pretrained a model of timm's."""


class Own(Group):
    """What to write"""

    output: str = Field("", description="folder for the files; made where it is missing")
    formats: List[Literal[tuple(FORMATS)]] = Field(
        ["timm"], min_length=1, description=f"one or more of {', '.join(FORMATS)}"
    )
    model: str = Field("", description="the model that a file of weights belongs to")
    model_kwargs: Dict[str, Any] = Field({}, description="arguments of the model, as name=value")
    pretrained: bool = Field(False, description="INPUT is a model's name, and its published weights are wanted")
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square input in pixels (default: the model's)")
    num_classes: Optional[int] = Field(None, ge=0, description="0 leaves the head out")
    timm_names: bool = Field(False, description="give a TNT timm's own name, so that it loads without this package")
    opset: int = Field(OPSET, gt=0, description="version of ONNX's operators")
    batch_size: int = Field(2, ge=2, description="of the example; the files take batches of any size")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(export, argv)


def export(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: the input cannot be used, or a format cannot be written or does not compute the same.
    """
    given, own = _parse(argv)
    check_packages(own.formats)  # before the slow part
    asked = dict(own.model_kwargs, **({} if own.img_size is None else {"img_size": own.img_size}))
    opened = open_model(given, own.model, asked, own.pretrained)
    model, classes = opened.model, opened.classes
    if opened.new_head and own.num_classes != 0:
        raise UserError(f"{given}: holds no head for {opened.name}; pass --num-classes 0 to do without")
    if own.num_classes == 0:
        model.reset_classifier(0)
        classes = None
    elif own.num_classes not in (None, model.num_classes):
        raise UserError(
            f"num_classes: {own.num_classes}: {given} is for {model.num_classes} classes; 0 leaves the head out"
        )
    preprocessing = preprocessing_for(opened.preprocessing, own.img_size)
    for done in write_and_check(
        model, Path(own.output), own.formats, classes, preprocessing, own.timm_names, own.opset, own.batch_size
    ):
        names = " and ".join(file.name for file in done.files)
        say(
            f"{done.format:<12}  {names} in {own.output}: {done.size / 1e6:.1f} MB, largest difference "
            f"{done.difference:.1e} (largest logit {done.largest:.3g})"
        )


def _parse(argv: Sequence[str]) -> Tuple[str, Own]:
    parser = command_line.build_parser({Own.__doc__: Own.model_fields}, DESCRIPTION, {})
    parser.usage = "%(prog)s INPUT --output FOLDER [--formats FORMAT ...] [--KEY VALUE ...]"
    parser.add_argument("input", metavar="INPUT", nargs="?", help="run folder, checkpoint, weights or name of a model")
    given = command_line.parse(parser, argv)
    source = given.pop("input", None)
    if source is None:
        raise ConfigError("command line: nothing to export; give a run folder, a checkpoint or a model's name")
    if not given.get("output"):
        raise ConfigError("command line: output: missing; say with --output where the files shall go")
    return source, config.own_settings(Own, given)
