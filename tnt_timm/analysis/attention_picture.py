"""Pictures of attention and of word-level maps; attention.py and tokens.py compute them."""

from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from tnt_timm.analysis import picture
from tnt_timm.analysis.attention import Attended
from tnt_timm.analysis.tokens import cell


def attention_numbers(found: Sequence[Attended], pixels: np.ndarray) -> Dict[str, np.ndarray]:
    """The arrays behind the picture."""
    arrays = {"image": pixels}
    for each in found:
        arrays[f"block{each.block}_heads"] = each.heads
        if each.prefix.size:  # words have no such tokens among them
            arrays[f"block{each.block}_prefix"] = each.prefix
    return arrays


class Mark(NamedTuple):
    """Where the query is, in pixels of the image: left, top, width, height."""

    left: float
    top: float
    width: float
    height: float


def query_mark(
    pixels: np.ndarray,
    grid: Tuple[int, int],
    sentence: Optional[Tuple[int, int]],
    words: Optional[Tuple[int, int]] = None,
    word: Optional[Tuple[int, int]] = None,
) -> Mark:
    """The sentence, or with `words` (the grid of words) the word in it, as a rectangle of the image."""
    (row, column), (height, width) = (
        cell("sentence", sentence, grid),
        (pixels.shape[0] / grid[0], pixels.shape[1] / grid[1]),
    )
    left, top = column * width, row * height
    if words is not None:
        row, column = cell("word", word, words)
        height, width = height / words[0], width / words[1]
        left, top = left + column * width, top + row * height
    return Mark(left, top, width, height)


def draw_attention(
    found: Sequence[Attended], pixels: np.ndarray, marks: Sequence[Mark], title: str, caption: str
) -> Any:
    """A row per block: the mean over the heads and each head; on the left the input with the query marked.

    Args:
        found: the attention.
        pixels: the image (H, W, 3).
        marks: what is framed in the image: the sentence, and perhaps the word in it.
        title, caption: above and below.
    """
    heads = max(len(each.heads) for each in found)
    with picture.styled():
        cell_in = min(1.15, picture.PAGE_IN / (heads + 2))
        figure = picture.new(cell_in * (heads + 2), len(found) * (cell_in + 0.04) + 0.6)
        grid = figure.add_gridspec(len(found), heads + 2)
        _draw_query(figure.add_subplot(grid[0, 0]), pixels, marks, "input")
        if len(found) > 1 and len(marks) > 1:
            left, top, width, height = (round(value) for value in marks[0])
            inside = marks[1]._replace(left=marks[1].left - left, top=marks[1].top - top)
            _draw_query(
                figure.add_subplot(grid[1, 0]), pixels[top : top + height, left : left + width], [inside], "sentence"
            )
        for row, each in enumerate(found):
            for column, values in enumerate([each.heads.mean(axis=0), *each.heads]):
                axes = figure.add_subplot(grid[row, column + 1])
                text = "mean of heads" if column == 0 else f"head {column}"
                picture.show_map(axes, values, text if row == 0 else "")
                if column == 0:
                    axes.set_ylabel(f"block {each.block}")
        figure.suptitle(title, fontsize=8)
        picture.write_caption(figure, caption)
    return figure


def _draw_query(axes: Any, pixels: np.ndarray, marks: Sequence[Mark], title: str) -> None:
    picture.show_map(axes, pixels, title)
    for mark in marks:
        left, top = mark.left - 0.5, mark.top - 0.5
        right, bottom = left + mark.width, top + mark.height
        axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="red", linewidth=1)


def draw_words(maps: Dict[int, np.ndarray], pixels: np.ndarray, title: str, caption: str) -> Any:
    """The input and the word-level map of each block, side by side; each map has its own range of colours."""
    with picture.styled():
        cell_in = min(2.0, picture.PAGE_IN / (len(maps) + 1))
        figure = picture.new(cell_in * (len(maps) + 1), cell_in + 0.6)
        axes = figure.subplots(1, len(maps) + 1)
        picture.show_map(axes[0], pixels, "input")
        for panel, (number, values) in zip(axes[1:], maps.items()):
            picture.show_map(panel, values, f"words, block {number}")
        figure.suptitle(title, fontsize=8)
        picture.write_caption(figure, caption)
    return figure
