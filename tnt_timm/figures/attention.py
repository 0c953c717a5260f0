"""Attention of one query: the class token or a sentence to all sentences, or a word to the words of its sentence."""

from typing import Any, List, Literal, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures import images, picture
from tnt_timm.figures.feature_maps import BlockSettings
from tnt_timm.figures.network import Network
from tnt_timm.figures.picture import Panel

CAPTIONS = {
    "class": "attention of the class token to the sentences",
    "sentence": "attention of one sentence to all",
    "word": "attention of one word to the words of its sentence",
}
Cell = Tuple[int, int]  # row, column; of a grid: how many of them
Frame = Tuple[float, float, float, float]  # left, top, width, height in pixels


class AttentionSettings(BlockSettings):
    """Network, image, blocks and query"""

    kind: Literal[tuple(CAPTIONS)] = Field(
        "class",
        description="query: class (token to sentences), sentence (to sentences), word (to words of its sentence)",
    )
    sentence: Optional[List[int]] = Field(
        None, min_length=2, max_length=2, description="row and column of the sentence, from 0 (default: the middle)"
    )
    word: Optional[List[int]] = Field(
        None, min_length=2, max_length=2, description="row and column of the word in its sentence (default: the middle)"
    )

    @model_validator(mode="after")
    def _fits_the_kind(self) -> "AttentionSettings":
        if self.sentence is not None and self.kind == "class":
            raise ValueError("sentence: has no effect with --kind class")
        if self.word is not None and self.kind != "word":
            raise ValueError(f"word: has no effect with --kind {self.kind}; pass --kind word")
        return self


class Attended(NamedTuple):
    """Attention of one query in one block, on the grid of what it attends to."""

    block: int
    heads: np.ndarray  # (H, h, w); together with `prefix`, each head sums to 1
    prefix: np.ndarray  # (H, P), attention to prefix tokens


def draw_attention(networks: Sequence[Network], own: AttentionSettings) -> picture.Drawn:
    """Draw attention of the class token, a sentence or a word in some blocks."""
    (network,) = networks
    shown = images.show(own, network.opened.data_config(own.img_size))
    sentence, word, frames = None, None, []
    if own.kind != "class":
        grid = network.sentence_grid(shown.tensor)
        sentence = cell("sentence", own.sentence, grid)
        frames.append(frame(*shown.pixels.shape[:2], grid, sentence))
    if own.kind == "word":
        grid = network.word_grid()
        word = cell("word", own.word, grid)
        frames.append(frame(frames[0][3], frames[0][2], grid, word))
    found = attended(network, shown.tensor, network.block_numbers(own.blocks), sentence, word)
    arrays = {"image": shown.pixels}
    for each in found:
        arrays[f"block{each.block}_heads"] = each.heads
        if each.prefix.size:
            arrays[f"block{each.block}_prefix"] = each.prefix
    heading = f"{network.title}\n{CAPTIONS[own.kind]}; {shown.caption}; each map has its own colour range"
    return draw(found, shown.pixels, frames, heading), arrays


def cell(what: str, asked: Optional[Sequence[int]], grid: Cell) -> Cell:
    """Return row and column of a query; by default the middle of the grid. Raise ConfigError if it is outside."""
    row, column = asked or (grid[0] // 2, grid[1] // 2)
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ConfigError(f"{what}: {row} {column}: there are {grid[0]} rows and {grid[1]} columns, counted from 0")
    return row, column


def frame(height: float, width: float, grid: Cell, cell: Cell) -> Frame:
    """Return where a cell of a grid lies in an image of some height and width."""
    height, width = height / grid[0], width / grid[1]
    return cell[1] * width, cell[0] * height, width, height


def attended(
    network: Network, image: Tensor, blocks: Sequence[int], sentence: Optional[Cell] = None, word: Optional[Cell] = None
) -> List[Attended]:
    """Compute what a word of a sentence attends to in an image; without a word the sentence, without both the class token.

    Raise UserError if the network has no sentences, words or class token.
    """
    grid = network.sentence_grid(image)
    index = sentence[0] * grid[1] + sentence[1] if sentence else 0
    prefix = 0
    if word:
        grid = network.word_grid()
        rows = [weights[index, :, word[0] * grid[1] + word[1]] for weights in network.inner_attention(image, blocks)]
    else:
        maps = network.outer_attention(image, blocks)
        prefix = maps[0].shape[-1] - grid[0] * grid[1]
        if not (sentence or prefix):
            raise UserError(f"kind: class: {network.given} has no class token; pass --kind sentence")
        rows = [weights[:, prefix + index if sentence else 0] for weights in maps]
    return [
        Attended(block, row[:, prefix:].unflatten(1, grid).numpy(), row[:, :prefix].numpy())
        for block, row in zip(blocks, rows)
    ]


def draw(found: Sequence[Attended], pixels: np.ndarray, frames: Sequence[Frame], heading: str) -> Any:
    """Draw a row per block: the mean over the heads and each head; on the left the input with the query in a frame.

    Frames are of the sentence in the image (H, W, 3), and of the word in the sentence.
    """
    left = [Panel(pixels, "input", frames=frames)]
    if len(frames) > 1:
        (x, y, width, height), word = frames
        left = [Panel(pixels, "input", frames=[frames[0], (x + word[0], y + word[1], *word[2:])])]
        close_up = pixels[round(y) : round(y + height), round(x) : round(x + width)]
        left.append(Panel(close_up, "sentence", frames=[word]))
    means = [Panel(each.heads.mean(axis=0), side=f"block {each.block}") for each in found]
    heads = [[Panel(values) for values in column] for column in zip(*(each.heads for each in found))]
    for number, column in enumerate([means, *heads]):
        column[0] = column[0]._replace(title=f"head {number}" if number else "mean of heads")
    return picture.draw_grid([left, means, *heads], heading, most_in=1.15)
