"""Numbers of diversity and local structure, against features whose numbers are known."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from tnt_timm.errors import UserError
from tnt_timm.figures import diversity
from tnt_timm.figures.network import Network


@pytest.fixture
def features():
    """features(D) -> independent channels (4000, D)"""
    return lambda channels: np.random.default_rng(0).normal(size=(4000, channels))


def moments(features, pixels=None):
    pixels = np.zeros((len(features), 1)) if pixels is None else pixels
    rows = np.concatenate([np.ones((len(features), 1)), features, pixels], axis=1)
    return rows.T @ rows


def covariance(features):
    return diversity.central(moments(features))[:-1, :-1]


def test_moments_around_a_mean(features):
    values = features(5) * [1, 2, 3, 4, 5] + 7
    assert np.allclose(covariance(values), np.cov(values, rowvar=False, bias=True))
    mean = np.array([1.0, 2, 3, 4, 5, 0])
    centred = values - mean[:5]
    assert np.allclose(diversity.central(moments(values), mean)[:5, :5], centred.T @ centred / len(values))


def test_correlation(features):
    independent = features(8)
    assert diversity.correlation(covariance(independent)) < 0.03
    assert diversity.correlation(covariance(np.outer(independent[:, 0], [1, -2, 3]))) == pytest.approx(1)
    pairs = np.concatenate([independent, -independent], axis=1) + 100
    matrix = np.abs(np.corrcoef(pairs, rowvar=False))
    assert diversity.correlation(covariance(pairs)) == pytest.approx(matrix[np.triu_indices(16, 1)].mean())
    assert matrix[np.triu_indices(16, 1)].mean() == pytest.approx(8 / 120, abs=0.02)  # of 120 pairs, 8 are perfect


def test_components(features):
    assert diversity.components(covariance(features(10)), 10) == 90
    assert diversity.components(covariance(features(2) @ np.ones((2, 10)) + 5), 10) == 10
    assert diversity.components(covariance(features(10) * np.array([10, 10, *[0.1] * 8])), 10) == 20


def test_patches_are_in_the_order_of_the_grid():
    image = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6) ** 2
    found = diversity.patches(image, (2, 2)).reshape(2, 2, 2, 2, 3)
    grey = image.mean(dim=1).numpy()
    patch = grey[1, 2:4, 0:3]
    assert np.allclose(found[1, 1, 0], patch - patch.mean(), atol=1e-2)


def test_explained_is_measured_on_other_images(features):
    pixels, hidden = np.split(features(12), [4], axis=1)

    def explained(x):
        return diversity.explained(moments(x[:2000], pixels[:2000]), moments(x[2000:], pixels[2000:]), x.shape[1])

    assert explained(np.concatenate([pixels @ np.diag([1, 2, 3, 4]) + 9, hidden], axis=1)) > 0.999
    assert abs(explained(hidden)) < 0.01
    half = np.concatenate([pixels[:, :2], hidden], axis=1)
    assert explained(half) == pytest.approx(0.5, abs=0.03)
    model = Ridge(alpha=1e-4 * 2000).fit(half[:2000], pixels[:2000])
    scikit_learns = r2_score(pixels[2000:], model.predict(half[2000:]), multioutput="variance_weighted")
    assert explained(half) == pytest.approx(scikit_learns, abs=5e-3)  # it takes the mean of the tested half
    with_constant = np.concatenate([half, np.full((4000, 1), 3.0)], axis=1)
    assert explained(with_constant) == pytest.approx(explained(half))


def test_the_numbers_are_of_each_block(named, tnt):
    images = torch.randn(71, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    found = diversity.measure(tnt, images)
    assert [each.block for each in found] == [1, 2, 3]
    maps = np.concatenate([tnt.feature_maps(image[None], [2])[0] for image in images])  # (71, 24, 3, 2)
    rows = np.stack([maps[b, :, y, x] for b in range(71) for y in range(3) for x in range(2)]).astype(np.float64)
    assert found[1].correlation == pytest.approx(diversity.correlation(covariance(rows)), abs=1e-5)
    pixels = diversity.patches(images, (3, 2))
    halves = [moments(rows[part], pixels[part]) for part in (slice(35 * 6), slice(35 * 6, None))]
    assert found[1].local == pytest.approx(diversity.explained(*halves, 24), abs=1e-3)


def test_cells_that_are_no_equal_parts_of_the_image_are_refused():
    """At 40 pixels, the second stage's 3 x 3 cells have 16 pixels, and those at the border fewer."""
    model = timm.create_model("pyramid_tnt_ti", img_size=40, embed_dim=8, inner_dim=3, depths=(1, 1, 1, 1))
    network = Network("mine", SimpleNamespace(model=model, name="pyramid_tnt_ti", trained=True))
    with pytest.raises(
        UserError, match="mine: stage 2 has a map of 3 x 3, whose cells are no equal parts of 40 x 40 pixels"
    ):
        diversity.measure(network, torch.randn(4, 3, 40, 40))


def test_features_without_variance_are_no_numbers(tnt):
    for parameter in tnt.model.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(UserError, match="t: block 1: features are constant or not finite; check the weights"):
        diversity.measure(tnt, torch.randn(8, 3, 48, 32))


def test_the_figure_writes_them(run_figures, digits_run, tmp_path):
    out = run_figures("diversity", digits_run, "--num-images", 50, "--output", tmp_path / "d.png")
    assert out.status == 0, out.err
    rows = list(csv.DictReader((tmp_path / "d.csv").open()))
    assert [row["block"] for row in rows] == ["1", "2"] and set(rows[0]) == {"network", "block", *diversity.MEASURES}
    assert 0 < float(rows[0]["local"]) < 1 and 0 < float(rows[0]["correlation"]) < 1
