"""No text of a figure overlies another or leaves the figure, and what is drawn does not lie under a legend."""

import numpy as np
import pytest
from matplotlib.text import Text

from tnt_timm.costs.throughput import Speed
from tnt_timm.figures import attention_picture, curves, features, growth, picture, positions, tsne
from tnt_timm.figures.attention import Attended
from tnt_timm.figures.attention_picture import Mark

RNG = np.random.default_rng(0)
LONG = "deit_small_distilled_patch16_224, untrained weights"
CAPTION = "attention of the class token to the sentences; china, 224 pixels; each map has its own range of colours"
PIXELS = np.zeros((64, 64, 3), np.uint8)


def maps(title, depth, unit="block"):
    drawn = [RNG.normal(size=(12, 4, 4)) for _ in range(depth)]
    return features.Maps(title, unit, list(range(1, depth + 1)), [np.arange(12)] * depth, drawn)


def attended(heads, depth):
    return [Attended(block + 1, RNG.random((heads, 4, 4)), RNG.random((heads, 1))) for block in range(depth)]


def attention(heads, depth, *marks):
    return attention_picture.draw_attention(attended(heads, depth), PIXELS, marks, LONG, CAPTION)


def cloud(title, about="384 maps of block 12", labels=None):
    return tsne.Cloud(title, about, RNG.normal(size=(30, 2)), 9.0, labels)


FIGURES = {
    "maps of three models": lambda: features.draw([maps(LONG, 3), maps("r18", 2, "stage"), maps(LONG, 3)], PIXELS, CAPTION),
    "maps of six models": lambda: features.draw([maps(LONG, 2)] * 6, PIXELS, CAPTION),
    "maps of one block": lambda: features.draw([maps(LONG, 1)], PIXELS, CAPTION),
    "attention, 12 blocks": lambda: attention(3, 12),
    "attention, 12 heads": lambda: attention(12, 3, Mark(48, 48, 16, 16), Mark(60, 60, 4, 4)),
    "attention, 16 heads": lambda: attention(16, 2),
    "attention, one block": lambda: attention(2, 1),
    "words, one block": lambda: attention_picture.draw_words({12: RNG.normal(size=(8, 8))}, PIXELS, LONG, CAPTION),
    "t-SNE": lambda: tsne.draw([cloud(LONG)] * 3, None, CAPTION),
    "t-SNE by class": lambda: tsne.draw([cloud("a", "", np.arange(30) % 3), cloud("b")], ["cat", "dog", "fox"], CAPTION),
    "positions": lambda: positions.draw({"sentence": RNG.random((6,) * 4), "word": RNG.random((4,) * 4)}, LONG, CAPTION),
    "curves": lambda: curves.draw([curves.Run(f"run {n}", [1, 2], {"eval_loss": [2, n], "eval_top1": [n, 9]})
                                   for n in range(9)]),
    "growth": lambda: growth.draw(growth.Growth("a training step; AMD EPYC 9B14 96-Core Processor, 16 threads, float32", [
        Speed(f"{LONG} {n}", size, batch, 8.0 * n, 7.0, 9.0, 1.0, 2.0, 0.5)
        for n in range(1, 5) for size in (224, 1024) for batch in (1, 16)])),
}  # fmt: skip


@pytest.mark.parametrize("dpi", [70, 200])
@pytest.mark.parametrize("name", FIGURES)
def test_texts_have_room(name, dpi):
    figure = FIGURES[name]()
    figure.set_dpi(dpi)
    figure.draw_without_rendering()
    ticks = {label for axes in figure.axes for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in ticks]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    assert len(boxes) > 2
    for index, (one, box) in enumerate(boxes):
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1, one
        for other, its in boxes[index + 1 :]:
            assert box.x1 <= its.x0 + 1 or its.x1 <= box.x0 + 1 or box.y1 <= its.y0 + 1 or its.y1 <= box.y0 + 1, (
                one,
                other,
            )
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def test_panels_of_positions_are_further_apart_than_their_maps():
    figure = FIGURES["positions"]()
    figure.draw_without_rendering()
    left, right = figure.axes[:2]
    map_in_pixels = right.bbox.width / (4 * 4 + 3)  # four maps of four positions, gaps of one
    assert right.bbox.x0 - left.bbox.x1 > 1.5 * map_in_pixels


def test_a_frame_at_the_edge_leaves_the_image_as_it_is():
    axes = attention(2, 1, Mark(48, 48, 16, 16)).axes[0]
    assert axes.get_xlim() == (-0.5, 63.5) and axes.get_ylim() == (63.5, -0.5)
    assert [line.get_color() for line in axes.lines] == ["white", "red"]
    assert axes.lines[0].get_linewidth() > axes.lines[1].get_linewidth()
    assert not any(line.get_clip_on() for line in axes.lines)


def test_lines_of_a_text_are_of_about_one_length():
    assert picture.fitted("one two three four", 10).text == "one two three four"
    lines = picture.fitted(CAPTION, 4.4, 7).text.split("\n")
    assert len(lines) == 2 and max(map(len, lines)) < 1.3 * min(map(len, lines))
    assert " ".join(lines) == CAPTION
    small = picture.fitted("deit_small_distilled_patch16_224", 1.4)
    assert small.text == "deit_small_distilled_patch16_224" and small.size < 7
