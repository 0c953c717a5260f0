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


def test_parts_of_a_forward_pass():
    done = benchmark("tnt_ti", "--parts", "--img-size", 64, "--batch-size", 2, "--repeats", 2, "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in done.stdout.splitlines()[-5:]] == ["stem", "inner", "fold", "outer", "head"]


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
