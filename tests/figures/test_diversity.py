"""Numbers of diversity and local structure, against features whose numbers are known."""

import csv

import numpy as np
import pytest
import torch

from tnt_timm.figures import diversity


@pytest.fixture
def features():
    """features(D) -> independent channels (4000, D)"""
    return lambda channels: np.random.default_rng(0).normal(size=(4000, channels))


def test_correlation(features):
    independent = features(8)
    assert diversity.correlation(independent) < 0.03
    assert diversity.correlation(np.outer(independent[:, 0], [1, -2, 3])) == pytest.approx(1)
    pairs = np.concatenate([independent, -independent], axis=1)  # of 120 pairs, 8 are perfect
    assert diversity.correlation(pairs) == pytest.approx(8 / 120, abs=0.02)
    matrix = np.abs(np.corrcoef(pairs, rowvar=False))
    assert diversity.correlation(pairs + 100) == pytest.approx(matrix[np.triu_indices(16, 1)].mean())
    constant = np.concatenate([independent[:, :2], np.ones((4000, 1))], axis=1)
    assert diversity.correlation(constant) == pytest.approx(diversity.correlation(independent[:, :2]))


def test_components(features):
    assert diversity.components(features(10)) == 90
    assert diversity.components(features(2) @ np.ones((2, 10)) + 5) == 10
    scaled = features(10) * np.array([10, 10, *[0.1] * 8])
    assert diversity.components(scaled) == 20


def test_patches_are_in_the_order_of_the_grid():
    image = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6) ** 2
    found = diversity.patches(image, (2, 2)).reshape(2, 2, 2, 2, 3)
    grey = image.mean(dim=1).numpy()
    patch = grey[1, 2:4, 0:3]
    assert np.allclose(found[1, 1, 0], patch - patch.mean(), atol=1e-2)


def test_explained(features):
    pixels = features(12)[:, :4]
    hidden = features(12)[:, 4:]
    assert diversity.explained(np.concatenate([pixels @ np.diag([1, 2, 3, 4]), hidden], axis=1), pixels) > 0.999
    assert abs(diversity.explained(hidden, pixels)) < 0.01
    assert diversity.explained(np.concatenate([pixels[:, :2], hidden], axis=1), pixels) == pytest.approx(0.5, abs=0.03)


def test_the_numbers_are_of_each_block(named, tnt):
    images = torch.randn(70, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    found = diversity.measure(tnt, images)
    assert [each.block for each in found] == [1, 2, 3]
    maps = np.concatenate([tnt.feature_maps(image[None], [2])[0] for image in images])  # (70, 24, 3, 2)
    rows = np.stack([maps[b, :, y, x] for b in range(70) for y in range(3) for x in range(2)]).astype(np.float64)
    assert found[1].correlation == pytest.approx(diversity.correlation(rows), abs=1e-5)
    assert found[1].local == pytest.approx(diversity.explained(rows, diversity.patches(images, (3, 2))), abs=1e-3)


def test_the_figure_writes_them(run_figures, digits_run, tmp_path):
    out = run_figures("diversity", digits_run, "--num-images", 50, "--output", tmp_path / "d.png")
    assert out.status == 0, out.err
    rows = list(csv.DictReader((tmp_path / "d.csv").open()))
    assert [row["block"] for row in rows] == ["1", "2"] and set(rows[0]) == {"network", "block", *diversity.MEASURES}
    assert 0 < float(rows[0]["local"]) < 1 and 0 < float(rows[0]["correlation"]) < 1
