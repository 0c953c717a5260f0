"""The part of timm's model API that depends on PyramidTNT: input sizes, layer groups, feature maps.

Names, arguments and shapes are those of timm's pyramids, such as pvt_v2. Shapes: B images, N sentences, D sentence width, both of
a stage. The maps of the four stages have strides 8, 16, 32 and 64. Their sizes, such as H/64, are rounded up.
"""

from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from tnt_timm.models import official_pyramid
from tnt_timm.models.arguments import check_choice
from tnt_timm.models.pyramid_grids import resample_relative_pos, stage_grids
from tnt_timm.models.timm_api import TimmModel


class PyramidApi(TimmModel):
    """Base class of PyramidTNT with timm's model API; pyramid_tnt.py has the network."""

    GLOBAL_POOLS = ("avg", "")
    RELEASE = official_pyramid

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the head by a new one for `num_classes` classes (0: no head).

        Raises:
            ValueError: unknown global_pool, or '' with a head, which needs the mean.
        """
        if num_classes != 0 and (self.global_pool if global_pool is None else global_pool) == "":
            raise ValueError("global_pool '' has no head; pass num_classes=0, or global_pool='avg'")
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Change the image size; sentence positions and relative positions are resampled (bicubic, antialiased).

        Raises:
            ValueError: the size is not a multiple of 8.
        """
        old_grid = self.stem.grid_size
        self.stem.set_input_size(img_size)
        grid = self.stem.grid_size
        if grid != old_grid:
            positions = resample_abs_pos_embed(self.patch_pos.detach(), grid, old_grid, 0)
            self.patch_pos = nn.Parameter(positions, requires_grad=self.patch_pos.requires_grad)
        for stage, new in zip(self.stages, stage_grids(grid)):
            if new != stage.grid_size:
                old = stage.relative_pos
                positions = resample_relative_pos(old.detach(), new, stage.grid_size, stage.sr_ratio)
                stage.relative_pos = nn.Parameter(positions, requires_grad=old.requires_grad)
                stage.grid_size = new
        update_model_input_size(self, self.stem.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Return the positions; relative positions decay, as in the official run."""
        return {"patch_pos", "pixel_pos"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        in_blocks = [
            (r"^stages\.(\d+)\.(?:word_merge|sentence_merge|relative_pos)\b", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm\.", (99999,)),
        ]
        return dict(stem=r"^(?:stem|patch_pos|pixel_pos)\b", blocks=r"^stages\.(\d+)" if coarse else in_blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the final features (B, D, H/64, W/64), and a list with the sentences after each chosen stage.

        Args:
            x: images (B, 3, H, W).
            indices: stage indices from 0, or a number for that many last stages (default: all stages).
            norm: apply the final norm to the last stage's sentences; those of the others have other widths.
            stop_early: do not compute the stages after the last chosen one. Then the final features are those of the last
                computed stage, and only the fourth stage gets the final norm.
            output_fmt: 'NCHW' for maps (B, D, h, w), 'NLC' for sequences (B, N, D).
            intermediates_only: return the list alone.

        Raises:
            ValueError: unknown output_fmt.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take_indices, last = feature_take_indices(len(self.stages), indices)
        features = []
        pixel_tokens, patch_tokens, grid = self.embed(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            pixel_tokens, patch_tokens, grid = stage(pixel_tokens, patch_tokens, grid)
            normed = self.norm(patch_tokens) if i == len(self.feature_info) - 1 else patch_tokens
            if i in take_indices:
                taken = normed if norm else patch_tokens
                features.append(as_map(taken, grid) if output_fmt == "NCHW" else taken)
        return features if intermediates_only else (as_map(normed, grid), features)

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Remove the stages after the last chosen one, and if asked the final norm and the head; return the indices.

        Norm and head fit the width of the fourth stage only. If a stage is removed, they are removed as well, whatever was
        asked.
        """
        take_indices, last = feature_take_indices(len(self.stages), indices)
        cut = last + 1 < len(self.stages)
        self.stages = self.stages[: last + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices


def as_map(patch_tokens: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
    """Sentences (B, N, D) -> map (B, D, h, w)."""
    return patch_tokens.transpose(1, 2).unflatten(2, grid).contiguous()
