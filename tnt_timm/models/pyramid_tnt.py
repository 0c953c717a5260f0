"""PyramidTNT (arXiv 2201.00978), the successor by TNT's authors: four stages, whose sentences lie on grids of stride 8 to 64.

The network is that of the official code. What differs from tnt.py, in the order of this file:

- Convolutions with batch norm embed the image: words on the stride-2 grid, sentences of 4x4 words on the stride-8 grid.
- Between stages, word and sentence aggregation join 2x2 sentences to one, and words and sentences get wider.
- A sentence attends to sentences on a coarser grid, and every stage has learned relative positions, which its blocks share.
- In the inner transformer, LayerNorm is over all words of a sentence. Most blocks have no inner transformer.
- There is no class token: the head reads the mean of the sentences.

Shapes: B images, N sentences, M = 16 words per sentence, C word width, D sentence width, K keys. All but B and M depend on the
stage.
"""

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed, trunc_normal_, use_fused_attn
from timm.models import checkpoint

from tnt_timm.models.arguments import (
    check_mlp_ratio,
    check_per_stage,
    check_positive,
    check_rates,
    check_size,
    check_switches,
)
from tnt_timm.models.layers import Linear
from tnt_timm.models.pyramid_api import PyramidApi
from tnt_timm.models.pyramid_grids import coarser, resample_relative_pos, stage_grids
from tnt_timm.models.tnt import Block
from tnt_timm.ops.choose_backend import operators_allowed

M = 16  # words per sentence, on a grid of 4 x 4, in every stage
WIDENING = (1, 2, 4, 4)  # of widths and heads over the stages


def conv_bn_relu(in_chans: int, out_chans: int, stride: int, **dd) -> Sequence[nn.Module]:
    # the bias, which batch norm makes useless, is in the released weights
    conv = nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=stride, padding=1, **dd)
    return conv, nn.BatchNorm2d(out_chans, **dd), nn.ReLU()


