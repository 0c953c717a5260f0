"""Accuracy against cost: which rows are shown with which costs, and names that cover nothing."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.transforms import Bbox

from tnt_timm.errors import UserError
from tnt_timm.figures import accuracy_cost, picture
from tnt_timm.figures.accuracy_cost import PUBLISHED, draw, family, panels, read
from tnt_timm.settings.config import own_settings

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
    with picture.style():
        return draw(all_points, list(accuracy_cost.COSTS))


def test_published_rows_are_the_papers(published):
    rows = {(row["model"], row["source"]): row for row in published}
    tnt_s = rows["TNT-S", "TNT v3 tables 1 and 4"]
    assert [tnt_s[key] for key in ("top1", "gmacs", "params_m", "images_per_s")] == [81.5, 5.2, 23.8, None]
    fast = rows["TNT-S", "TNT v3 table 7"]
    assert [fast[key] for key in ("images_per_s", "gmacs", "hardware", "calculated")] == [428, None, "V100", ""]
    assert {family(row) for row in published} >= {"TNT", "DeiT", "ViT", "ResNet", "RegNet"}
    assert all(row["source"] for row in published)


def test_costs_that_nobody_published_are_counted_and_say_so(published):
    counted = {row["model"]: row for row in published if row["calculated"]}
    assert set(counted) == {"TNT-S at 384", "TNT-B at 384", "DeiT-B at 384"}
    assert counted["TNT-S at 384"]["gmacs"] == pytest.approx(17.31, abs=0.005)  # README's table
    tnt_b = counted["TNT-B at 384"]
    assert (tnt_b["gmacs"], tnt_b["calculated"]) == (44.533, "gmacs params_m")


def test_a_benchmark_is_a_table(benchmark):
    measured = read([benchmark()])
    assert [row["model"] for row in measured] == ["TNT-Ti", "TNT-S", "TNT-B", "DeiT-S", "DeiT-B"]
    assert measured[1] == {
        "model": "TNT-S", "top1": 81.5, "gmacs": 5.2, "params_m": 23.8, "images_per_s": 9.5, "calculated": "",
        "hardware": "Some CPU, 1 thread, float32, batch 8", "source": "images/s: scripts/benchmark.py; rest: published",
    }  # fmt: skip
    (at_384,) = read([benchmark(speeds={"tnt_s_384": 2.0}, img_size=384, compiled=True)])
    assert at_384["model"] == "TNT-S at 384" and at_384["hardware"].endswith(", torch.compile, batch 8")
    assert at_384["calculated"] == "gmacs params_m" and at_384["gmacs"] == pytest.approx(17.31, abs=0.005)


def test_each_hardware_has_a_panel_of_its_own_range_and_no_point_is_twice_there(all_points, figure):
    found = panels(all_points, list(accuracy_cost.COSTS))
    assert [panel.hardware for panel in found] == ["", "", "V100", "Some CPU, 1 thread, float32, batch 8"]
    for panel in found:
        names = [row["model"] for row in panel.rows]
        assert len(names) == len(set(names))
    assert next(row for row in found[0].rows if row["model"] == "TNT-S")["gmacs"] == 5.2
    v100, cpu = [axes.get_xlim() for axes in figure.axes[2:]]
    assert 300 < v100[0] < 428 and 907 < v100[1] < 1300 and 1 < cpu[0] < 3 and 30 < cpu[1] < 60


def test_the_legend_has_each_source(all_points, figure):
    texts = [text.get_text() for text in figure.legends[0].texts]
    assert set(texts[:-1]) == {row["source"] for row in all_points}
    assert texts[-1] == "hollow: calculated here (scripts/complexity.py)"
    only_measured = draw([row for row in all_points if row["hardware"] == "V100"], ["images_per_s"])
    assert [text.get_text() for text in only_measured.legends[0].texts] == ["TNT v3 table 7"]


def boxes_of(axes):
    """In pixels: names, points, and pairs of the strokes that join points and of the leaders of names, as dense points."""
    axes.figure.draw_without_rendering()
    names = [text.get_window_extent() for text in axes.texts]
    spots = [spot for scatter in axes.collections for spot in axes.transData.transform(scatter.get_offsets())]
    points = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in spots]
    strokes, leaders = [], []
    for line in axes.lines:
        places = axes.transData.transform(line.get_xydata())
        dense = [np.linspace(a, b, 400) for a, b in itertools.pairwise(places)]
        (strokes if line.get_alpha() == 0.5 else leaders).extend(dense)
    return names, points, strokes, leaders


def collisions(axes):
    names, points, strokes, leaders = boxes_of(axes)
    texts, found = [text.get_text() for text in axes.texts], []
    for i, (text, box) in enumerate(zip(texts, names)):
        if not (axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)):
            found.append(f"{text} leaves the axes")
        found += [f"{text} covers {texts[j]}" for j in range(i) if box.overlaps(names[j])]
        found += [f"{text} covers a point" for point in points if box.overlaps(point)]
        inside = box.padded(-1)
        found += [f"{text} is struck through" for s in strokes if ((s > inside.min) & (s < inside.max)).all(1).any()]
        others = [
            s for s in leaders if np.linalg.norm(np.clip(s[[0, -1]], box.min, box.max) - s[[0, -1]], axis=1).min() > 1
        ]
        found += [f"a leader strikes {text}" for s in others if ((s > inside.min) & (s < inside.max)).all(1).any()]
    return found


@pytest.mark.parametrize("dpi", [100, 200])
def test_names_of_the_published_figure_cover_nothing(all_points, figure, dpi):
    figure.set_dpi(dpi)
    for axes, panel in zip(figure.axes, panels(all_points, list(accuracy_cost.COSTS))):
        assert [text.get_text() for text in axes.texts] == [row["model"] for row in panel.rows]
        assert collisions(axes) == []


@pytest.mark.parametrize("family", ["TNT", "other"])
def test_a_crowd_is_told_apart(tmp_path, family):
    rows = [f"{family} number {i},{80 + 0.2 * (i % 3)},{5 + 0.3 * (i // 3)},here" for i in range(9)]
    (tmp_path / "crowd.csv").write_text("\n".join(["model,top1,gmacs,source", *rows]))
    (axes,) = draw(read([tmp_path / "crowd.csv"]), ["gmacs"]).axes
    assert len(axes.texts) == 9 and collisions(axes) == []


@pytest.mark.parametrize(
    "speeds, setting, line",
    [
        ({"resnet18": 9.0}, {}, "speed.json: resnet18: no published top-1 at 224 pixels is known"),
        ({"tnt_s": 9.0}, {"img_size": 160}, "speed.json: tnt_s: no published top-1 at 160 pixels is known"),
        ({"tnt_s": 9.0}, {"mode": "train"}, "speed.json: measures training steps"),
    ],
)
def test_benchmarks_that_cannot_be_shown(benchmark, speeds, setting, line):
    with pytest.raises(UserError, match=line):
        read([benchmark(speeds=speeds, **setting)])


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("t.csv", "model,top1,source\nx,80,\n", "t.csv: x: names no source"),
        ("t.json", "{}", "t.json: not what `benchmark.py --output FILE` writes without --parts: 'setting'"),
        ("t.json", "model,top1", "t.json: not what"),
    ],
)
def test_tables_that_are_none(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=line):
        read([tmp_path / name])


def test_errors_are_bars_and_other_accuracies_are_not_imagenets(tmp_path):
    table = tmp_path / "ours.csv"
    table.write_text("model,top1,top1_error,gmacs,source\nTNT,81.5,0.6,0.018,here\nDeiT,80.5,,0.017,here\n")
    own = own_settings(accuracy_cost.AccuracyCostSettings, {"published": False, "costs": ["gmacs"]})
    figure, rows = accuracy_cost.draw_accuracy_cost([str(table)], own)
    assert [row.get("top1_error") for row in rows] == [0.6, None]
    (axes,) = figure.axes
    (bar,) = axes.containers
    ((_, low), (_, high)) = bar.lines[2][0].get_segments()[0]
    assert (low, high) == pytest.approx((80.9, 82.1))
    assert axes.get_ylabel() == "top-1 (%)"
    table.write_text("model,top1,top1_error,gmacs,source\nTNT,81.5,much,0.018,here\n")
    with pytest.raises(UserError, match="top1_error: 'much' is not a number"):
        read([table])
