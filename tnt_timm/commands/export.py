"""Export a model to other formats: `tnt-export output/digits --output exported --formats timm onnx`."""

from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Sequence

from pydantic import NonNegativeInt, PositiveInt

from tnt_timm.checkpoints.open_model import open_model
from tnt_timm.commands.entry_point import run
from tnt_timm.console import say
from tnt_timm.errors import UserError
from tnt_timm.export.formats import FORMATS, OPSET, check_packages
from tnt_timm.export.formats import export as write_and_check
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group


class Settings(Group):
    """Export a model to formats that other programs read. Every file is reloaded and compared with the PyTorch model before it
    is written. INPUT is a run folder, a checkpoint of this project, a weights file with --model NAME, a timm folder, or with
    --pretrained a timm model name."""

    input: PathText = setting(about="a run folder, a checkpoint, a weights file or a model name", positional="INPUT")
    output: PathText = setting(about="output folder, created if it is missing", min_length=1)
    formats: List[Literal[tuple(FORMATS)]] = setting(["timm"], f"one or more of {', '.join(FORMATS)}", min_length=1)
    model: str = setting("", "model name for a weights file")
    model_kwargs: Dict[str, Any] = setting({}, "model arguments, as name=value")
    pretrained: bool = setting(False, "INPUT is a model name; use its published weights")
    img_size: Optional[PositiveInt] = setting(None, "input height and width, pixels (default: the model's)")
    num_classes: Optional[NonNegativeInt] = setting(None, "0 drops the head")
    timm_names: bool = setting(False, "use timm's name and parameters for a TNT, to load it without this package")
    opset: PositiveInt = setting(OPSET, "version of the ONNX operators")
    batch_size: int = setting(2, "batch size of the example; the files accept any", ge=2)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run(export, argv, Settings)


def export(settings: Settings) -> None:
    """Export the model.

    Raises:
        UserError: the input cannot be used, or a format cannot be written or computes something else.
    """
    check_packages(settings.formats)  # before the slow part
    size = {} if settings.img_size is None else {"img_size": settings.img_size}
    opened = open_model(settings.input, settings.model, {**settings.model_kwargs, **size}, settings.pretrained)
    model, classes = opened.model, opened.classes
    if opened.new_head and settings.num_classes != 0:
        raise UserError(
            f"{settings.input}: holds no head for {opened.name}; pass --num-classes 0 to export without one"
        )
    if settings.num_classes == 0:
        model.reset_classifier(0)
        classes = None
    elif settings.num_classes not in (None, model.num_classes):
        raise UserError(
            f"num_classes: {settings.num_classes}: {settings.input} is for {model.num_classes} classes; 0 drops the head"
        )
    for done in write_and_check(
        model,
        Path(settings.output),
        settings.formats,
        classes,
        dict(opened.preprocessing),
        settings.timm_names,
        settings.opset,
        settings.batch_size,
    ):
        names = " and ".join(file.name for file in done.files)
        say(
            f"{done.format:<12}  {names} in {settings.output}: {done.size / 1e6:.1f} MB, "
            f"largest difference {done.difference:.1e} (largest logit {done.largest:.3g})"
        )
