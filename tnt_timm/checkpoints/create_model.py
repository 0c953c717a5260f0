"""From the settings to a network: its architecture, and the weights that it starts from.

Three settings say where training starts: `pretrained` (the published weights), `pretrained_path` (a file, taken as if it
were published: adapted to head and image size) and `initial_checkpoint` (a file that fits as it is).
"""

import contextlib
import logging
import re
from pathlib import Path
from typing import Any, Container, Dict, Mapping, Optional, Sequence, Set, Tuple

import timm
import torch
from torch import Tensor, nn

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm import ops
from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError, one_line
from tnt_timm.models import TNT, convert_weights
from tnt_timm.settings.schema import Network, TrainConfig

_logger = logging.getLogger(__name__)
MESSAGE = 600  # characters of others' messages; the one on published weights says how to get them


def create_model(
    config: TrainConfig, num_classes: int, continuing: bool = False, classes: Optional[Sequence[str]] = None
) -> Tuple[nn.Module, Dict[str, Any]]:
    """The model, and the arguments that recreate its architecture.

    Args:
        config: of the run.
        num_classes: size of the head.
        continuing: the weights will come from the run's own checkpoint, so no other is read or fetched.
        classes: names of the data's, where known.

    Raises:
        UserError: arguments that the model does not take, or weights that are not there or not its own.
    """
    network = config.network
    arguments = architecture(network, num_classes)
    training_only = dict(drop_rate=network.drop or None, drop_path_rate=network.drop_path)
    if continuing:
        return timm_model(network.model, arguments, training_only)
    if network.initial_checkpoint:
        model, arguments = timm_model(network.model, arguments, training_only)
        _load_initial(model, network.initial_checkpoint, classes)
        return model, arguments
    if network.pretrained_path:
        return adapted_model(network.model, arguments, network.pretrained_path, training_only, classes)[:2]
    return timm_model(network.model, arguments, dict(training_only, pretrained=network.pretrained))


def architecture(network: Network, num_classes: Optional[int]) -> Dict[str, Any]:
    """The arguments that, with the model's name, say what the network is."""
    arguments = dict(num_classes=num_classes, global_pool=network.gp, img_size=network.img_size)
    return {**network.model_kwargs, **{name: value for name, value in arguments.items() if value is not None}}


def timm_model(
    name: str, arguments: Dict[str, Any], more: Optional[Mapping[str, Any]] = None
) -> Tuple[nn.Module, Dict[str, Any]]:
    """`timm.create_model`, with its refusals as one line; networks that take any image size need not be told one.

    Args:
        name: of the model.
        arguments: that say what the network is.
        more: that say how it is trained or loaded.

    Returns:
        The model, and those of the arguments that it took.
    """
    try:
        return timm.create_model(name, **arguments, **(more or {})), arguments
    except TypeError as error:
        if "'img_size'" in str(error) and "img_size" in arguments:
            return timm_model(name, {k: v for k, v in arguments.items() if k != "img_size"}, more)
        raise UserError(f"model_kwargs: {name}: {one_line(error)}") from None
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"model: {name}: {one_line(error, MESSAGE).removeprefix(f'{name}: ')}") from None


def adapted_model(
    name: str,
    arguments: Dict[str, Any],
    path: str,
    more: Optional[Mapping[str, Any]] = None,
    classes: Optional[Sequence[str]] = None,
) -> Tuple[nn.Module, Dict[str, Any], bool]:
    """The model with the weights of a file, which timm takes for published ones: it fits their names and positions.

    A head of the right size is kept; another, or one for classes of other names, is left out. All else has to be there and
    to fit: timm by itself no longer asks for that once the head is another.

    Args:
        name, arguments, more: as of `timm_model`; without num_classes, the file's number of classes is taken.
        path: the file, or a run folder.
        classes: names of the data's, where known.

    Returns:
        The model, the arguments that it took, and whether (a part of) its head is new.

    Raises:
        UserError: the file cannot be read, or holds weights of another architecture.
    """
    path = str(file_format.find(Path(path)))
    state = file_format.read(Path(path))
    weights = file_format.weights_of(state, place=path)
    random_state = torch.get_rng_state()
    fresh, arguments = timm_model(name, arguments, more)
    heads = _head_of(fresh)
    theirs = _other_classes(state, classes)
    if theirs:
        weights = {key: value for key, value in weights.items() if key not in heads}
        _logger.info(
            "%s: its head is for other classes (%s, ...), so a new one is trained", path, ", ".join(theirs[:3])
        )
    in_file = next((len(weights[key]) for key in heads if isinstance(weights.get(key), Tensor)), fresh.num_classes)
    if "num_classes" not in arguments and in_file != fresh.num_classes:
        return adapted_model(name, {**arguments, "num_classes": in_file}, path, more, classes)

    def load(num_classes: int) -> nn.Module:
        source = dict(state_dict=weights, file=path, source=None, num_classes=num_classes, label_offset=None)
        torch.set_rng_state(random_state)  # what is new in the head has the same bits each time
        return timm.create_model(name, **arguments, **(more or {}), pretrained=True, pretrained_cfg_overlay=source)

    try:
        try:
            model = load(fresh.num_classes)  # as many classes as the model's, says this, so timm loads all strictly
        except RuntimeError as error:
            misfits = _misfits(error)
            if not misfits or misfits - heads.keys():
                raise
            model = load(-1)  # another number, so timm leaves the head out, and everything else was found to fit
            _logger.info("%s: fitted to %s, whose head is new: %d classes", path, name, model.num_classes)
    except Exception as error:  # a model's own filter meets a file of any kind; what it stumbles over is its own
        raise UserError(f"pretrained_path: {path}: {_why_not(error, heads).removeprefix(f'{path}: ')}") from None
    model.pretrained_cfg.pop("state_dict", None)  # timm keeps what it loaded from
    new = any(torch.equal(model.state_dict()[key], value) for key, value in heads.items() if value.ndim > 1)
    return model, arguments, new


