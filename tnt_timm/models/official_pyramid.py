"""Map tensor names of the official PyramidTNT release to ours, for convert_weights.py.

The release is `tnt_pytorch/pyramid_tnt.py` in the repository of TNT's. It keeps the aggregations beside the stages. In its inner
attention, one linear gives q, and another one k and v.
"""

import re
from typing import Dict, Mapping, MutableMapping, Optional, Tuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tnt_timm.models import official_tnt
from tnt_timm.models.convert_weights import rename_parts, source_grid, unflatten_words
from tnt_timm.models.pyramid_grids import coarser, resample_relative_pos, stage_grids

NETWORK = "PyramidTNT"
# Official part of a name -> ours
OFFICIAL = official_tnt.OFFICIAL | {
    "patch_embed": "stem",
    "inner_convs": "pixel_convs",
    "outer_convs": "patch_convs",
}
FIRST_CONV = "stem.common_conv.0.weight"
OFFICIAL_FIRST_CONV = "patch_embed.common_conv.0.weight"
IN_EVERY_NETWORK = (FIRST_CONV, "stages.0.relative_pos")
UNUSED = ""


def rename_in_place(state_dict: MutableMapping[str, Tensor], prefix: str, model: nn.Module) -> None:
    """Rename the tensors under `prefix` from official names to ours."""

    def new_name(name: str) -> str:
        merge = re.fullmatch(r"(word|sentence)_merges\.(\d)\.(norm|conv)(?:\.0)?\.(.*)", name)
        if merge is None:
            return name
        kind, number, part, rest = merge.groups()
        return f"stages.{int(number) + 1}.{kind}_merge.{part}.{rest}"

    rename_parts(state_dict, prefix, OFFICIAL, new_name)
    unflatten_words(state_dict, prefix + "pixel_pos", model.stem.pixel_grid)
    for name in [name for name in state_dict if name.startswith(prefix) and ".attn_in.kv." in name]:
        of_q = name.replace(".kv.", ".q.")
        if not all(isinstance(state_dict.get(each), Tensor) for each in (name, of_q)):
            continue
        k, v = state_dict.pop(name).chunk(2)
        state_dict[name.replace(".kv.", ".qk.")] = torch.cat([state_dict.pop(of_q), k])
        state_dict[name.replace(".kv.", ".v.")] = v


def other_network(source: Mapping[str, Tensor]) -> str:
    """Return the name of another network with similar tensor names; none is known."""
    return ""


def adapted_positions(
    source: Mapping[str, Tensor], model: nn.Module, source_size: Optional[Tuple[int, int]]
) -> Dict[str, Tensor]:
    """Return sentence positions and the relative positions of all stages for the model's image size.

    Raises:
        ValueError: the grid of the weights cannot be found out.
    """
    positions = source.get("patch_pos")
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        return {}
    stem, adapted = model.stem, {}
    old_grid = source_grid(positions.shape[1], stem, source_size)
    if old_grid == stem.grid_size:
        return {}
    adapted["patch_pos"] = resample_abs_pos_embed(positions, stem.grid_size, old_grid, 0)
    grids = zip(model.stages, stage_grids(old_grid), stage_grids(stem.grid_size))
    for number, (stage, old, new) in enumerate(grids):
        name, ratio = f"stages.{number}.relative_pos", stage.sr_ratio
        relative_pos, keys = source.get(name), coarser(old, ratio)
        if isinstance(relative_pos, Tensor) and relative_pos.shape[2:] == (old[0] * old[1], keys[0] * keys[1]):
            adapted[name] = resample_relative_pos(relative_pos, new, old, ratio)
    return adapted
