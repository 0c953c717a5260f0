"""Freeze a part of a network: no gradient, no weight decay, no dropout and no new batch statistics."""

from typing import List

from timm.models._manipulate import group_parameters
from torch import nn

from tnt_timm.errors import UserError


def freeze(model: nn.Module, what: str) -> List[nn.Module]:
    """Freeze a part of a timm model: its parameters no longer require gradients.

    Args:
        model: is changed in place.
        what: "backbone" for all but the classifiers; a number for the stem and that many of the first blocks (or whatever
            stages the model's `group_matcher` names); "" for nothing.

    Returns:
        The modules that must stay in evaluation mode while the others train.

    Raises:
        UserError: the model has no such part.
    """
    if not what:
        return []
    for parameter in _backbone(model) if what == "backbone" else _first_blocks(model, int(what)):
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze: {what}: leaves nothing to train")
    return _modules_to_hold(model)


def _backbone(model: nn.Module) -> List[nn.Parameter]:
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    trained = {id(parameter) for head in heads for parameter in head.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in trained]


def _first_blocks(model: nn.Module, count: int) -> List[nn.Parameter]:
    if not hasattr(model, "group_matcher"):
        raise UserError(f"freeze: {count}: this model does not name its blocks; choose backbone")
    layer_of = group_parameters(model, model.group_matcher(coarse=True), reverse=True)  # 0 is the stem
    blocks = max(layer_of.values()) - 1  # the last layer is what follows the blocks
    if count > blocks:
        raise UserError(f"freeze: {count}: the model has {blocks} blocks or stages")
    return [parameter for name, parameter in model.named_parameters() if layer_of[name] <= count]


def _modules_to_hold(model: nn.Module) -> List[nn.Module]:
    """Return all modules inside of completely frozen ones, and the parameter-free modules (dropout) that come before them."""

    def is_frozen(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    modules = list(model.modules())  # in the order of the forward pass, as far as the model is written in that order
    last = max((place for place, module in enumerate(modules) if is_frozen(module)), default=-1)
    before = [module for module in modules[: last + 1] if not any(True for _ in module.parameters())]
    return before + [part for module in modules if is_frozen(module) for part in module.modules()]
