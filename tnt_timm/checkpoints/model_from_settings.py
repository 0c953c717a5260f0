"""Create the network that the settings describe, with the weights that training starts from.

Three settings name these weights: `pretrained` (the published ones), `pretrained_path` (a file that is treated like published
weights: adapted to head and image size) and `initial_checkpoint` (a file that fits as it is).
"""

import logging
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from torch import nn

from tnt_timm import ops
from tnt_timm.checkpoints.open_model import FOLDER, load, other_classes, read_source, timm_model
from tnt_timm.errors import UserError, one_line
from tnt_timm.settings.schema import Network, TrainConfig

_logger = logging.getLogger(__name__)


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
    folder = network.model if network.pretrained and network.model.startswith(FOLDER) else ""
    file = network.pretrained_path or network.initial_checkpoint or folder
    if continuing or not file:
        return timm_model(network.model, arguments, {**more, "pretrained": network.pretrained and not continuing})
    exact = bool(network.initial_checkpoint)
    key = "initial_checkpoint" if exact else "model" if file == folder else "pretrained_path"
    try:
        source = read_source(file, network.model)
        ours = source.described.classes
        if exact and (others := other_classes(ours, classes)) and len(ours) == len(classes):
            kept = (
                f"{file}: its head is for other classes ({others}) and is kept; --pretrained-path would start a new one"
            )
            _logger.info("notice: %s", kept)
        opened = load(source, arguments, more, None if exact else classes, exact=exact)
    except UserError as error:
        raise type(error)(f"{key}: {error}") from None
    return opened.model, dict(opened.arguments)


def architecture(network: Network, num_classes: Optional[int]) -> Dict[str, Any]:
    """Return the arguments of `timm.create_model` that define the architecture, besides the model's name."""
    arguments = dict(num_classes=num_classes, global_pool=network.gp, img_size=network.img_size)
    return {**network.model_kwargs, **{name: value for name, value in arguments.items() if value is not None}}


def try_forward(model: nn.Module, input_size: Tuple[int, int, int], num_classes: int) -> None:
    """Check with one image that the model accepts it and returns the logits that are needed.

    Raises:
        UserError: it does not.
    """
    try:
        # not inference_mode, whose tensors a model may keep and then cannot train with
        with torch.no_grad(), ops.silent():
            shape = tuple(model.eval()(torch.zeros(1, *input_size)).shape)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"model: it does not accept images of {input_size}: {one_line(error)}; see model_kwargs"
        ) from None
    if shape != (1, num_classes):
        raise UserError(f"model: its output has shape {shape} instead of (1, {num_classes}); see model_kwargs and gp")
