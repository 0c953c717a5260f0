"""Sentences and words in a network: which grids they lie on, and what goes into and comes out of its blocks.

B images, N sentences, M words per sentence, C word width. Blocks are counted from 1; rows and columns from 0.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from timm.models.tnt import TNT as TimmTNT
from torch import Tensor, nn

from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures.features import as_one_line, check_blocks, depth_of
from tnt_timm.models import TNT


def sentence_grid(model: nn.Module, image: Tensor) -> Tuple[int, int]:
    """Rows and columns of sentences (patches) in an image (1, 3, H, W)."""
    embed = getattr(model, "pixel_embed", None) or getattr(model, "patch_embed", None)
    if not hasattr(embed, "patch_size"):
        raise UserError(f"attention: {type(model).__name__} has no patches; pass a TNT or a ViT")
    (height, width), (patch_h, patch_w) = image.shape[2:], embed.patch_size
    return height // patch_h, width // patch_w


def word_grid(model: nn.Module) -> Tuple[int, int]:
    """Rows and columns of words in a sentence."""
    embed = model.pixel_embed
    return tuple(embed.pixel_grid if isinstance(model, TNT) else embed.new_patch_size)


def cell(what: str, asked: Optional[Sequence[int]], grid: Tuple[int, int]) -> Tuple[int, int]:
    if asked is None:
        return grid[0] // 2, grid[1] // 2
    row, column = asked
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ConfigError(f"{what}: {row} {column}: there are {grid[0]} rows and {grid[1]} columns, counted from 0")
    return row, column


def check_words(model: nn.Module, name: str) -> None:
    if not isinstance(model, (TNT, TimmTNT)):
        raise UserError(f"{name}: has no words; pass a TNT")


def blocks_of(model: nn.Module, numbers: Sequence[int], name: str) -> List[nn.Module]:
    if not isinstance(getattr(model, "blocks", None), (nn.ModuleList, nn.Sequential)):
        raise UserError(f"{name}: has no transformer blocks; pass a TNT or a ViT")
    return [model.blocks[number - 1] for number in numbers]


def capture(
    model: nn.Module, image: Tensor, name: str, modules: Sequence[nn.Module], before: bool
) -> Dict[nn.Module, Tuple[Tensor, ...]]:
    """What goes into modules (before), or comes out of them, in one forward pass of an image (1, 3, H, W)."""
    found: Dict[nn.Module, Tuple[Tensor, ...]] = {}

    def keep(module: nn.Module, inputs: Tuple[Tensor, ...], *outputs: Any) -> None:
        found[module] = inputs if before else outputs[0]

    listen = nn.Module.register_forward_pre_hook if before else nn.Module.register_forward_hook
    handles = [listen(module, keep) for module in dict.fromkeys(modules)]
    try:
        with torch.inference_mode(), as_one_line(name):
            model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


def word_maps(model: nn.Module, image: Tensor, blocks: Optional[Sequence[int]], name: str) -> Dict[int, np.ndarray]:
    """Words after chosen blocks, averaged over their channels and laid out in their sentences: block -> (h*m_h, w*m_w).

    Raises:
        UserError: the model is no TNT.
    """
    check_words(model, name)
    numbers = check_blocks(blocks, depth_of(model), name)
    chosen = blocks_of(model, numbers, name)
    outputs = capture(model, image, name, chosen, before=False)
    (rows, columns), (m_h, m_w) = sentence_grid(model, image), word_grid(model)
    maps = {}
    for number, block in zip(numbers, chosen):
        words = outputs[block][0].float().mean(dim=-1).reshape(rows, columns, m_h, m_w)
        maps[number] = words.permute(0, 2, 1, 3).reshape(rows * m_h, columns * m_w).numpy()
    return maps
