"""Other people's weights into ours: the official release's names, timm's, another image size, head or input channels.

timm's names are ours. The official release (huawei-noah/Efficient-AI-Backbones, `tnt_pytorch/tnt.py`) says the same with
other words, lays the word positions out flat, and carries an `outer_tokens` that its network never reads.
"""

import logging
import math
from dataclasses import dataclass, field
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
UNUSED = "outer_tokens"  # a frozen parameter of the official network that its forward pass does not read

CONV = "pixel_embed.proj.weight"
OFFICIAL_CONV = "patch_embed.proj.weight"
POSITIONS = "patch_pos"
# What a model may start anew when the file has none, or one of another shape
REPLACEABLE = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias", "dist_token")


@dataclass
class Report:
    """What became of the tensors of a file that was fitted to a model."""

    loaded: int = 0  # as they were
    resized: List[str] = field(default_factory=list)
    new: List[str] = field(default_factory=list)  # of the model, absent from the file
    skipped: List[str] = field(default_factory=list)  # of the file, absent from the model

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded as they are"]
        for what, names in (("resized", self.resized), ("new", self.new), ("skipped", self.skipped)):
            lines += [f"  {what:<8} {name}" for name in names]
        return "\n".join(lines)


def our_name(name: str) -> str:
    """The name of an official tensor in our network; every other name is its own."""
    for theirs, ours in OFFICIAL_SE.items():
        name = name.replace(theirs, ours)
    return ".".join(OFFICIAL.get(part, part) for part in name.split("."))


def rename_in_place(state_dict: MutableMapping[str, Tensor], prefix: str, pixel_grid: Tuple[int, int]) -> None:
    """Give the tensors under `prefix` that carry official names ours, and drop the unused one."""
    state_dict.pop(prefix + UNUSED, None)
    for name in [name for name in state_dict if name.startswith(prefix)]:
        ours = prefix + our_name(name[len(prefix) :])
        if ours == name:
            continue
        tensor = state_dict.pop(name)
        if ours == prefix + "pixel_pos" and tensor.ndim == 3 and tensor.shape[1] == math.prod(pixel_grid):
            tensor = tensor.transpose(1, 2).unflatten(2, pixel_grid)  # (1, M, C) -> (1, C, rows, columns)
        state_dict[ours] = tensor


def hint_to_adapt(state_dict: Mapping[str, Tensor], prefix: str, model: nn.Module) -> List[str]:
    """A line for a strict load that fails by its shapes, though the weights could be adapted."""
    wanted = model.state_dict()
    names = [name for name in (POSITIONS, CONV, *REPLACEABLE) if name in wanted and prefix + name in state_dict]
    if all(_shape(state_dict[prefix + name]) == _shape(wanted[name]) for name in names):
        return []
    return [
        "for another image size, head or number of channels, let the weights be adapted: "
        "timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file=...)), or train.py --pretrained-path"
    ]


def fit(
    state_dict: Mapping[str, Tensor], model: nn.Module, source_size: Optional[Tuple[int, int]] = None
) -> Tuple[Dict[str, Tensor], Report]:
    """Fit the weights of a TNT to this one, which may have another head, image size or number of input channels.

    Args:
        state_dict: of the same network, in our names, timm's or the official ones.
        model: a TNT. It is not changed.
        source_size: (height, width) of the images that the weights were trained on, where known; it tells the grid of
            sentence positions when that is not a square.

    Returns:
        A state dict that loads strictly, and what was done.

    Raises:
        ValueError: the weights are not a TNT's, or another TNT's.
    """
    source, report = dict(state_dict), Report()
    if UNUSED in source:
        report.skipped.append(f"{UNUSED} (the network does not read it)")
    rename_in_place(source, "", model.pixel_embed.pixel_grid)
    _check_is_tnt(source)

    wanted, fitted = model.state_dict(), {}
    for name, target in wanted.items():
        tensor = source.get(name)
        if name in REPLACEABLE and (tensor is None or _shape(tensor) != _shape(target)):
            fitted[name] = target
            report.new.append(f"{name} {_shape(target)}")
        elif tensor is not None:
            fitted[name] = _fit_tensor(name, source, model, source_size)
            if fitted[name] is tensor:
                report.loaded += 1
            else:
                report.resized.append(f"{name} {_shape(tensor)} -> {_shape(fitted[name])}")
    left = {
        name: tensor for name, tensor in source.items() if fitted.get(name) is None or fitted[name] is wanted.get(name)
    }
    report.skipped += [f"{name} {_shape(tensor)}" for name, tensor in left.items() if name in REPLACEABLE]

    unknown = {name: tensor for name, tensor in left.items() if name not in REPLACEABLE}
    problems = differences({**fitted, **unknown}, wanted)
    if problems:
        raise ValueError(f"weights of another TNT: {'; '.join(problems)}")
    return fitted, report


