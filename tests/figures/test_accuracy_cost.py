"""Accuracy against cost: whose rows are shown with which costs, and names that cover nothing."""

import itertools
import json

import matplotlib.collections
import numpy as np
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tnt_timm.errors import UserError
from tnt_timm.figures import accuracy_cost, labels
from tnt_timm.figures.accuracy_cost import PUBLISHED, draw, panels, read

SPEEDS = {"tnt_ti": 30.0, "tnt_s": 9.5, "tnt_b": 3.5, "deit_small_patch16_224": 11.0, "deit_base_patch16_224": 3.0}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """What scripts/benchmark.py --output writes, as far as it is read."""
    folder = tmp_path_factory.mktemp("benchmark")

    def write(speeds=SPEEDS, img_size=224, **setting):
        setting = dict(mode="infer", dtype="float32", compiled=False) | setting
        found = dict(device="cpu: Some CPU", threads=1, setting=setting)
        times = dict(median_ms=1.0, fastest_ms=1.0, slowest_ms=1.0, peak_mb=1.0, matmul_share=0.5)
        found["speeds"] = [
            dict(model=model, img_size=img_size, batch_size=8, images_per_s=value, **times)
            for model, value in speeds.items()
        ]
        (folder / "speed.json").write_text(json.dumps(found))
        return folder / "speed.json"

    return write


@pytest.fixture(scope="module")
def published():
    return read(PUBLISHED)


@pytest.fixture(scope="module")
def all_points(published, benchmark):
    return [*published, *read([benchmark()])]


@pytest.fixture(scope="module")
def figure(all_points):
    return draw(all_points, list(accuracy_cost.COSTS))


def test_published_rows_are_the_papers(published):
    points = {(point.model, point.source): point for point in published}
    tnt_s = points["TNT-S", "TNT v3 tables 1 and 4"]
    assert (tnt_s.top1, tnt_s.costs, tnt_s.family) == (81.5, {"gmacs": 5.2, "params_m": 23.8}, "TNT")
    fast = points["TNT-S", "TNT v3 table 7"]
    assert (fast.costs, fast.hardware, fast.calculated) == ({"images_per_s": 428}, "V100", ())
    assert {point.family for point in published} >= {"TNT", "DeiT", "ViT", "ResNet", "RegNet"}
    assert all(point.source for point in published)


def test_costs_that_nobody_published_are_counted_and_say_so(published):
    counted = {point.model: point for point in published if point.calculated}
    assert set(counted) == {"TNT-S at 384", "TNT-B at 384", "DeiT-B at 384"}
    assert counted["TNT-S at 384"].costs["gmacs"] == pytest.approx(17.31, abs=0.005)  # README's table
    (row,) = [row for row in accuracy_cost.numbers(published) if row["model"] == "TNT-B at 384"]
    assert (row["gmacs"], row["calculated"]) == (44.533, "gmacs params_m")


def test_a_benchmark_is_a_table(published, benchmark):
    measured = read([benchmark()])
    assert [point.model for point in measured] == ["TNT-Ti", "TNT-S", "TNT-B", "DeiT-S", "DeiT-B"]
    tnt_s = measured[1]
    assert tnt_s.top1 == 81.5 and tnt_s.costs["images_per_s"] == 9.5
    assert tnt_s.costs["params_m"] == pytest.approx(23.768584) and tnt_s.costs["gmacs"] == pytest.approx(
        5.217, abs=1e-3
    )
    assert tnt_s.hardware == "Some CPU, 1 thread, float32, batch 8"
    assert tnt_s.source == "images/s: scripts/benchmark.py; top-1: published"
    (at_384,) = read([benchmark(speeds={"tnt_s_384": 2.0}, img_size=384, compiled=True)])
    assert at_384.model == "TNT-S at 384" and at_384.hardware.endswith(", torch.compile, batch 8")


def test_each_hardware_has_a_panel_of_its_own_range_and_no_point_is_twice_there(all_points, figure):
    found = panels(all_points, list(accuracy_cost.COSTS))
    assert [panel.label.partition(", ")[2] for panel in found] == [
        "",
        "",
        "V100",
        "Some CPU, 1 thread, float32, batch 8",
    ]
    for panel in found:
        names = [point.model for point in panel.points]
        assert len(names) == len(set(names))
    assert next(p for p in found[0].points if p.model == "TNT-S").costs["gmacs"] == 5.2  # the published one
    v100, cpu = [axes.get_xlim() for axes in figure.axes[2:]]
    assert 300 < v100[0] < 428 and 907 < v100[1] < 1300 and 1 < cpu[0] < 3 and 30 < cpu[1] < 60


