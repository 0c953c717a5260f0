"""What timm asks of a model besides computing logits: feature maps, other input sizes, layer groups, loading.

Its names, arguments and shapes are those of timm's vision_transformer. B images, N sentences, P prefix tokens (the class
token), D sentence width.
"""

from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import nn

from tnt_timm.models import checkpoints


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError when an argument is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is none of {', '.join(map(repr, choices))}")


class TimmModel(nn.Module):
    """The part of TNT that is timm's model API; tnt.py has the network."""

    # -------------------------------------------------------------- input size

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Take images of another size from now on; sentence positions are resampled (bicubic, antialiased).

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

    # ---------------------------------------------------------------- training

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

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    # ---------------------------------------------------------------- features

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]], Dict[str, Any]]:
        """The sentences after chosen blocks, as timm's vision_transformer gives them.

        Args:
            x: images (B, 3, H, W).
            indices: of the blocks, from 0; a number means the last so many, None all.
            return_prefix_tokens: give (feature, prefix tokens (B, P, D)) for each block.
            norm: apply the final norm to each.
            stop_early: leave out the blocks behind the last chosen one.
            output_fmt: 'NCHW' for (B, D, H/16, W/16), 'NLC' for (B, N, D).
            intermediates_only: leave out the final features.
            output_dict: give a dict: image_intermediates, image_features (B, 1+N, D), image_intermediates_prefix.

        Returns:
            (final features, list), the list alone, or the dict.

        Raises:
            ValueError: an unknown output_fmt.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        B, grid = x.shape[0], self.pixel_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
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

        prefixes = [tokens[:, : self.num_prefix_tokens] for tokens in taken]
        features = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            features = [tokens.transpose(1, 2).reshape(B, -1, *grid).contiguous() for tokens in features]
        if output_dict:
            found: Dict[str, Any] = {"image_intermediates": features}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                found["image_features"] = self.norm(patch_tokens)
            return found
        if return_prefix_tokens:
            features = list(zip(features, prefixes))
        return features if intermediates_only else (self.norm(patch_tokens), features)

    @torch.jit.ignore
    def get_intermediate_layers(
        self,
        x: torch.Tensor,
        n: Union[int, List[int], Tuple[int]] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> List[torch.Tensor]:
        """DINO's name for `forward_intermediates`: blocks `n`, (B, N, D) or, reshaped, (B, D, H/16, W/16)."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Remove the blocks behind the last chosen one, and final norm and head where asked; gives the indices."""
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    # ----------------------------------------------------------------- loading

    @torch.jit.ignore
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """torch's hook: weights in the official release's names load as they are."""
        checkpoints.rename_in_place(state_dict, prefix, self.pixel_embed.pixel_grid)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        errors.extend(checkpoints.hint_to_adapt(state_dict, prefix, self))