class Stem(nn.Module):
    """Embedding of words (stride 2) and sentences (stride 8), by two branches of convolutions that share the first one."""

    def __init__(self, img_size, in_chans: int, inner_dim: int, embed_dim: int, dynamic_img_size=False, **dd):
        super().__init__()
        C = inner_dim
        self.pixel_grid = (4, 4)  # rows and columns of words in a sentence
        self.dynamic_img_size = dynamic_img_size
        self.set_input_size(img_size)
        self.common_conv = nn.Sequential(*conv_bn_relu(in_chans, 2 * C, 2, **dd))
        self.pixel_convs = nn.Sequential(*conv_bn_relu(2 * C, C, 1, **dd))
        self.patch_convs = nn.Sequential(
            *conv_bn_relu(2 * C, 4 * C, 2, **dd),
            *conv_bn_relu(4 * C, 8 * C, 2, **dd),
            *conv_bn_relu(8 * C, embed_dim, 1, **dd),
        )

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        img_size = check_size("img_size", img_size)
        if any(i < 8 or i % 8 for i in img_size):
            raise ValueError(f"img_size {img_size} is not a multiple of 8")
        self.img_size = img_size
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Return the rows and columns of sentences in the first stage for an image of this size."""
        return img_size[0] // 8, img_size[1] // 8

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, Tuple[int, int]]:
        """Images (B, 3, H, W) -> words (B*N, M, C), sentences (B, N, D) and their grid."""
        H, W = x.shape[2], x.shape[3]
        grid = self.grid_size
        if self.dynamic_img_size:
            torch._assert(H % 8 == 0, "image height is not a multiple of 8")
            torch._assert(W % 8 == 0, "image width is not a multiple of 8")
            grid = self.dynamic_feat_size((H, W))
        else:
            torch._assert(H == self.img_size[0], f"image height {H} given to a model built for {self.img_size[0]}")
            torch._assert(W == self.img_size[1], f"image width {W} given to a model built for {self.img_size[1]}")
        x = self.common_conv(x)
        words = self.pixel_convs(x).unflatten(3, (grid[1], 4)).unflatten(2, (grid[0], 4))  # (B, C, h, 4, w, 4)
        words = words.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
        return words, self.patch_convs(x).flatten(2).transpose(1, 2), grid


class WordAggregation(nn.Module):
    """Join the words of 2x2 sentences, and convolve them with stride 2 inside the joined sentence: 8x8 words -> 4x4."""

    def __init__(self, dim: int, dim_out: int, **dd):
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.conv = nn.Conv2d(dim, dim_out, kernel_size=3, stride=2, padding=1, **dd)

    def forward(self, x: torch.Tensor, batch: int, grid: Tuple[int, int]) -> torch.Tensor:
        """Words (B*N, M, C) of B images, on `grid` -> (B*N', M, C') on a grid of half the rows and columns, rounded up."""
        x = self.norm(x).flatten(1).unflatten(0, (batch, grid[0], grid[1]))
        h, w = coarser(grid, 2)
        # an odd grid gets a row or column of empty sentences
        x = F.pad(x, (0, 0, 0, 2 * w - grid[1], 0, 2 * h - grid[0]))
        x = x.unflatten(3, (4, 4, -1)).unflatten(2, (w, 2)).unflatten(1, (h, 2))  # (B, h, 2, w, 2, 4, 4, C)
        x = x.permute(0, 1, 3, 7, 2, 5, 4, 6).contiguous().flatten(6, 7).flatten(4, 5).flatten(0, 2)  # (B*N', C, 8, 8)
        return self.conv(x).flatten(2).transpose(1, 2)


class SentenceAggregation(nn.Module):
    """Convolve the map of sentences with stride 2."""

    def __init__(self, dim: int, dim_out: int, **dd):
        super().__init__()
        self.norm = nn.LayerNorm(dim, **dd)
        self.conv = nn.Conv2d(dim, dim_out, kernel_size=3, stride=2, padding=1, **dd)

    def forward(self, x: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
        """Sentences (B, N, D) on `grid` -> (B, N', D') on a grid of half the rows and columns, rounded up."""
        x = self.norm(x).transpose(1, 2).unflatten(2, grid)
        return self.conv(x).flatten(2).transpose(1, 2)


@torch.fx.wrap  # torch.fx keeps it as one node, because the condition is evaluated at run time
def biased_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Attention with a bias (1, H, N, K) on the scores: q (B, H, N, D/H), k and v (B, H, K, D/H) -> (B, H, N, D/H)."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript must not read the inner condition)
        # on a CPU, PyTorch's fused kernel refuses a bias that requires gradients; a traced or exported model may be trained later
        if operators_allowed() and not torch.is_grad_enabled():
            bias = bias.detach()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


class ReducedAttention(nn.Module):
    """Attention of N sentences to K: average pool, linear and norm reduce the grid of keys and values, as in PVT v2."""

    fused_attn: torch.jit.Final[bool]

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qkv_bias=False, attn_drop=0.0, proj_drop=0.0, **dd):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} cannot be split into {num_heads} heads")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.sr_ratio = sr_ratio
        self.fused_attn = use_fused_attn()
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, dim * 2, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.linear = Linear(dim, dim, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, **dd) if sr_ratio > 1 else None
        self.attn_drop = float(attn_drop)
        self.proj_drop = float(proj_drop)

    def forward(self, x: torch.Tensor, relative_pos: torch.Tensor, grid: Tuple[int, int]) -> torch.Tensor:
        """Sentences (B, N, D) on `grid`, and relative positions (1, H, N, K) that are added to the scores -> (B, N, D)."""
        B, N, D = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        if self.linear is not None and self.norm is not None:
            x = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), self.sr_ratio, ceil_mode=True)
            x = self.norm(self.linear(x.flatten(2).transpose(1, 2)))
        k, v = self.kv(x).reshape(B, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        attn_drop = self.attn_drop if self.training else 0.0
        if self.fused_attn:
            x = biased_attention(q, k, v, relative_pos, attn_drop)
        else:
            attn = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5 + relative_pos
            x = F.dropout(attn.softmax(dim=-1), attn_drop) @ v
        return F.dropout(self.proj(x.transpose(1, 2).reshape(B, N, D)), self.proj_drop, self.training)


class PyramidBlock(Block):
    """TNT's block with two changes: LayerNorm over all words of a sentence together, and reduced attention of sentences."""

    def __init__(
        self,
        inner_dim: int,
        embed_dim: int,
        num_heads_inner: int,
        num_heads_outer: int,
        sr_ratio: int,
        inner: bool,
        mlp_ratio: float,
        drop_path: float,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        **dd,
    ):
        options = dict(qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        sizes = (inner_dim, embed_dim, M, 0, num_heads_inner, num_heads_outer)
        super().__init__(*sizes, mlp_ratio, drop_path=drop_path, inner=inner, **options)
        if inner:
            self.norm_in = nn.LayerNorm(M * inner_dim, **dd)
            self.norm_mlp_in = nn.LayerNorm(M * inner_dim, **dd)
        self.attn_out = ReducedAttention(embed_dim, num_heads_outer, sr_ratio, **options)

    def forward(
        self, pixel_tokens: torch.Tensor, patch_tokens: torch.Tensor, relative_pos: torch.Tensor, grid: Tuple[int, int]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Words (B*N, M, C) and sentences (B, N, D) on `grid` -> the same."""
        if self.has_inner:
            pixel_tokens = self.inner(pixel_tokens)
            patch_tokens = self.fold(pixel_tokens, patch_tokens)
        attended = self.attn_out(self.norm_out(patch_tokens), relative_pos, grid)
        patch_tokens = patch_tokens + self.drop_path(attended)
        return pixel_tokens, patch_tokens + self.drop_path(self.mlp(self.norm_mlp(patch_tokens)))


class Stage(nn.Module):
    """Aggregation, except in the first stage, and blocks that share their relative positions."""

    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
        self,
        grid_size: Tuple[int, int],
        word_aggregation: Optional[nn.Module],
        sentence_aggregation: Optional[nn.Module],
        blocks: Sequence[PyramidBlock],
        dynamic_img_size: bool,
        **dd,
    ):
        super().__init__()
        attention = blocks[0].attn_out
        self.grid_size = grid_size
        self.sr_ratio = attention.sr_ratio
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.word_merge = word_aggregation
        self.sentence_merge = sentence_aggregation
        self.blocks = nn.ModuleList(blocks)
        keys = coarser(grid_size, self.sr_ratio)
        shape = (1, attention.num_heads, grid_size[0] * grid_size[1], keys[0] * keys[1])
        self.relative_pos = nn.Parameter(torch.empty(shape, **dd))

    def forward(
        self, pixel_tokens: torch.Tensor, patch_tokens: torch.Tensor, grid: Tuple[int, int]
    ) -> Tuple[torch.Tensor, torch.Tensor, Tuple[int, int]]:
        """Words, sentences and their grid before the stage -> after it."""
        if self.word_merge is not None and self.sentence_merge is not None:
            pixel_tokens = self.word_merge(pixel_tokens, patch_tokens.shape[0], grid)
            patch_tokens = self.sentence_merge(patch_tokens, grid)
            grid = coarser(grid, 2)
        relative_pos = self.relative_pos
        if self.dynamic_img_size:
            relative_pos = resample_relative_pos(relative_pos, grid, self.grid_size, self.sr_ratio)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                pixel_tokens, patch_tokens = checkpoint(block, pixel_tokens, patch_tokens, relative_pos, grid)
            else:
                pixel_tokens, patch_tokens = block(pixel_tokens, patch_tokens, relative_pos, grid)
        return pixel_tokens, patch_tokens, grid


class PyramidTNT(PyramidApi):
    """PyramidTNT.

    Args:
        img_size: size of the images in pixels, a multiple of 8; a number or (height, width).
        in_chans, num_classes: channels of the images, and classes; num_classes=0 leaves out the head.
        global_pool: input of the head: 'avg' (mean of the sentences); or '' without a head, to get the map.
        embed_dim, inner_dim: D and C of the first stage, the widths of sentences and words; twice as wide in the second
            stage, four times in the others.
        depths: blocks of the four stages. The first block has an inner transformer, and the second one in stages of more
            than six.
        num_heads_inner, num_heads_outer: of the first stage; multiplied like the widths.
        sr_ratios: of each stage, how much coarser the grid of keys and values is.
        mlp_ratio, qkv_bias: of all blocks; mlp_ratio holds for both MLPs.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, of the sentence positions, after
            the linear layers of the blocks, and of the attention weights.
        drop_path_rate: stochastic depth of the last block; the rate rises linearly from 0 in the first block.
        dynamic_img_size: accept every image size that is a multiple of 8; all positions are resampled.

    Raises:
        ValueError: a number is of the wrong kind or size, widths do not divide by heads, or there are not four stages.
    """

    dynamic_img_size: torch.jit.Final[bool]

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 128,
        inner_dim: int = 8,
        depths: Sequence[int] = (2, 8, 4, 2),
        num_heads_inner: int = 2,
        num_heads_outer: int = 4,
        sr_ratios: Sequence[int] = (4, 2, 1, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_per_stage(len(WIDENING), depths=depths, sr_ratios=sr_ratios)
        check_positive(embed_dim=embed_dim, inner_dim=inner_dim, in_chans=in_chans)
        check_positive(num_heads_inner=num_heads_inner, num_heads_outer=num_heads_outer)
        check_mlp_ratio(mlp_ratio, inner_dim)
        check_rates(drop_rate=drop_rate, pos_drop_rate=pos_drop_rate, proj_drop_rate=proj_drop_rate)
        check_rates(attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        check_switches(qkv_bias=qkv_bias, dynamic_img_size=dynamic_img_size)
        self.in_chans = in_chans
        self.dynamic_img_size = dynamic_img_size
        dims, inner_dims = ([width * factor for factor in WIDENING] for width in (embed_dim, inner_dim))
        self.num_features = self.head_hidden_size = dims[-1]

        self.stem = Stem(img_size, in_chans, inner_dim, embed_dim, dynamic_img_size, **dd)
        self.patch_pos = nn.Parameter(torch.zeros(1, self.stem.num_patches, embed_dim, **dd))
        self.pixel_pos = nn.Parameter(torch.zeros(1, inner_dim, *self.stem.pixel_grid, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        options = dict(qkv_bias=qkv_bias, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, **dd)
        self.stages = nn.ModuleList()
        for i, grid_size in enumerate(stage_grids(self.stem.grid_size)):
            word_merge = WordAggregation(inner_dims[i - 1], inner_dims[i], **dd) if i > 0 else None
            sentence_merge = SentenceAggregation(dims[i - 1], dims[i], **dd) if i > 0 else None
            with_inner = 2 if depths[i] > 6 else 1  # as in the official code
            sizes = (inner_dims[i], dims[i], num_heads_inner * WIDENING[i], num_heads_outer * WIDENING[i], sr_ratios[i])
            blocks = [
                PyramidBlock(*sizes, number < with_inner, mlp_ratio, next(rates), **options)
                for number in range(depths[i])
            ]
            self.stages.append(Stage(grid_size, word_merge, sentence_merge, blocks, dynamic_img_size, **dd))
        self.feature_info = [dict(module=f"stages.{i}", num_chs=dim, reduction=8 * 2**i) for i, dim in enumerate(dims)]

        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights as the official code does.

        Linear weights and positions come from a truncated normal of std 0.02, convolutions from a normal with variance
        2 / (9 * out_chans), and relative positions from a normal of std 1.
        """
        for positions in (self.patch_pos, self.pixel_pos):
            trunc_normal_(positions, std=0.02)
        for stage in self.stages:
            nn.init.normal_(stage.relative_pos)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, Tuple[int, int]]:
        """Images (B, 3, H, W) -> words (B*N, M, C), sentences (B, N, D), and the grid of sentences."""
        pixel_tokens, patch_tokens, grid = self.stem(x)
        patch_pos = self.patch_pos
        if self.dynamic_img_size:
            patch_pos = resample_abs_pos_embed(patch_pos, grid, self.stem.grid_size, 0)
        pixel_tokens = pixel_tokens + self.pixel_pos.flatten(2).transpose(1, 2)
        # the official code drops positions out, where TNT drops embedded sentences out
        return pixel_tokens, patch_tokens + self.pos_drop(patch_pos), grid

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> map of the last stage's sentences (B, D, H/64, W/64), rounded up, after the final norm."""
        pixel_tokens, patch_tokens, grid = self.embed(x)
        for stage in self.stages:
            pixel_tokens, patch_tokens, grid = stage(pixel_tokens, patch_tokens, grid)
        return self.norm(patch_tokens).transpose(1, 2).unflatten(2, grid)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map (B, D, h, w) -> logits (B, classes); with `pre_logits`, the input of the head."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
