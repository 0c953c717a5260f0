"""Convert weights from elsewhere: the names of the official release, other image sizes, heads and input channels.

timm's names are ours. The official release (huawei-noah/Efficient-AI-Backbones, `tnt_pytorch/tnt.py`) uses other names for the
same tensors, stores the word positions flat, and has a parameter `outer_tokens` that its network never reads.
"""

import logging
import math
from typing import Dict, List, Mapping, MutableMapping, Optional, Tuple

import torch
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import adapt_input_conv
from torch import Tensor, nn

_logger = logging.getLogger(__name__)

# Official part of a name -> ours
OFFICIAL = {
    "outer_pos": "patch_pos",
    "inner_pos": "pixel_pos",
    "patch_embed": "pixel_embed",
    "proj_norm1": "norm1_proj",
    "proj_norm2": "norm2_proj",
    "inner_norm1": "norm_in",
    "inner_attn": "attn_in",
    "inner_norm2": "norm_mlp_in",
    "inner_mlp": "mlp_in",
    "outer_norm1": "norm_out",
    "outer_attn": "attn_out",
    "outer_norm2": "norm_mlp",
    "outer_mlp": "mlp",
}
OFFICIAL_SE = {"se_layer.fc.0": "se.norm", "se_layer.fc.1": "se.fc1", "se_layer.fc.3": "se.fc2"}
UNUSED = "outer_tokens"

CONV = "pixel_embed.proj.weight"
OFFICIAL_CONV = "patch_embed.proj.weight"
POSITIONS = "patch_pos"
# These keep the model's own values if the file has none, or has another shape
REPLACEABLE = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias", "dist_token")


def rename_in_place(state_dict: MutableMapping[str, Tensor], prefix: str, pixel_grid: Tuple[int, int]) -> None:
    """Rename the tensors under `prefix` from official names to ours, and remove the unused one."""
    state_dict.pop(prefix + UNUSED, None)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        ours = name[len(prefix) :]
        for official_part, part in OFFICIAL_SE.items():
            ours = ours.replace(official_part, part)
        ours = prefix + ".".join(OFFICIAL.get(part, part) for part in ours.split("."))
        if ours == name:
            continue
        tensor = state_dict.pop(name)
        if ours == prefix + "pixel_pos" and tensor.ndim == 3 and tensor.shape[1] == math.prod(pixel_grid):
            tensor = tensor.transpose(1, 2).unflatten(2, pixel_grid)  # (1, M, C) -> (1, C, rows, columns)
        state_dict[ours] = tensor


def hint_to_adapt(state_dict: Mapping[str, Tensor], prefix: str, model: nn.Module) -> List[str]:
    """Return a line of advice if a strict load fails only because the weights have to be adapted."""
    wanted = model.state_dict()
    names = [name for name in (POSITIONS, CONV, *REPLACEABLE) if name in wanted and prefix + name in state_dict]
    if all(_shape(state_dict[prefix + name]) == _shape(wanted[name]) for name in names):
        return []
    return [
        "for another image size, head or number of channels, let the weights be adapted: "
        "timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...)), or train.py --pretrained-path"
    ]


def adapt(
    state_dict: Mapping[str, Tensor], model: nn.Module, source_size: Optional[Tuple[int, int]] = None
) -> Tuple[Dict[str, Tensor], str]:
    """Adapt the weights of a TNT to the head, image size and input channels of a model.

    Args:
        state_dict: weights with official names or ours.
        model: a TNT; it is not changed.
        source_size: (height, width) of the images the weights were trained on, if known. Sentence positions of images that
            are not square need it.

    Returns:
        A state dict that loads strictly, and a report of what was resized, new or skipped.

    Raises:
        ValueError: the weights are not a TNT's, or another TNT's.
    """
    source, wanted = dict(state_dict), model.state_dict()
    rename_in_place(source, "", model.pixel_embed.pixel_grid)
    _check_is_tnt(source)
    adapted = dict(source)
    if source[CONV].ndim == 4 and source[CONV].shape[1] != model.in_chans:
        adapted[CONV] = adapt_input_conv(model.in_chans, source[CONV], base_chans=source[CONV].shape[1])
    positions = source.get(POSITIONS)
    if POSITIONS in wanted and isinstance(positions, Tensor) and positions.shape[2:] == (model.embed_dim,):
        adapted[POSITIONS] = _adapt_positions(positions, 2 if "dist_token" in source else 1, model, source_size)
    replaced = [name for name in REPLACEABLE if _shape(source.get(name)) != _shape(wanted.get(name))]
    for name in replaced:
        adapted.pop(name, None)
    adapted.update({name: wanted[name] for name in replaced if name in wanted})

    problems = differences(adapted, wanted)
    if problems:
        raise ValueError(f"weights of another TNT: {'; '.join(problems)}")

    changed = [name for name in adapted if name not in replaced and adapted[name] is not source[name]]
    lines = [f"{len(set(adapted) - {*changed, *replaced})} tensors loaded as they are"]
    lines += [f"  resized  {name} {_shape(source[name])} -> {_shape(adapted[name])}" for name in changed]
    lines += [f"  new      {name} {_shape(wanted[name])}" for name in replaced if name in wanted]
    lines += [f"  skipped  {UNUSED} (the network does not read it)"] if UNUSED in state_dict else []
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
    adapted[OFFICIAL_CONV] = adapted.pop(CONV)  # under our name, timm would warn that it is adapted already
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


def _check_is_tnt(source: Mapping[str, Tensor]) -> None:
    for name in (CONV, "blocks.0.norm_out.weight"):
        if not isinstance(source.get(name), Tensor):
            some = ", ".join(list(source)[:3])
            raise ValueError(f"not a TNT: it has no {name} among its {len(source)} tensors ({some}, ...)")
    if "blocks.0.proj.bias" in source:
        raise ValueError("timm's tnt_s_legacy_patch16_224, which is another network")


def _adapt_positions(
    positions: Tensor, prefix_tokens: int, model: nn.Module, source_size: Optional[Tuple[int, int]]
) -> Tensor:
    """Adapt sentence positions (1, P+N, D) to the model's P prefix tokens and N sentences."""
    old_grid = _source_grid(positions.shape[1] - prefix_tokens, model, source_size)
    if old_grid != model.pixel_embed.grid_size:
        positions = resample_abs_pos_embed(positions, model.pixel_embed.grid_size, old_grid, prefix_tokens)
    if prefix_tokens < model.num_prefix_tokens:  # the distillation token keeps the model's own position
        positions = torch.cat([positions[:, :1], model.patch_pos[:, 1:2].detach(), positions[:, 1:]], dim=1)
    elif prefix_tokens > model.num_prefix_tokens:
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    return positions


def _source_grid(count: int, model: nn.Module, source_size: Optional[Tuple[int, int]]) -> Tuple[int, int]:
    """Return the grid of `count` sentences: that of the source images, else the model's, else a square."""
    root = math.isqrt(count)
    of_images = model.pixel_embed.dynamic_feat_size(source_size) if source_size is not None else (0, 0)
    for grid in (of_images, model.pixel_embed.grid_size, (root, root)):
        if grid[0] * grid[1] == count:
            return grid
    raise ValueError(
        f"{POSITIONS} is for {count} sentences, which form no square; give the image size of the weights: "
        "pretrained_cfg_overlay=dict(input_size=(3, height, width))"
    )


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
