"""scripts/benchmark.py as a user types it."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(*argv):
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_models_side_by_side(tmp_path, mode):
    out = tmp_path / "speed.json"
    options = ("--img-size", 64, "--batch-size", 4, "--repeats", 3, "--threads", 1, "--device", "cpu")
    done = benchmark("tnt_ti", "vit_tiny_patch16_224", *options, "--mode", mode, "--format", "csv", "--output", out)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout[done.stdout.index("model,") :])))
    assert [row["model"] for row in rows] == ["tnt_ti", "vit_tiny_patch16_224"]
    assert rows[0]["ratio"] == "1.00"
    found = json.loads(out.read_text())
    assert found["versions"]["torch"] and found["setting"]["mode"] == mode
    for row, speed in zip(rows, found["speeds"]):
        assert speed["fastest_ms"] <= speed["median_ms"] <= speed["slowest_ms"]
        assert speed["images_per_s"] == pytest.approx(4e3 / speed["median_ms"])
        assert 0 < speed["matmul_share"] < 2 and speed["peak_mb"] > 0
        assert float(row["ms"]) == pytest.approx(speed["median_ms"], abs=0.06)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_parts_of_a_step(tmp_path, mode):
    out = tmp_path / "parts.json"
    options = ("--mode", mode, "--img-size", 64, "--batch-size", 2, "--repeats", 2, "--device", "cpu")
    done = benchmark("tnt_ti", "--parts", *options, "--format", "csv", "--output", out)
    assert done.returncode == 0, done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert [row["part"] for row in parts] == ["stem", "inner", "fold", "outer", "head"]
    assert all(row["ms"] > 0 and 0 < row["matmul_share"] < 2 and 0 < row["bandwidth_share"] < 2 for row in parts)
    assert done.stdout.splitlines()[-5].startswith("tnt_ti,64,2,stem,")


def test_several_sizes_and_their_picture(tmp_path):
    out = tmp_path / "speed.json"
    options = ("--img-size", 32, 64, "--batch-size", 1, 2, "--repeats", 1, "--threads", 1, "--device", "cpu")
    done = benchmark("tnt_ti", "vit_tiny_patch16_224", *options, "--output", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["speeds"]
    cases = [(32, 1), (32, 2), (64, 1), (64, 2)]
    assert [(row["img_size"], row["batch_size"]) for row in rows[::2]] == cases
    assert [line.split()[7] for line in done.stdout.splitlines()[-8::2]] == ["1.00"] * 4  # each group has its own first
    picture = tmp_path / "growth.png"
    script = [sys.executable, str(ROOT / "scripts/figures.py"), "growth", str(out), "--output", str(picture)]
    drawn = subprocess.run(script, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert picture.stat().st_size > 10_000
    with picture.with_suffix(".csv").open(newline="") as file:
        shown = list(csv.DictReader(file))
    assert [float(row["ms_per_image"]) for row in shown] == [
        pytest.approx(row["median_ms"] / row["batch_size"]) for row in rows
    ]


def test_a_picture_needs_several_sizes(tmp_path):
    (tmp_path / "speed.json").write_text('{"speeds": []}')
    script = [sys.executable, str(ROOT / "scripts/figures.py"), "growth", str(tmp_path / "speed.json")]
    done = subprocess.run([*script, "--output", str(tmp_path / "growth.png")], capture_output=True, text=True)
    assert done.returncode == 1 and "speed.json" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "argv, line",
    [
        (["tnt_sx"], "no such model"),
        (["tnt_s", "--device", "tpu"], "device: 'tpu' is not here; choose cpu"),
        (["vit_tiny_patch16_224", "--parts"], "not a TNT"),
        ([], "MODEL"),
    ],
)
def test_mistakes_are_one_line(argv, line):
    done = benchmark(*argv)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
