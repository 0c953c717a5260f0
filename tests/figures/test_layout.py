"""No text of a figure overlaps another or leaves the figure, and no legend covers what is drawn."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from tnt_timm.figures import attention, curves, feature_maps, growth, picture, positions, tsne
from tnt_timm.figures.attention import Attended
from tnt_timm.figures.picture import Panel

RNG = np.random.default_rng(0)
LONG = "deit_small_distilled_patch16_224, untrained weights"
CAPTION = "attention of the class token to the sentences; china, 224 pixels; each map has its own colour range"
PIXELS = np.zeros((64, 64, 3), np.uint8)
SENTENCE, WORD = (48, 48, 16, 16), (12, 12, 4, 4)


def maps(title, depth, unit="block"):
    blocks = range(1, depth + 1)
    return title, [feature_maps.Maps(f"{unit} {b}", np.arange(12), RNG.normal(size=(12, 4, 4))) for b in blocks]


def attended(heads, depth, *frames):
    found = [Attended(block + 1, RNG.random((heads, 4, 4)), RNG.random((heads, 1))) for block in range(depth)]
    return attention.draw(found, PIXELS, frames, f"{LONG}\n{CAPTION}")


def cloud(title, classes=None, about="384 maps of block 12"):
    return tsne.Cloud(title, RNG.normal(size=(30, 2)), 9.0, classes, about)


def run(number):
    return [dict(run=f"run {number}", epoch=1, eval_loss=2, eval_top1=number), dict(run="", epoch=2, eval_top1=9)]


def grown():
    cases = [(n, size, batch) for n in range(1, 5) for size in (224, 1024) for batch in (1, 16)]
    measured = "a training step; AMD EPYC 9B14 96-Core Processor, 16 threads, float32"
    return [dict(model=f"{LONG} {n}", img_size=size, batch_size=batch, ms_per_image=8.0 * n, peak_mb=2.0,
                 measured=measured) for n, size, batch in cases]  # fmt: skip


FIGURES = {
    "maps of three models": lambda: feature_maps.draw([maps(LONG, 3), maps("r18", 2, "stage"), maps(LONG, 3)], PIXELS, CAPTION),
    "maps of six models": lambda: feature_maps.draw([maps(LONG, 2)] * 6, PIXELS, CAPTION),
    "maps of one block": lambda: feature_maps.draw([maps(LONG, 1)], PIXELS, CAPTION),
    "attention, 12 blocks": lambda: attended(3, 12),
    "attention, 12 heads": lambda: attended(12, 3, SENTENCE, WORD),
    "attention, 16 heads": lambda: attended(16, 2),
    "attention, one block": lambda: attended(2, 1),
    "words, one block": lambda: picture.draw_grid([[Panel(PIXELS, "input")], [Panel(RNG.random((8, 8)), "words, block 12")]],
                                                  f"{LONG}\n{CAPTION}", 2.0),
    "t-SNE": lambda: tsne.draw([cloud(LONG)] * 3, CAPTION),
    "t-SNE by class": lambda: tsne.draw([cloud("a", ["cat", "dog", "fox"] * 10, ""), cloud("b")], CAPTION),
    "positions": lambda: positions.draw({"sentence": RNG.random((6,) * 4), "word": RNG.random((4,) * 4)}, LONG),
    "curves": lambda: curves.draw([run(number) for number in range(9)]),
    "growth": lambda: growth.draw(grown()),
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
            apart = box.x1 <= its.x0 + 1 or its.x1 <= box.x0 + 1 or box.y1 <= its.y0 + 1 or its.y1 <= box.y0 + 1
            assert apart, (one, other)
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def test_panels_of_positions_are_further_apart_than_their_maps():
    figure = FIGURES["positions"]()
    figure.draw_without_rendering()
    left, right = figure.axes[:2]
    map_in_pixels = right.bbox.width / (4 * 4 + 3)  # four maps of four positions, gaps of one
    assert right.bbox.x0 - left.bbox.x1 > 1.5 * map_in_pixels


def test_a_frame_at_the_edge_leaves_the_image_as_it_is():
    axes = attended(2, 1, SENTENCE).axes[0]
    assert axes.get_xlim() == (-0.5, 63.5) and axes.get_ylim() == (63.5, -0.5)
    (frame,) = (patch for patch in axes.patches if isinstance(patch, Rectangle))
    assert frame.get_bbox().bounds == (47.5, 47.5, 16, 16) and not frame.get_clip_on() and frame.get_path_effects()


def test_a_text_is_broken_into_lines_that_fit():
    assert picture.wrapped("one two three four", 10) == "one two three four"
    lines = picture.wrapped(CAPTION, 4.4).split("\n")
    assert len(lines) > 1 and " ".join(lines) == CAPTION
