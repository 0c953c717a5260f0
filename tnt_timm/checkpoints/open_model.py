"""Open the model that a user names on the command line: a run folder, a checkpoint, a file of weights, or a model's name."""

from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import timm
from timm.data import resolve_data_config
from torch import nn

from tnt_timm.checkpoints import file_format
from tnt_timm.checkpoints.create_model import NOTHING, adapted_model, timm_model
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.export.folder import CONFIG
from tnt_timm.settings import command_line, config


class Opened(NamedTuple):
    """A network, and what its checkpoint says about it."""

    model: nn.Module
    name: str  # timm's, of the architecture
    classes: Optional[List[str]] = None
    preprocessing: Optional[Dict[str, Any]] = None  # if the checkpoint contains it
    settings: Mapping[str, Any] = MappingProxyType({})  # of the run that trained it
    trained: bool = True
    new_head: bool = False  # the file has no head that fits

    def data_config(self, img_size: Optional[int] = None) -> Dict[str, Any]:
        """Return input size, normalisation, resize and crop as `timm.data.resolve_data_config` does.

        Args:
            img_size: edge of the square input in pixels (default: the network's own).
        """
        return resolve_data_config(preprocessing_for(self.preprocessing, img_size), model=self.model)


def preprocessing_for(preprocessing: Optional[Mapping[str, Any]], img_size: Optional[int]) -> Dict[str, Any]:
    """Return the same preprocessing, for another image size if one is given."""
    if img_size is None:
        return dict(preprocessing or {})
    return {**{key: value for key, value in (preprocessing or {}).items() if key != "input_size"}, "img_size": img_size}


def open_model(
    given: str,
    model: str = "",
    arguments: Mapping[str, Any] = NOTHING,
    pretrained: bool = False,
    untrained: bool = False,
) -> Opened:
    """Create the model that a command line names, with its weights.

    Args:
        given: a run folder, a checkpoint of this project, a file of weights for `model`, a folder that timm reads, or a
            model's name.
        model: the name of the model that a file of weights belongs to.
        arguments: of the model, e.g. img_size. They override the checkpoint's, and its weights are adapted to them.
        pretrained: if `given` is a name, load its published weights.
        untrained: if `given` is a name, random weights are acceptable.

    Raises:
        UserError: there is no such model, or its weights cannot be read or do not fit.
    """
    path = Path(given)
    if path.exists() and pretrained:
        raise ConfigError(f"command line: pretrained: {given} has weights of its own; leave the setting out")
    if path.is_dir():
        try:
            path = file_format.find(path)
        except UserError:
            if not (path / CONFIG).is_file():
                raise UserError(
                    f"{path}: neither a run folder (no {file_format.BEST}) nor timm's (no {CONFIG})"
                ) from None
            given = f"local-dir:{path}"
    if path.is_file():
        return _open_file(path, model, arguments)
    if model:
        raise ConfigError(f"command line: model: {model}: {given} is no file of weights for it")
    from_folder = given.startswith(("local-dir:", "hf-hub:", "hf_hub:"))
    if not from_folder and not timm.is_model(given.split(".")[0]):
        hint = command_line.nearest(given, timm.list_models())
        raise ConfigError(f"command line: {given}: no such file, folder or model{hint}")
    trained = pretrained or from_folder
    if not (trained or untrained):
        raise UserError(f"{given}: has no weights; pass --pretrained for the published ones, or a file with --model")
    network, _ = timm_model(given, arguments, dict(pretrained=trained))
    return Opened(network, network.pretrained_cfg["architecture"], trained=trained)


def _open_file(path: Path, name: str, wanted: Mapping[str, Any]) -> Opened:
    """Open a checkpoint of this project or, if a model is named, weights of that model."""
    state = file_format.read(path)
    arguments, preprocessing = {}, None
    if name:
        config.check_model_name(name, "command line")
    elif "arch" in state:
        name, arguments, preprocessing = state["arch"], state.get("model_kwargs", {}), state.get("preprocessing")
    else:
        raise UserError(f"{path}: does not say what model it is; pass --model NAME")
    known = dict(classes=state.get("classes"), preprocessing=preprocessing, settings=state.get("config", {}))
    if arguments and all(arguments.get(key) == value for key, value in wanted.items()):
        model, _ = timm_model(name, arguments)
        file_format.load_weights(model, file_format.weights_of(state, place=str(path)), str(path))
        return Opened(model, name, **known)
    try:
        model, _, new_head = adapted_model(name, {**arguments, **wanted}, str(path))
    except UserError as error:
        raise UserError(str(error).removeprefix("pretrained_path: ")) from None  # a setting of train.py
    return Opened(model, name, **known, new_head=new_head)
