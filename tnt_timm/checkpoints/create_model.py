"""Create the network that the settings describe, with the weights that training starts from.

Three settings name these weights: `pretrained` (the published ones), `pretrained_path` (a file that is treated like published
weights: adapted to head and image size) and `initial_checkpoint` (a file that fits as it is).
"""

import logging
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, Mapping, Optional, Sequence, Set, Tuple

import timm
import torch
from torch import Tensor, nn

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm import ops
from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError, one_line
from tnt_timm.settings.schema import Network, TrainConfig

_logger = logging.getLogger(__name__)
LIMIT = 600  # characters of timm's messages: the one on published weights says how to get them
NOTHING: Mapping[str, Any] = MappingProxyType({})


def create_model(
    config: TrainConfig, num_classes: int, continuing: bool = False, classes: Optional[Sequence[str]] = None
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Create the model that a run trains.

    Args:
        config: of the run.
        num_classes: size of the head.
        continuing: the weights will come from the run's own checkpoint, so no others are read or downloaded.
        classes: names of the dataset's classes, if known.

    Returns:
        The model, and the arguments that recreate its architecture.

    Raises:
        UserError: arguments that the model does not accept, or weights that are missing or do not fit.
    """
    network = config.network
    arguments = architecture(network, num_classes)
    more = dict(drop_rate=network.drop or None, drop_path_rate=network.drop_path)
    if continuing:
        return timm_model(network.model, arguments, more)
    if network.pretrained_path:
        return adapted_model(network.model, arguments, network.pretrained_path, more, classes)[:2]
    more["pretrained"] = network.pretrained and not network.initial_checkpoint
    model, arguments = timm_model(network.model, arguments, more)
    if network.initial_checkpoint:
        _load_initial(model, network, arguments, classes)
    return model, arguments


def architecture(network: Network, num_classes: Optional[int]) -> Dict[str, Any]:
    """Return the arguments of `timm.create_model` that define the architecture, besides the model's name."""
    arguments = dict(num_classes=num_classes, global_pool=network.gp, img_size=network.img_size)
    return {**network.model_kwargs, **{name: value for name, value in arguments.items() if value is not None}}


def timm_model(
    name: str, arguments: Mapping[str, Any], more: Mapping[str, Any] = NOTHING
) -> Tuple[nn.Module, Dict[str, Any]]:
    """Call `timm.create_model`. An `img_size` is dropped if the network accepts any size and has no such argument.

    Args:
        name: of the model.
        arguments: of the architecture.
        more: arguments of training and loading.

    Returns:
        The model, and the arguments that it accepted.

    Raises:
        UserError: timm refuses.
    """
    try:
        return timm.create_model(name, **arguments, **more), dict(arguments)
    except TypeError as error:
        if "'img_size'" in str(error) and "img_size" in arguments:
            return timm_model(name, {key: value for key, value in arguments.items() if key != "img_size"}, more)
        raise UserError(f"model_kwargs: {name}: {one_line(error)}") from None
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"model: {name}: {one_line(error, LIMIT).removeprefix(f'{name}: ')}") from None


