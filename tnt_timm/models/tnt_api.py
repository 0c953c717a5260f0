"""The part of timm's model API that depends on TNT: input sizes, layer groups, feature maps.

Names, arguments and shapes are those of timm's vision_transformer. Shapes: B images, N sentences, P prefix tokens (the class
token), D sentence width.
"""

from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from tnt_timm.models import official_tnt
from tnt_timm.models.arguments import check_choice
from tnt_timm.models.timm_api import TimmModel


class TntApi(TimmModel):
    """Base class of TNT with timm's model API; tnt.py has the network."""

    GLOBAL_POOLS = ("token", "avg", "")
    RELEASE = official_tnt

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Change the image size; sentence positions are resampled (bicubic, antialiased).

        Raises:
            ValueError: the size is not a multiple of the patch.
        """
        old_grid = self.pixel_embed.grid_size
        self.pixel_embed.set_input_size(img_size)
        new_grid = self.pixel_embed.grid_size
        self.num_patches = self.pixel_embed.num_patches
        if self.patch_pos is not None and new_grid != old_grid:
            positions = resample_abs_pos_embed(self.patch_pos.detach(), new_grid, old_grid, self.num_prefix_tokens)
            self.patch_pos = nn.Parameter(positions, requires_grad=self.patch_pos.requires_grad)
        update_model_input_size(self, self.pixel_embed.img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return {"patch_pos", "pixel_pos", "cls_token", "dist_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r"^(?:cls_token|dist_token|patch_pos|pixel_pos|pixel_embed|norm1_proj|norm2_proj|proj)\b",
            blocks=r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Return the final features (B, P+N, D), and a list with the sentences after each chosen block.

        Args:
            x: images (B, 3, H, W).
            indices: block indices from 0, or a number for that many last blocks (default: all blocks).
            return_prefix_tokens: list pairs of sentences and prefix tokens (B, P, D).
            norm: apply the final norm to the listed tokens.
            stop_early: do not compute the blocks after the last chosen one.
            output_fmt: 'NCHW' for sentences as maps (B, D, H/16, W/16), 'NLC' for sequences (B, N, D).
            intermediates_only: return the list alone.

        Raises:
            ValueError: unknown output_fmt.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        taken = []
        pixel_tokens, patch_tokens = self.embed(x)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            if self.grad_checkpointing:
                pixel_tokens, patch_tokens = checkpoint(block, pixel_tokens, patch_tokens)
            else:
                pixel_tokens, patch_tokens = block(pixel_tokens, patch_tokens)
            if i in take_indices:
                taken.append(self.norm(patch_tokens) if norm else patch_tokens)

        features = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            grid = self.pixel_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            features = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in features]
        if return_prefix_tokens:
            features = [(map_, tokens[:, : self.num_prefix_tokens]) for map_, tokens in zip(features, taken)]
        return features if intermediates_only else (self.norm(patch_tokens), features)

    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: Union[int, List[int], Tuple[int]] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> List[torch.Tensor]:
        """Call `forward_intermediates` by DINO's name: blocks `n` as (B, N, D), or with `reshape` (B, D, H/16, W/16)."""
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True)

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Remove the blocks after the last chosen one, and if asked the final norm and the head; return the indices."""
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices
