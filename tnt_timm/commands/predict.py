"""Predict: `python scripts/predict.py output/digits photos/ https://.../cat.jpg --top-k 3`."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Sequence, Tuple

from pydantic import Field

from tnt_timm import files
from tnt_timm.checkpoints.open_model import open_model
from tnt_timm.commands.runner import run
from tnt_timm.console import say
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.evaluation.image_files import NamedImages, find
from tnt_timm.evaluation.inputs import evaluation_loader
from tnt_timm.evaluation.prediction import Predictions, as_text, class_names, predict
from tnt_timm.runtime.distributed import world
from tnt_timm.runtime.precision import autocast, set_up_torch
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Compute, Group

DESCRIPTION = """Name what is on images. SOURCE is a run folder, a checkpoint of this project (which says itself what it is), a
file of weights with --model NAME, a folder that timm reads, hf-hub:..., or with --pretrained a model of timm's. IMAGE is a file,
a folder, which is searched with all folders in it, or a URL. Images that cannot be read are named and left out, and the exit
status is then 1."""


class Own(Group):
    """What to predict, and where to"""

    top_k: int = Field(5, gt=0, description="classes per image")
    format: Literal["table", "json", "csv"] = Field("table", description="of the output")
    output: str = Field("", description="file for it instead of the terminal")
    upright: bool = Field(False, description="turn photographs as their EXIF data says; training and validation do not")
    model: str = Field("", description="the model that a file of weights belongs to")
    model_kwargs: Dict[str, Any] = Field({}, description="arguments of the model, as name=value")
    pretrained: bool = Field(False, description="SOURCE is a model's name, and its published weights are wanted")
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square input in pixels (default: the model's)")
    batch_size: int = Field(32, gt=0, description="images at once")
    workers: int = Field(0, ge=0, description="processes that read images; 0 reads them in this one")
    device: Literal["auto", "cuda", "cpu"] = Compute.model_fields["device"]
    amp: bool = Compute.model_fields["amp"]
    amp_dtype: Literal["float16", "bfloat16"] = Compute.model_fields["amp_dtype"]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(predict_images, argv)


def predict_images(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: the model cannot be used, or an image could not be read; the others' classes are written by then.
    """
    source, inputs, own = _parse(argv)
    with contextlib.redirect_stdout(sys.stderr):  # the answer is alone on stdout
        names, passed_over = find(inputs)
        if passed_over:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(5))
            say(f"notice: passed over in folders, for their suffix: {kinds}")
        if not names:
            raise UserError(f"{', '.join(inputs)}: no images in there")
        if not any(name.startswith(("http://", "https://")) or os.path.exists(name) for name in names):
            raise UserError(f"{names[0]}: no such file or folder{' (nor any other of them)' * (len(names) > 1)}")
        predictions = _predict(source, names, own)
        for damage in predictions.damaged:
            say(f"left out: {damage.name}: {damage.reason}")
        if predictions.turned:
            say(f"notice: EXIF data says to turn {predictions.turned} of the images; --upright does")
    if predictions.found:
        text = as_text(predictions.found, own.format)
        if own.output:
            files.replace_text(Path(own.output), text)
        else:
            say(text.rstrip("\n"))
    if predictions.damaged:
        raise UserError(f"{len(predictions.damaged)} of {len(names)} images could not be read; they are named above")


def _predict(source: str, names: Sequence[str], own: Own) -> Predictions:
    asked = dict(own.model_kwargs, **({} if own.img_size is None else {"img_size": own.img_size}))
    opened = open_model(source, own.model, asked, own.pretrained)
    model = opened.model
    if opened.new_head or not model.num_classes:
        raise UserError(f"{source}: holds no head, so it knows no classes")
    called = class_names(model, opened.classes)
    if called is None:
        say("notice: the model does not say what its classes are called; they are numbered from 0")
    if own.top_k > model.num_classes and "top_k" in own.model_fields_set:
        say(f"notice: top_k: {own.top_k}: the model has {model.num_classes} classes; all are shown")
    with world(own.device) as here:
        images = NamedImages(names, own.upright)
        preprocessing = opened.data_config(own.img_size)
        loader = evaluation_loader(images, preprocessing, own.batch_size, own.workers, here)
        compute = Compute(device=own.device, amp=own.amp, amp_dtype=own.amp_dtype)
        set_up_torch(compute, here.device)
        in_precision = autocast(compute, here.device)
        return predict(model.to(here.device), loader, called, min(own.top_k, model.num_classes), in_precision)


def _parse(argv: Sequence[str]) -> Tuple[str, List[str], Own]:
    aliases = {"batch_size": ["-b"], "workers": ["-j"], "top_k": ["-k"]}
    parser = command_line.build_parser({Own.__doc__: Own.model_fields}, DESCRIPTION, aliases)
    parser.usage = "%(prog)s SOURCE IMAGE [IMAGE ...] [--KEY VALUE ...]"
    parser.add_argument("source", metavar="SOURCE", help="run folder, checkpoint, weights or name of a model")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="file, folder or URL")
    given = command_line.parse(parser, argv)
    source, inputs = given.pop("source"), given.pop("images")
    own = config.own_settings(Own, given)
    if own.output and not Path(own.output).parent.is_dir():
        raise ConfigError(f"command line: output: {own.output}: no such folder")
    return source, inputs, own
