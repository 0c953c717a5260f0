"""Transformer in Transformer (TNT, arXiv 2103.00112), in the order of the paper's figure 1.

An image is cut into patches, the "visual sentences", and each patch into smaller cells, its "visual words". In every block
an inner transformer processes the words of each sentence, the words are folded into their sentence, and an outer transformer
processes the sentences. This is the network of the official release, whose weights reach 81.5 % (S) and 82.9 % (B).
Comments say where it differs from the paper's text. Modules and parameters have the names of timm's port.

Shapes: B images, N sentences (patches), M words per sentence, C word width, D sentence width.
timm calls a word a "pixel": it is a cell of the stride-4 grid inside a patch, not a pixel of the image.
"""

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import checkpoint

from tnt_timm.models.arguments import (
    check_choice,
    check_inner_blocks,
    check_mlp_ratio,
    check_positive,
    check_rates,
    check_size,
    check_switches,
)
from tnt_timm.models.layers import Attention, Linear, Mlp, SqueezeExcite
from tnt_timm.models.tnt_api import TntApi
from tnt_timm.ops import inner_transformer

torch.fx.wrap("inner_transformer")  # torch.fx keeps it as one node, which picks its backend when it runs


class PixelEmbed(nn.Module):
    """Word embedding: cut out the patches, then convolve inside each of them, so that no word sees another patch.

    (The paper's text has an unfold and a linear layer here. The released network has a 7x7 convolution of stride 4.)
    """

    def __init__(self, img_size, patch_size, in_chans: int, inner_dim: int, stride: int, dynamic_img_size=False, **dd):
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.pixel_grid = tuple(-(-p // stride) for p in self.patch_size)  # rows and columns of words in a patch
        self.num_pixels = self.pixel_grid[0] * self.pixel_grid[1]
        self.dynamic_img_size = dynamic_img_size
        self.set_input_size(img_size)
        self.proj = nn.Conv2d(in_chans, inner_dim, kernel_size=7, padding=3, stride=stride, **dd)

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        img_size = check_size("img_size", img_size)
        if any(i % p for i, p in zip(img_size, self.patch_size)):
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {self.patch_size}")
        self.img_size = img_size
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Return the rows and columns of patches in an image of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: torch.Tensor, pixel_pos: Optional[torch.Tensor]) -> torch.Tensor:
        """Images (B, 3, H, W) -> words (B*N, M, C)."""
        B, C, H, W = x.shape
        patch_h, patch_w = self.patch_size
        if self.dynamic_img_size:  # H or W in the message would make torch.compile recompile for each size
            torch._assert(H % patch_h == 0, f"image height is not a multiple of the patch height {patch_h}")
            torch._assert(W % patch_w == 0, f"image width is not a multiple of the patch width {patch_w}")
        else:
            torch._assert(H == self.img_size[0], f"image height {H} given to a model built for {self.img_size[0]}")
            torch._assert(W == self.img_size[1], f"image width {W} given to a model built for {self.img_size[1]}")
        grid_h, grid_w = self.dynamic_feat_size((H, W))
        x = x.reshape(B, C, grid_h, patch_h, grid_w, patch_w).permute(0, 2, 4, 1, 3, 5)
        x = self.proj(x.reshape(B * grid_h * grid_w, C, patch_h, patch_w))
        if pixel_pos is not None:
            x = x + pixel_pos
        return x.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """A TNT block: inner transformer, words folded into their sentence, outer transformer (paper, equations 2-6).

    With `inner=False` the block has the outer transformer only, and the words pass through unchanged (paper, table 7).
    """

    has_inner: torch.jit.Final[bool]

    def __init__(
        self,
        inner_dim: int,
        embed_dim: int,
        num_pixels: int,
        num_prefix_tokens: int,
        num_heads_inner: int,
        num_heads_outer: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        se: bool = False,
        inner: bool = True,
        **dd,
    ):
        super().__init__()
        attn_args = dict(qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        self.has_inner = inner
        self.num_prefix_tokens = num_prefix_tokens
        if inner:
            # Inner transformer: the modules hold the parameters, ops.inner_transformer computes with them
            self.norm_in = nn.LayerNorm(inner_dim, **dd)
            self.attn_in = Attention(inner_dim, num_heads_inner, **attn_args)
            self.norm_mlp_in = nn.LayerNorm(inner_dim, **dd)
            self.mlp_in = Mlp(inner_dim, int(inner_dim * mlp_ratio), drop=proj_drop, **dd)
            # Fold the words into their sentence
            self.norm1_proj = nn.LayerNorm(num_pixels * inner_dim, **dd)
            self.proj = Linear(num_pixels * inner_dim, embed_dim, bias=False, **dd)
            self.norm2_proj = nn.LayerNorm(embed_dim, **dd)
        # Outer transformer
        self.norm_out = nn.LayerNorm(embed_dim, **dd)
        self.attn_out = Attention(embed_dim, num_heads_outer, **attn_args)
        self.norm_mlp = nn.LayerNorm(embed_dim, **dd)
        self.mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=proj_drop, **dd)
        self.se = SqueezeExcite(embed_dim, **dd) if se else None
        self.drop_path = DropPath(drop_path)

    def inner(self, pixel_tokens: torch.Tensor) -> torch.Tensor:
        """Inner transformer on the words (B*N, M, C) of each sentence; stochastic depth drops each sentence by itself."""
        attn, mlp = self.attn_in, self.mlp_in
        attn_scale: Optional[torch.Tensor] = None
        mlp_scale: Optional[torch.Tensor] = None
        if self.training and self.drop_path.drop_prob > 0.0:
            # Applied to ones, DropPath returns the factor of each sentence
            ones = pixel_tokens.new_ones(pixel_tokens.shape[0], 1, 1)
            attn_scale, mlp_scale = self.drop_path(ones), self.drop_path(ones)
        return inner_transformer(
            pixel_tokens,
            self.norm_in.weight, self.norm_in.bias,
            attn.qk.weight, attn.qk.bias, attn.v.weight, attn.v.bias, attn.proj.weight, attn.proj.bias,
            self.norm_mlp_in.weight, self.norm_mlp_in.bias,
            mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
            num_heads=attn.num_heads,
            eps=self.norm_in.eps,
            attn_scale=attn_scale,
            mlp_scale=mlp_scale,
            attn_drop=attn.attn_drop if self.training else 0.0,
            proj_drop=attn.proj_drop if self.training else 0.0,
        )  # fmt: skip

    def fold(self, pixel_tokens: torch.Tensor, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Add to each sentence its words; the prefix tokens have none."""
        B, L, D = patch_tokens.shape
        P = self.num_prefix_tokens
        words = pixel_tokens.flatten(1).unflatten(0, (B, L - P))
        words = self.norm2_proj(self.proj(self.norm1_proj(words)))
        return patch_tokens + (F.pad(words, (0, 0, P, 0)) if P > 0 else words)

    def outer(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Outer transformer on the class token and the sentences (B, 1+N, D) of an image."""
        patch_tokens = patch_tokens + self.drop_path(self.attn_out(self.norm_out(patch_tokens)))
        out = self.mlp(self.norm_mlp(patch_tokens))
        if self.se is not None:
            out = out + self.se(out)
        return patch_tokens + self.drop_path(out)

    def forward(self, pixel_tokens: torch.Tensor, patch_tokens: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        if self.has_inner:
            pixel_tokens = self.inner(pixel_tokens)
            patch_tokens = self.fold(pixel_tokens, patch_tokens)
        return pixel_tokens, self.outer(patch_tokens)


class TNT(TntApi):
    """Transformer in Transformer.

    Args:
        img_size, patch_size: size of the images and of a patch in pixels; a number or (height, width).
        in_chans, num_classes: channels of the images, and classes; num_classes=0 leaves out the head.
        global_pool: input of the head: 'token' (class token), 'avg' (mean of the sentences) or '' (all tokens).
        embed_dim, inner_dim: D and C, the widths of sentences and words.
        depth, num_heads_inner, num_heads_outer, mlp_ratio, qkv_bias: the blocks; mlp_ratio holds for both MLPs.
        se: squeeze-and-excitation on the output of the outer MLP (the paper's "TNT + SE").
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after the embedding, after
            the linear layers of the blocks, and of the attention weights.
        drop_path_rate: stochastic depth of the last block; the rate rises linearly from 0 in the first block.
        first_stride: size of a word in pixels; at stride 4, a 16x16 patch has M = 16 words.
        dynamic_img_size: accept every image size that is a multiple of the patch; sentence positions are resampled.
        pos_embed: the learned positions: 'both', 'sentence', 'word' or 'none' (paper, table 6).
        inner_blocks: numbers of the blocks with an inner transformer, counted from 1 (paper, table 7; default: all).
        sentence_start: sentences before the first block: 'words' (projected from their words, as released) or 'zeros'
            (as in the paper's equation 1; the class token then starts at zero too).

    Raises:
        ValueError: a size is not positive or does not divide, or a choice or block number does not exist.
    """

    NUM_PREFIX_TOKENS = 1  # tokens before the sentences: the class token
    dynamic_img_size: torch.jit.Final[bool]
    sentences_from_words: torch.jit.Final[bool]

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: Union[int, Tuple[int, int]] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        inner_dim: int = 24,
        depth: int = 12,
        num_heads_inner: int = 4,
        num_heads_outer: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        se: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        first_stride: int = 4,
        dynamic_img_size: bool = False,
        pos_embed: str = "both",
        inner_blocks: Optional[Sequence[int]] = None,
        sentence_start: str = "words",
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_positive(patch_size=min(check_size("patch_size", patch_size)), first_stride=first_stride, depth=depth)
        check_positive(embed_dim=embed_dim, inner_dim=inner_dim, in_chans=in_chans)
        check_positive(num_heads_inner=num_heads_inner, num_heads_outer=num_heads_outer)
        check_mlp_ratio(mlp_ratio, inner_dim, embed_dim)
        check_rates(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate)
        check_rates(attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        check_switches(qkv_bias=qkv_bias, se=se, dynamic_img_size=dynamic_img_size)
        check_choice("pos_embed", pos_embed, ("both", "sentence", "word", "none"))
        check_choice("sentence_start", sentence_start, ("words", "zeros"))
        inner_blocks = check_inner_blocks(inner_blocks, depth, sentence_start)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = self.NUM_PREFIX_TOKENS
        self.dynamic_img_size = dynamic_img_size
        self.sentences_from_words = sentence_start == "words"
        self.grad_checkpointing = False

        self.pixel_embed = PixelEmbed(img_size, patch_size, in_chans, inner_dim, first_stride, dynamic_img_size, **dd)
        self.num_patches, self.num_pixels = self.pixel_embed.num_patches, self.pixel_embed.num_pixels
        self._add_embedding(inner_dim, pos_embed, dd)
        self.pos_drop = nn.Dropout(pos_drop_rate)

        sizes = (inner_dim, embed_dim, self.num_pixels, self.num_prefix_tokens, num_heads_inner, num_heads_outer)
        options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, se=se, **dd)
        self.blocks = nn.ModuleList(
            Block(*sizes, mlp_ratio, drop_path=rate, inner=number in inner_blocks, **options)
            for number, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth), start=1)
        )
        reduction = max(self.pixel_embed.patch_size)
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]

        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def _add_embedding(self, inner_dim: int, pos_embed: str, dd: dict) -> None:
        """Add the projection of words to sentences, the class token and the positions; sentences share the word positions."""

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, **dd))

        D, MC = self.embed_dim, self.num_pixels * inner_dim
        if self.sentences_from_words:
            self.norm1_proj = nn.LayerNorm(MC, **dd)
            self.proj = Linear(MC, D, **dd)
            self.norm2_proj = nn.LayerNorm(D, **dd)
        has_sentence, has_word = pos_embed in ("both", "sentence"), pos_embed in ("both", "word")
        self.cls_token = zeros(1, 1, D)
        self.patch_pos = zeros(1, self.num_prefix_tokens + self.num_patches, D) if has_sentence else None
        self.pixel_pos = zeros(1, inner_dim, *self.pixel_embed.pixel_grid) if has_word else None

    def init_weights(self) -> None:
        """Draw linear weights and learned tokens from a truncated normal of std 0.02; biases are zero.

        The convolution keeps PyTorch's initialization, as in the released code.
        """
        for token in (self.patch_pos, self.pixel_pos, self.cls_token if self.sentences_from_words else None):
            if token is not None:
                trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def prefix_tokens(self) -> torch.Tensor:
        """Return the tokens before the sentences, (1, 1, D)."""
        return self.cls_token

    def embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) -> words (B*N, M, C) and sentences (B, 1+N, D), class token first."""
        B = x.shape[0]
        grid_h, grid_w = self.pixel_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        pixel_tokens = self.pixel_embed(x, self.pixel_pos)
        if self.sentences_from_words:
            words = pixel_tokens.reshape(B, grid_h * grid_w, -1)
            patch_tokens = self.norm2_proj(self.proj(self.norm1_proj(words)))
        else:
            patch_tokens = pixel_tokens.new_zeros(B, grid_h * grid_w, self.embed_dim)
        patch_tokens = torch.cat([self.prefix_tokens().expand(B, -1, -1), patch_tokens], dim=1)
        patch_pos = self.patch_pos
        if patch_pos is not None:
            if self.dynamic_img_size:
                grids = (grid_h, grid_w), self.pixel_embed.grid_size
                patch_pos = resample_abs_pos_embed(patch_pos, grids[0], grids[1], self.num_prefix_tokens)
            patch_tokens = patch_tokens + patch_pos
        return pixel_tokens, self.pos_drop(patch_tokens)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> class token and sentences after the last block, (B, 1+N, D)."""
        pixel_tokens, patch_tokens = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                pixel_tokens, patch_tokens = checkpoint(block, pixel_tokens, patch_tokens)
            else:
                pixel_tokens, patch_tokens = block(pixel_tokens, patch_tokens)
        return self.norm(patch_tokens)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens (B, 1+N, D) -> logits (B, classes); with `pre_logits`, the input of the head."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