def test_the_legend_has_each_source(all_points, figure):
    texts = [text.get_text() for text in figure.legends[0].texts]
    assert set(texts[:-1]) == {point.source for point in all_points}
    assert texts[-1] == "hollow: calculated here (scripts/complexity.py)"
    only_measured = draw([point for point in all_points if point.hardware == "V100"], ["images_per_s"])
    assert [text.get_text() for text in only_measured.legends[0].texts] == ["TNT v3 table 7"]


# ---------------------------------------------------------------------------------------------------------- names in place


def boxes_of(axes):
    """In pixels: names, points, and the strokes that join points."""
    axes.figure.canvas.draw()
    names = [Text.get_window_extent(text) for text in axes.texts]  # without their lines
    points = []
    for scatter in axes.collections:
        assert isinstance(scatter, matplotlib.collections.PathCollection)
        points += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in axes.transData.transform(scatter.get_offsets())]
    strokes = []
    for line in axes.lines:
        places = axes.transData.transform(line.get_xydata())
        strokes += [np.linspace(a, b, 400) for a, b in itertools.pairwise(places)]
    return names, points, strokes


def collisions(axes):
    names, points, strokes = boxes_of(axes)
    texts = [text.get_text() for text in axes.texts]
    found = [f"{text} leaves the axes" for text, box in zip(texts, names) if not axes.bbox.contains(*box.min)]
    found += [f"{text} leaves the axes" for text, box in zip(texts, names) if not axes.bbox.contains(*box.max)]
    for i, box in enumerate(names):
        found += [f"{texts[i]} covers {texts[j]}" for j in range(i) if box.overlaps(names[j])]
        found += [f"{texts[i]} covers a point" for point in points if box.overlaps(point)]
        inside = [((s > box.min) & (s < box.max)).all(axis=1).any() for s in strokes]
        found += [f"{texts[i]} is struck through"] * any(inside)
    for text, box in zip(axes.texts, names):
        spot = axes.transData.transform(text.xy)
        apart = np.linalg.norm(np.maximum(np.maximum(box.min - spot, spot - box.max), 0)) * 72 / axes.figure.dpi
        if apart > labels.ADJACENT_PT + 2 and text.arrow_patch is None:
            found.append(f"{text.get_text()} stands {apart:.0f} points apart without a line")
        if text.arrow_patch is not None:
            lead = np.linspace(spot, np.clip(spot, box.min, box.max), 400)[:-8]
            struck = [other for other, o in zip(texts, names) if ((lead > o.min) & (lead < o.max)).all(axis=1).any()]
            found += [f"the line of {text.get_text()} strikes through {other}" for other in struck]
    return found


@pytest.mark.parametrize("dpi", [100, 200])
def test_names_of_the_published_figure_cover_nothing(all_points, figure, dpi):
    figure.set_dpi(dpi)
    for axes, panel in zip(figure.axes, panels(all_points, list(accuracy_cost.COSTS))):
        assert [text.get_text() for text in axes.texts] == [point.model for point in panel.points]
        assert collisions(axes) == []


def test_a_crowd_is_told_apart(tmp_path):
    rows = [f"TNT number {i},{80 + 0.2 * (i % 3)},{5 + 0.3 * (i // 3)},here" for i in range(9)]
    (tmp_path / "crowd.csv").write_text("\n".join(["model,top1,gmacs,source", *rows]))
    (axes,) = draw(read([tmp_path / "crowd.csv"]), ["gmacs"]).axes
    assert len(axes.texts) == 9 and collisions(axes) == []


# ------------------------------------------------------------------------------------------------------------- wrong tables


@pytest.mark.parametrize(
    "speeds, setting, line",
    [
        ({"resnet18": 9.0}, {}, "speed.json: resnet18: nobody published its top-1 at 224 pixels"),
        ({"tnt_s": 9.0}, {"img_size": 160}, "speed.json: tnt_s: nobody published its top-1 at 160 pixels"),
        ({"tnt_s": 9.0}, {"mode": "train"}, "speed.json: measures training steps"),
    ],
)
def test_benchmarks_that_cannot_be_shown(benchmark, speeds, setting, line):
    with pytest.raises(UserError, match=line):
        read([benchmark(speeds=speeds, **setting)])


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("t.csv", "model,top1,source\nx,80,\n", "t.csv: x: says no source"),
        ("t.json", "{}", "t.json: not what `benchmark.py --output FILE` writes without --parts: 'setting'"),
        ("t.json", "model,top1", "t.json: not what"),
    ],
)
def test_tables_that_are_none(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=line):
        read([tmp_path / name])
