"""scripts/benchmark.py as a user types it."""

import csv
import functools
import io
import json

import pytest

from tnt_timm.errors import UserError
from tnt_timm.figures import growth
from tnt_timm.ops import choose_backend


@pytest.fixture
def benchmark(run_script, monkeypatch):
    monkeypatch.setattr(choose_backend, "_logged", set())  # as in a process of its own
    return functools.partial(run_script, "benchmark")


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_models_side_by_side(benchmark, tmp_path, mode):
    out = tmp_path / "speed.json"
    options = ("--img-size", 64, "--batch-size", 4, "--repeats", 3, "--threads", 1, "--device", "cpu")
    done = benchmark("tnt_ti", "vit_tiny_patch16_224", *options, "--mode", mode, "--format", "csv", "--output", out)
    assert done.status == 0, done.err
    rows = list(csv.DictReader(io.StringIO(done.out[done.out.index("model,") :])))
    assert [row["model"] for row in rows] == ["tnt_ti", "vit_tiny_patch16_224"] and rows[0]["ratio"] == "1.00"
    found = json.loads(out.read_text())
    assert found["versions"]["torch"] and found["setting"]["mode"] == mode
    assert found["instruction_set"] in done.out.splitlines()[0] and "1 CPU thread" in done.out.splitlines()[0]
    (inner,) = (line for line in found["backends"] if line.startswith("inner transformer backend: "))
    assert inner in done.out
    for row, speed in zip(rows, found["speeds"]):
        assert speed["fastest_ms"] <= speed["median_ms"] <= speed["slowest_ms"]
        assert speed["images_per_s"] == pytest.approx(4e3 / speed["median_ms"])
        assert 0 < speed["matmul_share"] < 1.5 and speed["peak_mb"] > 0
        assert float(row["ms"]) == pytest.approx(speed["median_ms"], abs=0.06)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_parts_of_a_step(benchmark, tmp_path, mode):
    out = tmp_path / "parts.json"
    options = ("--mode", mode, "--img-size", 64, "--batch-size", 2, "--repeats", 2, "--device", "cpu")
    done = benchmark("tnt_ti", "--parts", *options, "--format", "csv", "--output", out)
    assert done.status == 0, done.err
    parts = json.loads(out.read_text())["parts"]
    assert [row["part"] for row in parts] == ["stem", "inner", "fold", "outer", "head"]
    assert all(row["ms"] > 0 and 0 < row["matmul_share"] < 1.5 and 0 < row["bandwidth_share"] < 1.5 for row in parts)
    assert done.out.splitlines()[-5].startswith("tnt_ti,64,2,stem,")


def test_several_sizes_and_their_figure(benchmark, run_script, tmp_path):
    out, picture = tmp_path / "speed.json", tmp_path / "growth.png"
    options = ("--img-size", 32, 64, "--batch-size", 1, 2, "--repeats", 1, "--threads", 1, "--device", "cpu")
    done = benchmark("tnt_ti", "vit_tiny_patch16_224", *options, "--output", out)
    assert done.status == 0, done.err
    rows = json.loads(out.read_text())["speeds"]
    assert [(row["img_size"], row["batch_size"]) for row in rows[::2]] == [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert [line.split()[7] for line in done.out.splitlines()[-8::2]] == ["1.00"] * 4  # relative to the group's first
    drawn = run_script("figures", "growth", out, "--output", picture)
    assert drawn.status == 0, drawn.err
    assert picture.stat().st_size > 10_000
    with picture.with_suffix(".csv").open(newline="") as file:
        shown = [float(row["ms_per_image"]) for row in csv.DictReader(file)]
    assert shown == pytest.approx([row["median_ms"] / row["batch_size"] for row in rows])


def test_a_model_without_an_argument_for_the_image_size(benchmark):
    done = benchmark("resnet18", "--img-size", 32, "--batch-size", 1, "--repeats", 1, "--device", "cpu")
    assert done.status == 0 and done.out.splitlines()[-1].split()[:3] == ["resnet18", "32", "1"]


def measured(path, *cases, mode="infer", **more):
    """Write a file of a model at sizes and batches."""
    times = dict(median_ms=8.0, fastest_ms=7.0, slowest_ms=9.0, images_per_s=1.0, peak_mb=2.0, matmul_share=0.5)
    speeds = [dict(model="tnt_ti", img_size=size, batch_size=batch, **times) for size, batch in cases]
    setting = dict(mode=mode, dtype="float32", compiled=False)
    path.write_text(json.dumps(dict(device="cpu: Some CPU", threads=1, setting=setting, speeds=speeds) | more))
    return path


@pytest.mark.parametrize("cases", [[(32, 1)], [(32, 1), (64, 2)], [(32, 1), (32, 1)]])
def test_a_figure_needs_something_that_grows(tmp_path, cases):
    with pytest.raises(UserError, match=r"speed\.json: nothing grows"):
        growth.read([measured(tmp_path / "speed.json", *cases)])


def test_a_figure_shows_one_machine_and_kind_of_step(tmp_path):
    first, second = measured(tmp_path / "first.json", (32, 1), (64, 1)), tmp_path / "second.json"
    for more in (dict(mode="train"), dict(device="cpu: Another CPU")):
        with pytest.raises(UserError, match=r"second\.json: .*draw each alone"):
            growth.read([first, measured(second, (128, 1), **more)])
    rows = growth.read([first, measured(second, (64, 1), (128, 1), (64, 2))])
    assert [(row["img_size"], row["batch_size"]) for row in rows] == [(32, 1), (64, 1), (128, 1), (64, 2)]
    assert rows[3]["ms_per_image"] == 4.0 and rows[0]["measured"] == "inference; Some CPU, 1 thread, float32"


@pytest.mark.parametrize(
    "argv, status, line",
    [
        ("tnt_sx", 2, "no such model"),
        ("tnt_s --device tpu", 2, "device: 'tpu': not available here; pass --device cpu"),
        ("vit_tiny_patch16_224 --parts", 2, "not a TNT"),
        ("", 2, "MODEL"),
        ("resnet18 --img-size 0", 2, "img_size"),
        ("tnt_s --img-size 100", 1, "tnt_s: cannot be counted: img_size (100, 100)"),
        ("tnt_s --output nowhere/speed.json", 2, "nowhere/speed.json: no such folder"),
    ],
)
def test_mistakes_are_one_line(benchmark, argv, status, line):
    done = benchmark(*argv.split())
    assert done.status == status
    assert line in done.err.splitlines()[-1] and "Traceback" not in done.err
