#!/usr/bin/env python3
"""Export: `python scripts/export.py output/digits --output exported --formats timm onnx`.

Wiring only; the work is in tnt_timm/export/.
"""

import sys
from pathlib import Path
from typing import Any, Dict, List, Literal, NamedTuple, Optional, Sequence, Tuple

import timm
from pydantic import Field, ValidationError
from torch import nn

from tnt_timm.console import run, say
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.export.folder import CONFIG
from tnt_timm.export.formats import FORMATS, OPSET, check_packages
from tnt_timm.export.formats import export as write_and_check
from tnt_timm.training import checkpointing, command_line, config
from tnt_timm.training.network import adapted_model, timm_model
from tnt_timm.training.schema import Group

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


class Source(NamedTuple):
    model: nn.Module
    classes: Optional[List[str]] = None
    preprocessing: Optional[Dict[str, Any]] = None


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    return run(export, argv)


def export(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: the input cannot be used, or a format cannot be written or does not compute the same.
    """
    given, own = _parse(argv)
    check_packages(own.formats)  # before the slow part
    model, classes, preprocessing = _open(given, own)
    if own.num_classes == 0:
        model.reset_classifier(0)
        classes = None
    elif own.num_classes not in (None, model.num_classes):
        raise UserError(
            f"num_classes: {own.num_classes}: {given} is for {model.num_classes} classes; 0 leaves the head out"
        )
    if own.img_size is not None:
        kept = {key: value for key, value in (preprocessing or {}).items() if key != "input_size"}
        preprocessing = {**kept, "img_size": own.img_size}
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
    try:
        return source, Own(**given)
    except ValidationError as error:
        raise ConfigError(config.first_mistake(error, dict.fromkeys(given, "command line"))) from None


def _open(given: str, own: Own) -> Source:
    """The model that the command line means, with its weights."""
    path = Path(given)
    asked = dict(own.model_kwargs, **({} if own.img_size is None else {"img_size": own.img_size}))
    if path.exists() and own.pretrained:
        raise ConfigError(f"command line: pretrained: {given} has weights of its own; leave the setting out")
    if path.is_dir():
        found = [path / name for name in (checkpointing.BEST, checkpointing.LAST) if (path / name).is_file()]
        if not found and not (path / CONFIG).is_file():
            raise UserError(f"{path}: neither a run folder (no {checkpointing.BEST}) nor timm's (no {CONFIG})")
        path, given = (found[0], given) if found else (path, f"local-dir:{path}")
    if path.is_file():
        return _open_file(path, own, asked)
    if own.model:
        raise ConfigError(f"command line: model: {own.model}: {given} is no file of weights for it")
    from_folder = given.startswith(("local-dir:", "hf-hub:", "hf_hub:"))
    if not from_folder and not timm.is_model(given.split(".")[0]):
        hint = command_line.nearest(given, timm.list_models())
        raise ConfigError(f"command line: {given}: no such file, folder or model{hint}")
    if not (own.pretrained or from_folder):
        raise UserError(f"{given}: has no weights; pass --pretrained for the published ones, or a file with --model")
    return Source(timm_model(given, asked, dict(pretrained=True))[0])


def _open_file(path: Path, own: Own, asked: Dict[str, Any]) -> Source:
    """A checkpoint of this project, or weights of the model that the command line names."""
    state = checkpointing.read(path)
    name, arguments, preprocessing = own.model, {}, None
    if name:
        config.check_model_name(name, "command line")
    elif "arch" in state:
        name, arguments, preprocessing = state["arch"], state.get("model_kwargs", {}), state.get("preprocessing")
    else:
        raise UserError(f"{path}: does not say what model it is; pass --model NAME")
    if "model_kwargs" in state and not own.model and all(arguments.get(key) == value for key, value in asked.items()):
        model, _ = timm_model(name, arguments)
        checkpointing.load_weights(model, checkpointing.weights_of(state, place=str(path)), str(path))
        return Source(model, state.get("classes"), preprocessing)
    try:
        model, _, new_head = adapted_model(name, {**arguments, **asked}, str(path))
    except UserError as error:
        raise UserError(str(error).removeprefix("pretrained_path: ")) from None  # as train.py calls it
    if new_head and own.num_classes != 0:
        raise UserError(f"{path}: holds no head for {name}; pass --num-classes 0 to do without")
    return Source(model, state.get("classes"), preprocessing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
