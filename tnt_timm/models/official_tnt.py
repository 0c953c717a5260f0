"""Map tensor names of the official TNT release to ours, for convert_weights.py.

The release is `tnt_pytorch/tnt.py` of huawei-noah/Efficient-AI-Backbones. timm's names are ours. The release uses other names for
the same tensors, stores the word positions flat, and has a parameter `outer_tokens` that its network never reads.
"""

from typing import Dict, Mapping, MutableMapping, Optional, Tuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tnt_timm.models.convert_weights import rename_parts, source_grid, unflatten_words

NETWORK = "TNT"
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
FIRST_CONV = "pixel_embed.proj.weight"
OFFICIAL_FIRST_CONV = "patch_embed.proj.weight"
IN_EVERY_NETWORK = (FIRST_CONV, "blocks.0.norm_out.weight")
UNUSED = "outer_tokens"
POSITIONS = "patch_pos"


def rename_in_place(state_dict: MutableMapping[str, Tensor], prefix: str, model: nn.Module) -> None:
    """Rename the tensors under `prefix` from official names to ours, and remove the unused one."""
    state_dict.pop(prefix + UNUSED, None)

    def new_name(name: str) -> str:
        for official_part, part in OFFICIAL_SE.items():
            name = name.replace(official_part, part)
        return name

    rename_parts(state_dict, prefix, OFFICIAL, new_name)
    unflatten_words(state_dict, prefix + "pixel_pos", model.pixel_embed.pixel_grid)


def other_network(source: Mapping[str, Tensor]) -> str:
    """Return the name of another network with similar tensor names, if the weights are its."""
    if "blocks.0.proj.bias" in source:
        return "timm's tnt_s_legacy_patch16_224, which is another network"
    return ""


def adapted_positions(
    source: Mapping[str, Tensor], model: nn.Module, source_size: Optional[Tuple[int, int]]
) -> Dict[str, Tensor]:
    """Return sentence positions (1, P+N, D) for the model's P prefix tokens and N sentences.

    Raises:
        ValueError: the grid of the weights cannot be found out.
    """
    positions = source.get(POSITIONS)
    if model.patch_pos is None or not isinstance(positions, Tensor) or positions.shape[2:] != (model.embed_dim,):
        return {}
    prefix_tokens, embed = 2 if "dist_token" in source else 1, model.pixel_embed
    old_grid = source_grid(positions.shape[1] - prefix_tokens, embed, source_size)
    if old_grid != embed.grid_size:
        positions = resample_abs_pos_embed(positions, embed.grid_size, old_grid, prefix_tokens)
    if prefix_tokens < model.num_prefix_tokens:  # the distillation token keeps the model's own position
        positions = torch.cat([positions[:, :1], model.patch_pos[:, 1:2].detach(), positions[:, 1:]], dim=1)
    elif prefix_tokens > model.num_prefix_tokens:
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    return {POSITIONS: positions}