def pretrained_filter(state_dict: Mapping[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """`fit` as timm's loading of pretrained weights calls it; what was done goes to the log as one block."""
    cfg = model.pretrained_cfg
    place = cfg.get("file") or (not cfg.get("state_dict") and cfg.get("hf_hub_id")) or "state dict"
    size = getattr(model, "pretrained_model_args", {}).get("img_size") or cfg["input_size"][-2:]
    try:
        fitted, report = fit(state_dict, model, to_2tuple(size))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    _logger.info("%s: %s", place, report)
    fitted[OFFICIAL_CONV] = fitted.pop(CONV)  # under this name timm does not adapt it again, nor warns that it is done
    return fitted


def differences(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> List[str]:
    """Why weights are not those of a network, as phrases; none when they load strictly."""
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
        if name not in source:
            some = ", ".join(list(source)[:3])
            raise ValueError(f"not a TNT: it has no {name} among its {len(source)} tensors ({some}, ...)")
    if "blocks.0.proj.bias" in source:
        raise ValueError("timm's tnt_s_legacy_patch16_224, which is another network")


def _fit_tensor(
    name: str, source: Mapping[str, Tensor], model: nn.Module, source_size: Optional[Tuple[int, int]]
) -> Tensor:
    tensor = source[name]
    if not isinstance(tensor, Tensor):
        return tensor
    if name == CONV and tensor.ndim == 4 and tensor.shape[1] != model.in_chans:
        return adapt_input_conv(model.in_chans, tensor, base_chans=tensor.shape[1])
    if name == POSITIONS and tensor.ndim == 3 and tensor.shape[2] == model.embed_dim:
        return _fit_positions(tensor, 2 if "dist_token" in source else 1, model, source_size)
    return tensor


def _fit_positions(
    positions: Tensor, prefix_tokens: int, model: nn.Module, source_size: Optional[Tuple[int, int]]
) -> Tensor:  # (1, P+N, D) -> the same for the model's P and N
    new_grid = model.pixel_embed.grid_size
    old_grid = _source_grid(positions.shape[1] - prefix_tokens, model, source_size)
    if old_grid != new_grid:
        positions = resample_abs_pos_embed(positions, new_grid, old_grid, prefix_tokens)
    if prefix_tokens < model.num_prefix_tokens:  # the distillation token's place comes from the model
        positions = torch.cat([positions[:, :1], model.patch_pos[:, 1:2].detach(), positions[:, 1:]], dim=1)
    elif prefix_tokens > model.num_prefix_tokens:
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    return positions


def _source_grid(count: int, model: nn.Module, source_size: Optional[Tuple[int, int]]) -> Tuple[int, int]:
    """The grid on which `count` sentences were trained: that of their images, else the model's own, else a square."""
    root = math.isqrt(count)
    images = model.pixel_embed.dynamic_feat_size(source_size) if source_size is not None else (0, 0)
    for grid in (images, model.pixel_embed.grid_size, (root, root)):
        if grid[0] * grid[1] == count:
            return grid
    raise ValueError(f"{POSITIONS} has places for {count} sentences, which are no square grid; say the images' size")


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
