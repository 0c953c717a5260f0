"""Pictures of attention and of word-level maps; attention.py and tokens.py compute them."""

from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from tnt_timm.figures import picture
from tnt_timm.figures.attention import Attended
from tnt_timm.figures.tokens import cell


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
        map_in = 0.95 * cell_in  # the names of blocks take the rest
        mean = picture.fitted("mean of heads", map_in)
        figure = picture.new(cell_in * (heads + 2), len(found) * (cell_in + 0.04) + 2 * mean.height_in)
        grid = figure.add_gridspec(len(found), heads + 2)
        _draw_query(figure.add_subplot(grid[0, 0]), pixels, marks, picture.fitted("input", map_in))
        if len(found) > 1 and len(marks) > 1:
            left, top, width, height = (round(value) for value in marks[0])
            inside = marks[1]._replace(left=marks[1].left - left, top=marks[1].top - top)
            closer = pixels[top : top + height, left : left + width]
            _draw_query(figure.add_subplot(grid[1, 0]), closer, [inside], picture.fitted("sentence", map_in))
        for row, each in enumerate(found):
            for column, values in enumerate([each.heads.mean(axis=0), *each.heads]):
                axes = figure.add_subplot(grid[row, column + 1])
                text = mean if column == 0 else picture.fitted(f"head\N{NO-BREAK SPACE}{column}", map_in)
                picture.show_map(axes, values, text if row == 0 else None)
                if column == 0:
                    label = picture.fitted(f"block\N{NO-BREAK SPACE}{each.block}", map_in)
                    axes.set_ylabel(label.text, fontsize=label.size)
        picture.write_heading(figure, title)
        picture.write_caption(figure, caption)
    return figure


def _draw_query(axes: Any, pixels: np.ndarray, marks: Sequence[Mark], title: picture.Fitted) -> None:
    picture.show_map(axes, pixels, title)
    axes.set_autoscale_on(False)  # the image stays its own edge
    for mark in marks:
        left, top = mark.left - 0.5, mark.top - 0.5
        right, bottom = left + mark.width, top + mark.height
        corners = [left, right, right, left, left], [top, top, bottom, bottom, top]
        for colour, points in (("white", 2.2), ("red", 1.0)):  # the white edge shows the red on an image of any colour
            axes.plot(*corners, color=colour, linewidth=points, clip_on=False, solid_joinstyle="miter")


def draw_words(maps: Dict[int, np.ndarray], pixels: np.ndarray, title: str, caption: str) -> Any:
    """The input and the word-level map of each block, side by side; each map has its own range of colours."""
    with picture.styled():
        cell_in = min(2.0, picture.PAGE_IN / (len(maps) + 1))
        names = [picture.fitted(f"words, block\N{NO-BREAK SPACE}{number}", cell_in) for number in maps]
        figure = picture.new(cell_in * (len(maps) + 1), cell_in + max(name.height_in for name in names))
        axes = figure.subplots(1, len(maps) + 1)
        picture.show_map(axes[0], pixels, picture.fitted("input", cell_in))
        for panel, values, name in zip(axes[1:], maps.values(), names):
            picture.show_map(panel, values, name)
        picture.write_heading(figure, title)
        picture.write_caption(figure, caption)
    return figure
