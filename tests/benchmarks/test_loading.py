"""benchmarks/loader.py, reduced_size.py and augmentation.py: small runs from the images to the page."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tnt_timm.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
AUGMENTATION = runpy.run_path(str(BENCHMARKS / "augmentation.py"))


def test_every_way_to_load_is_measured(tmp_path):
    page = tmp_path / "loader.md"
    small = "--images 64 --workers 1 --rounds 1 --batch-size 32 --device cpu --device-batches 2 3".split()
    subprocess.run(
        [sys.executable, str(BENCHMARKS / "loader.py"), *small, "--output", str(page)], check=True, timeout=300
    )
    text = page.read_text()
    for way in ("--augment-on worker", "--augment-on device", "timm", "torchvision"):
        assert re.search(rf"^\| {way} \| [1-9]\d* \|", text, re.M)
    assert re.findall(r"^\| (224|384) \| (\d) \|", text, re.M) == [
        ("224", "2"),
        ("224", "3"),
        ("384", "2"),
        ("384", "3"),
    ]


def test_reduced_sizes_are_measured(tmp_path):
    page = tmp_path / "page.md"
    small = "--images 16 --photographs 1 --rounds 1".split()
    command = [sys.executable, str(BENCHMARKS / "reduced_size.py"), *small, "--output", str(page)]
    subprocess.run(command, check=True, timeout=300)
    found = re.search(r"^\| 4,000 x 3,000 \| 100 % \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page.read_text(), re.M)
    full, reduced, change = map(float, found.groups())
    assert 0 < reduced < full and change > 0


@pytest.fixture
def digits_only(monkeypatch):
    """Only digits, with a network of one block. Returns the function `study`, whose settings are its argument."""
    names = AUGMENTATION["study"].__globals__
    tiny = ("--model-kwargs", "depth=1", "embed_dim=64", "num_heads_outer=2")
    monkeypatch.setitem(names, "DATA", {"Digits": (*AUGMENTATION["DATA"]["Digits"], *tiny)})
    return AUGMENTATION["study"]


def test_both_ways_are_trained(digits_only, tmp_path, capsys):
    own = AUGMENTATION["Settings"](
        seeds=2, epochs=1, jobs=2, output=str(tmp_path / "runs"), report=str(tmp_path / "page.md")
    )
    digits_only(own)
    text, out = (tmp_path / "page.md").read_text(), capsys.readouterr().out
    seeds = [pair.groups() for pair in re.finditer(r"^\| [12] \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)]
    for way, column in zip(("worker", "device"), zip(*seeds)):
        for seed, accuracy in enumerate(column, 1):
            name = f"digits-{way}-seed{seed}-1epochs"
            assert f"{name}: {accuracy} %" in out
            settings = (tmp_path / "runs" / name / "config.yaml").read_text()
            assert f"augment_on: {way}\n" in settings and f"seed: {seed}\n" in settings
    assert "commit " in text and len(seeds) == 2


def test_the_interval_is_that_of_paired_differences():
    """Of differences 1, 2 and 3: mean 2, standard deviation 1, and Student's t for two degrees of freedom is 4.303."""
    accuracies = dict(worker=(70.0, 80.0, 75.0), device=(71.0, 82.0, 78.0))
    found = {
        AUGMENTATION["Run"]("Digits", way, seed, 0): accuracy
        for way, column in accuracies.items()
        for seed, accuracy in enumerate(column, 1)
    }
    text = AUGMENTATION["_section"]("Digits", found)
    assert "| mean | 75.00 ± 5.00 | 77.00 ± 5.57 |" in text
    assert "+2.00 points, 95 % interval -0.48 to +4.48" in text


def test_a_failed_run_is_named_with_its_message(digits_only, tmp_path):
    own = AUGMENTATION["Settings"](seeds=2, jobs=1, output=str(tmp_path / "runs"), report=str(tmp_path / "page.md"))
    AUGMENTATION["study"].__globals__["DATA"]["Digits"] += ("--epochs", "none")
    with pytest.raises(UserError, match=r"digits-worker-seed1\.txt: the run failed: .*epochs"):
        digits_only(own)
    assert not (tmp_path / "page.md").exists()