def adapted_model(
    name: str,
    arguments: Mapping[str, Any],
    path: str,
    more: Mapping[str, Any] = NOTHING,
    classes: Optional[Sequence[str]] = None,
) -> Tuple[nn.Module, Dict[str, Any], bool]:
    """Create a model with the weights of a file, which timm adapts like published ones: names, positions, channels.

    The head is kept if it has the right size and its classes have the right names. Otherwise it is new. Everything else must
    be in the file and fit: timm alone does not check that if the head is new.

    Args:
        name, arguments, more: as of `timm_model`. Without num_classes, the file's number of classes is used.
        path: the file, or a run folder.
        classes: names of the dataset's classes, if known.

    Returns:
        The model, the arguments that it accepted, and whether its head, or one of its two heads, is new.

    Raises:
        UserError: the file cannot be read, or contains weights of another architecture.
    """
    path = str(file_format.find(Path(path)))
    state = file_format.read(Path(path))
    weights = file_format.weights_of(state, place=path)
    random_state = torch.get_rng_state()
    fresh, arguments = timm_model(name, arguments, more)
    head = _head_of(fresh)
    if others := _other_classes(state, classes):
        weights = {key: value for key, value in weights.items() if key not in head}
        _logger.info("%s: its head is for other classes (%s), so a new one is trained", path, others)
    in_file = next((len(weights[key]) for key in head if isinstance(weights.get(key), Tensor)), fresh.num_classes)
    if "num_classes" not in arguments and in_file != fresh.num_classes:
        return adapted_model(name, {**arguments, "num_classes": in_file}, path, more, classes)

    def load(num_classes: int) -> nn.Module:
        source = dict(state_dict=weights, file=path, source=None, num_classes=num_classes, label_offset=None)
        torch.set_rng_state(random_state)  # a new head gets the same random weights each time
        return timm.create_model(name, **arguments, **more, pretrained=True, pretrained_cfg_overlay=source)

    try:
        try:
            model = load(fresh.num_classes)  # timm loads strictly if model and file claim the same number of classes
        except RuntimeError as error:
            misfits = _misfits(error)
            if not misfits or misfits - head.keys():
                raise
            model = load(-1)  # with another number timm leaves out the head; everything else is known to fit
            _logger.info("%s: adapted to %s with a new head of %d classes", path, name, model.num_classes)
    except Exception as error:  # a model's own filter may fail in any way on weights that are not its own
        raise UserError(f"pretrained_path: {path}: {_why_not(error, head).removeprefix(f'{path}: ')}") from None
    model.pretrained_cfg.pop("state_dict", None)  # or timm would keep the weights of the file in memory
    loaded = model.state_dict()
    is_new = any(torch.equal(loaded[key], value) for key, value in head.items() if value.ndim > 1)
    return model, arguments, is_new


def _head_of(model: nn.Module) -> Dict[str, Tensor]:
    """Return the tensors of the classifier, or of both if there are two."""
    names = model.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return {key: value for key, value in model.state_dict().items() if key.startswith(prefixes)}


def _misfits(error: Exception) -> Set[str]:
    """Return the tensors that torch's strict loading complains about: missing, unknown, or of another shape."""
    return {quoted or named for quoted, named in re.findall(r'"([^"]+)"|size mismatch for ([^:]+):', str(error))}


def _why_not(error: Exception, head: Mapping[str, Tensor]) -> str:
    misfits = sorted(_misfits(error) - head.keys()) if isinstance(error, RuntimeError) else []
    if not misfits:
        return one_line(error, LIMIT)
    more = f" and {len(misfits) - 3} more tensors" if len(misfits) > 3 else ""
    return f"weights of another architecture: missing, unknown or of another shape: {', '.join(misfits[:3])}{more}"


def _other_classes(state: Mapping[str, Any], classes: Optional[Sequence[str]]) -> str:
    """Return the first names of a checkpoint's classes, if they are known and differ from the dataset's."""
    names = state.get("classes")
    return ", ".join([*names[:3], "..."]) if names and classes is not None and list(names) != list(classes) else ""


def _load_initial(
    model: nn.Module, network: Network, arguments: Mapping[str, Any], classes: Optional[Sequence[str]]
) -> None:
    path = str(file_format.find(Path(network.initial_checkpoint)))
    state = file_format.read(Path(path))
    others = _other_classes(state, classes)
    if others and len(state["classes"]) == len(classes):
        _logger.info(
            "notice: %s: its head is for other classes (%s) and is kept; --pretrained-path would start a new one",
            path,
            others,
        )
    try:
        file_format.load_weights(model, file_format.weights_of(state, place=path), path)
    except UserError as error:
        logging.disable()  # the attempt to adapt would log what becomes of the weights
        try:
            adapted_model(network.model, arguments, path, classes=classes)
        except UserError:
            raise error from None
        finally:
            logging.disable(logging.NOTSET)
        raise UserError(
            f"initial_checkpoint: {error}; to adapt head and positions, pass it as --pretrained-path instead"
        ) from None


def try_forward(model: nn.Module, input_size: Tuple[int, int, int], num_classes: int) -> None:
    """Check with one image that the model accepts it and returns the logits that training needs.

    Raises:
        UserError: it does not.
    """
    try:
        # not inference_mode, whose tensors a model may keep and then cannot train with
        with torch.no_grad(), ops.silent():
            shape = tuple(model.eval()(torch.zeros(1, *input_size)).shape)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise UserError(
            f"model: it does not accept images of {input_size}: {one_line(error)}; see model_kwargs"
        ) from None
    if shape != (1, num_classes):
        raise UserError(f"model: its output has shape {shape} instead of (1, {num_classes}); see model_kwargs and gp")
