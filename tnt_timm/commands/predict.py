"""Classify images: `tnt-predict output/digits photos/ https://.../cat.jpg --top-k 3`."""

import contextlib
import os
import sys
from typing import Any, Dict, List, Literal, Optional, Sequence

from pydantic import NonNegativeInt, PositiveInt

from tnt_timm.checkpoints.model_from_settings import try_forward
from tnt_timm.checkpoints.open_model import open_model
from tnt_timm.commands.entry_point import put, run
from tnt_timm.console import say
from tnt_timm.errors import UserError
from tnt_timm.evaluation.data_from_settings import evaluation_loader
from tnt_timm.evaluation.downloads import is_url
from tnt_timm.evaluation.image_files import NamedImages, find, unknown_scheme
from tnt_timm.evaluation.prediction import Predictions, as_text, class_names, predict
from tnt_timm.runtime.distributed import choose_device, world
from tnt_timm.runtime.launch import ALONE
from tnt_timm.runtime.precision import autocast, set_up_torch
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Compute, Group, OutputFile


class Settings(Group):
    """Classify images. SOURCE is a run folder, a checkpoint of this project, a weights file with --model NAME, a timm folder,
    hf-hub:..., or with --pretrained a timm model name. IMAGE is a file, a URL, or a folder, which is searched recursively.
    URLs are those of http and https; a download may take 2 minutes and 200 MiB. Unreadable images are listed and skipped, and
    the exit status is then 1."""

    source: PathText = setting(about="a run folder, a checkpoint, a weights file or a model name", positional="SOURCE")
    images: List[PathText] = setting(about="files, folders or URLs", positional="IMAGE")
    top_k: PositiveInt = setting(5, "classes per image", flag="-k")
    format: Literal["table", "json", "csv"] = setting("table", "output format")
    output: OutputFile = setting("", "output file (default: the terminal)")
    upright: bool = setting(False, "rotate images as their EXIF data says; training and validation do not")
    model: str = setting("", "model name for a weights file")
    model_kwargs: Dict[str, Any] = setting({}, "model arguments, as name=value")
    pretrained: bool = setting(False, "SOURCE is a model name; use its published weights")
    img_size: Optional[PositiveInt] = setting(None, "input height and width, pixels (default: the model's)")
    batch_size: PositiveInt = setting(32, "images per batch", flag="-b")
    workers: NonNegativeInt = setting(0, "loader workers; 0 loads in this process", flag="-j")
    device: Literal["auto", "cuda", "cpu"] = Compute.model_fields["device"]
    amp: bool = Compute.model_fields["amp"]
    amp_dtype: Literal["float16", "bfloat16"] = Compute.model_fields["amp_dtype"]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run(predict_images, argv, Settings)


def predict_images(settings: Settings) -> None:
    """Classify the images, and print or write the result.

    Raises:
        UserError: the model cannot be used, or an image cannot be read; the other images' classes are written first.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout has the result and nothing else
        names, left_out = find(settings.images)
        if left_out:
            say(f"notice: files left out: {', '.join(f'{count} {kind}' for kind, count in left_out.most_common(5))}")
        if not names:
            raise UserError(f"{', '.join(settings.images)}: no images found")
        if not any(is_url(name) or os.path.exists(name) for name in names):
            others = f", nor any of the {len(names) - 1} others" if len(names) > 1 else ""
            raise UserError(f"{names[0]}: {unknown_scheme(names[0]) or f'no such file or folder{others}'}")
        predictions = _predict(settings, names)
        for damage in predictions.damaged:
            say(f"skipped: {damage.name}: {damage.reason}")
        if predictions.turned:
            say(
                f"notice: images rotated by their EXIF data: {predictions.turned}; pass --upright to apply the rotation"
            )
    if predictions.found:
        put(as_text(predictions.found, settings.format), settings.output)
    if predictions.damaged:
        raise UserError(f"{len(predictions.damaged)} of {len(names)} images could not be read; they are listed above")


def _predict(settings: Settings, names: Sequence[str]) -> Predictions:
    size = {} if settings.img_size is None else {"img_size": settings.img_size}
    opened = open_model(settings.source, settings.model, {**settings.model_kwargs, **size}, settings.pretrained)
    num_classes = opened.model.num_classes
    if opened.new_head or not num_classes:
        raise UserError(f"{settings.source}: the model has no head; pass one that was trained for classification")
    called = class_names(opened.model, opened.classes)
    if called is None:
        say("notice: the model has no class names; classes are numbered from 0")
    if settings.top_k > num_classes and "top_k" in settings.model_fields_set:
        say(f"notice: top_k: {settings.top_k}: the model has {num_classes} classes; all are shown")
    compute = Compute(device=settings.device, amp=settings.amp, amp_dtype=settings.amp_dtype)
    with world(choose_device(settings.device, ALONE)) as here:
        set_up_torch(compute, here.device)
        images = NamedImages(names, settings.upright)
        preprocessing = opened.data_config()
        try_forward(opened.model, preprocessing["input_size"], num_classes)
        loader = evaluation_loader(images, preprocessing, settings.batch_size, settings.workers, here)
        model, top_k = opened.model.to(here.device), min(settings.top_k, num_classes)
        return predict(model, loader, called, top_k, autocast(compute, here.device))