def _head_of(model: nn.Module) -> Dict[str, Tensor]:
    """The tensors of the classifier, or of both where there are two."""
    names = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}


def _misfits(error: Exception) -> Set[str]:
    """The tensors that torch's strict loading complains of: missing, unknown, or of another shape."""
    return {quoted or named for quoted, named in re.findall(r'"([^"]+)"|size mismatch for ([^:]+):', str(error))}


def _why_not(error: Exception, heads: Container[str]) -> str:
    misfits = sorted(name for name in _misfits(error) if name not in heads)
    if not isinstance(error, RuntimeError) or not misfits:
        return one_line(error, MESSAGE)
    more = f" and {len(misfits) - 3} more tensors" if len(misfits) > 3 else ""
    return f"weights of another architecture: missing, unknown or of another shape are {', '.join(misfits[:3])}{more}"


def _other_classes(state: Mapping[str, Any], classes: Optional[Sequence[str]]) -> Sequence[str]:
    """The names of a checkpoint's classes, where they are known and are not the data's."""
    theirs = state.get("classes")
    return theirs if theirs and classes is not None and list(theirs) != list(classes) else ()


def _load_initial(model: nn.Module, path: str, classes: Optional[Sequence[str]]) -> None:
    path = str(file_format.find(Path(path)))
    state = file_format.read(Path(path))
    weights = file_format.weights_of(state, place=path)
    theirs = _other_classes(state, classes)
    if theirs and len(theirs) == len(classes):
        _logger.info(
            "notice: %s: its head is for other classes (%s, ...) and is kept; --pretrained-path would start a new one",
            path,
            ", ".join(theirs[:3]),
        )
    try:
        file_format.load_weights(model, weights, path)
    except UserError as error:
        if not _adaptable(model, weights):
            raise
        raise UserError(
            f"initial_checkpoint: {error}; to adapt head and positions, pass it as --pretrained-path instead"
        ) from None


def _adaptable(model: nn.Module, weights: Mapping[str, Any]) -> bool:
    """Whether weights that do not fit differ in head or positions only."""
    if isinstance(model, TNT):
        with contextlib.suppress(ValueError):
            return bool(convert_weights.adapt(weights, model))
        return False
    heads = _head_of(model)
    theirs, ours = ({k: v.shape for k, v in w.items() if k not in heads} for w in (weights, model.state_dict()))
    return theirs.keys() == ours.keys() and all(theirs[k] == ours[k] for k in ours if "pos" not in k)


def try_forward(model: nn.Module, input_size: Tuple[int, int, int], num_classes: int) -> None:
    """Find out now, not in the first step, whether image and logits have the shapes that training needs.

    Raises:
        UserError: they have not.
    """
    try:
        # not inference_mode, whose tensors a model may keep and then cannot train with
        with torch.no_grad(), ops.silent():
            shape = tuple(model.eval()(torch.zeros(1, *input_size)).shape)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise UserError(
            f"model: it does not take images of {input_size}: {one_line(error)}; see model_kwargs"
        ) from None
    if shape != (1, num_classes):
        raise UserError(f"model: its output has shape {shape} instead of (1, {num_classes}); see model_kwargs and gp")
