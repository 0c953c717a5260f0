"""Convert weights from elsewhere: the names of an official release, other image sizes, heads and input channels.

What depends on the network is in `model.RELEASE`, the module official_tnt.py or official_pyramid.py. Each has

    NETWORK                                        the network's name, for messages
    FIRST_CONV, OFFICIAL_FIRST_CONV                our name of the first convolution's weight, and the official one
    IN_EVERY_NETWORK                               our names of tensors by which the network is recognized
    UNUSED                                         an official tensor that the network never reads, or ""
    rename_in_place(state_dict, prefix, model)     rename the tensors under `prefix` from official names to ours
    other_network(source)                          what else the weights are, or ""
    adapted_positions(source, model, source_size)  the positions that must be resampled, by name
"""

import logging
import math
from types import ModuleType
from typing import Callable, Dict, List, Mapping, MutableMapping, Optional, Tuple

from timm.layers import to_2tuple
from timm.models import adapt_input_conv
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

# These keep the model's own values if the file has none, or has another shape
REPLACEABLE = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias", "dist_token")


def rename_parts(
    state_dict: MutableMapping[str, Tensor], prefix: str, parts: Mapping[str, str], new_name: Callable[[str], str]
) -> None:
    """Rename the tensors under `prefix`: by `new_name`, then each part between two dots by the table `parts`."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        ours = prefix + ".".join(parts.get(part, part) for part in new_name(name[len(prefix) :]).split("."))
        if ours != name:
            state_dict[ours] = state_dict.pop(name)


def unflatten_words(state_dict: MutableMapping[str, Tensor], name: str, grid: Tuple[int, int]) -> None:
    """Turn official word positions (1, M, C) into ours (1, C, rows, columns)."""
    words = state_dict.get(name)
    if isinstance(words, Tensor) and words.ndim == 3 and words.shape[1] == math.prod(grid):
        state_dict[name] = words.transpose(1, 2).unflatten(2, grid)


def hint_to_adapt(state_dict: Mapping[str, Tensor], prefix: str, model: nn.Module) -> List[str]:
    """Return a line of advice if a strict load fails, and `adapt` would make the weights fit."""
    wanted = model.state_dict()
    source = {name[len(prefix) :]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if not any(name in source and _shape(source[name]) != _shape(wanted[name]) for name in wanted):
        return []
    try:
        adapt(source, model)
    except ValueError:
        return []
    return [
        "for another image size, head or number of channels, let the weights be adapted: "
        "timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...)), or train.py --pretrained-path"
    ]


def adapt(
    state_dict: Mapping[str, Tensor], model: nn.Module, source_size: Optional[Tuple[int, int]] = None
) -> Tuple[Dict[str, Tensor], str]:
    """Adapt the weights of a network to the head, image size and input channels of a model.

    Args:
        state_dict: weights with official names or ours.
        model: a TNT or PyramidTNT; it is not changed.
        source_size: (height, width) of the images the weights were trained on, if known. Sentence positions of images that
            are not square need it.

    Returns:
        A state dict that loads strictly, and a report of what was resized, new or skipped.

    Raises:
        ValueError: the weights are those of another network, or of another size of this one.
    """
    release, source, wanted = model.RELEASE, dict(state_dict), model.state_dict()
    release.rename_in_place(source, "", model)
    _check_network(source, release)
    conv, adapted = source[release.FIRST_CONV], dict(source)
    if conv.ndim == 4 and conv.shape[1] != model.in_chans:
        adapted[release.FIRST_CONV] = adapt_input_conv(model.in_chans, conv, base_chans=conv.shape[1])
    adapted.update(release.adapted_positions(source, model, source_size))
    replaced = [name for name in REPLACEABLE if _shape(source.get(name)) != _shape(wanted.get(name))]
    for name in replaced:
        adapted.pop(name, None)
    adapted.update({name: wanted[name] for name in replaced if name in wanted})

    problems = differences(adapted, wanted)
    if problems:
        raise ValueError(f"weights of another {release.NETWORK}: {'; '.join(problems)}")

    changed = [name for name in adapted if name not in replaced and adapted[name] is not source[name]]
    lines = [f"{len(set(adapted) - {*changed, *replaced})} tensors loaded as they are"]
    lines += [f"  resized  {name} {_shape(source[name])} -> {_shape(adapted[name])}" for name in changed]
    lines += [f"  new      {name} {_shape(wanted[name])}" for name in replaced if name in wanted]
    lines += [f"  skipped  {release.UNUSED} (the network does not read it)"] if release.UNUSED in state_dict else []
    lines += [f"  skipped  {name} {_shape(source[name])}" for name in replaced if name in source]
    return adapted, "\n".join(lines)


def pretrained_filter(state_dict: Mapping[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Adapt pretrained weights while timm loads them, and log the report."""
    cfg = model.pretrained_cfg
    place = cfg.get("file") or (not cfg.get("state_dict") and cfg.get("hf_hub_id")) or "state dict"
    size = getattr(model, "pretrained_model_args", {}).get("img_size") or cfg["input_size"][-2:]
    try:
        adapted, report = adapt(state_dict, model, to_2tuple(size))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    _logger.info("%s: %s", place, report)
    release = model.RELEASE
    adapted[release.OFFICIAL_FIRST_CONV] = adapted.pop(
        release.FIRST_CONV
    )  # or timm would warn that it is adapted already
    return adapted


def differences(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> List[str]:
    """Return phrases that say why weights do not load strictly into a network; an empty list if they do."""
    missing = [name for name in wanted if name not in weights]
    extra = [name for name in weights if name not in wanted]
    shapes = [
        f"{name} is {_shape(weights[name])} instead of {_shape(wanted[name])}"
        for name in wanted
        if name in weights and _shape(weights[name]) != _shape(wanted[name])
    ]
    return [
        f"{what} {', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}"
        for what, names in (("without", missing), ("with unknown", extra), ("in which", shapes))
        if names
    ]


def _check_network(source: Mapping[str, Tensor], release: ModuleType) -> None:
    for name in release.IN_EVERY_NETWORK:
        if not isinstance(source.get(name), Tensor):
            some = ", ".join(list(source)[:3])
            raise ValueError(f"not a {release.NETWORK}: it has no {name} among its {len(source)} tensors ({some}, ...)")
    if other := release.other_network(source):
        raise ValueError(other)


def source_grid(count: int, embed: nn.Module, source_size: Optional[Tuple[int, int]]) -> Tuple[int, int]:
    """Return the grid of `count` sentences: that of the source images, else the model's, else a square.

    Args:
        count: number of sentences for which the weights have positions.
        embed: the model's embedding, which has `grid_size` and `dynamic_feat_size`.
        source_size: (height, width) of the images the weights were trained on, if known.

    Raises:
        ValueError: none of these grids has as many cells.
    """
    root = math.isqrt(count)
    of_images = embed.dynamic_feat_size(source_size) if source_size is not None else (0, 0)
    for grid in (of_images, embed.grid_size, (root, root)):
        if grid[0] * grid[1] == count:
            return grid
    raise ValueError(
        f"patch_pos is for {count} sentences, which form no square; give the image size of the weights: "
        "pretrained_cfg_overlay=dict(input_size=(3, height, width))"
    )


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
