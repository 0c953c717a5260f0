import random

import numpy as np
import pytest
import torch

from tnt_timm.data.seeding import seed_everything


def draws(*key):
    seed_everything(*key)
    return [random.random() for _ in range(3)], np.random.rand(3).tolist(), torch.rand(3).tolist()


def test_a_key_gives_the_same_draws_and_each_generator_its_own():
    first = draws(42, 3, 1000)
    draws(7)
    assert draws(42, 3, 1000) == first
    assert len({value for source in first for value in source}) == 9


KEYS = [(0,), (1,), (0, 0), (0, 0, 0), (1, 2), (1, 2, 0), (2, 1), (42, 0, 1), (42, 1, 0), (42, 0, 1, 0, 1), (2**32,)]


@pytest.mark.parametrize("source", [0, 1, 2], ids=["random", "numpy", "torch"])
def test_different_keys_give_different_draws(source):
    assert len({tuple(draws(*key)[source]) for key in KEYS}) == len(KEYS)


def test_neighbouring_keys_are_unrelated():
    """Positions follow each other in a run. Their first draws must look independent."""
    first = np.array([[source[0] for source in draws(42, 0, position)] for position in range(2000)])
    assert np.abs(first.mean(axis=0) - 0.5).max() < 0.03
    for source in first.T:
        assert abs(np.corrcoef(source[:-1], source[1:])[0, 1]) < 0.08
    assert np.abs(np.corrcoef(first.T) - np.eye(3)).max() < 0.08
