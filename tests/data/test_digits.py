import hashlib
from collections import Counter

import numpy as np
import pytest

from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.digits import Digits
from tnt_timm.errors import UserError


@pytest.fixture(scope="module")
def splits():
    return Digits("train"), Digits("validation")


def test_splits_are_stratified_disjoint_and_complete(splits):
    train, validation = splits
    assert (len(train), len(validation)) == (1437, 360)
    assert train.classes == validation.classes == list("0123456789")
    assert sorted([*train.indices, *validation.indices]) == list(range(1797))
    in_training, in_validation = Counter(train.targets), Counter(validation.targets)
    assert set(in_training) == set(range(10))
    for digit in range(10):
        assert abs(in_validation[digit] - (in_training[digit] + in_validation[digit]) * 360 / 1797) < 1


def test_split_is_fixed(splits):
    """A change of the split changes every result reported on it."""
    found = [hashlib.sha256(s.indices.astype("<i8").tobytes() + bytes(s.targets)).hexdigest()[:16] for s in splits]
    assert found == ["1f98eb0b97f08606", "cb4c363281aeefb9"]


def test_images_are_32x32_rgb_with_bright_ink(splits):
    for split in splits:
        image, target = split.load(0)
        assert (image.size, image.mode, target) == ((32, 32), "RGB", split.targets[0])
        values = np.asarray(image)
        assert np.array_equal(values[..., 0], values[..., 1]) and np.array_equal(values[..., 0], values[..., 2])
        assert values[:, :2].max() < 64 < 192 < values.max()  # dark margin on the left, ink in the middle
    assert splits[1].name(7) == "digits validation image 7"


def test_images_match_their_scans(splits):
    train, _ = splits
    assert (train.scans.max(), train.scans.min()) == (255, 0)
    for index in range(0, 1437, 100):
        means = np.asarray(train.load(index)[0])[..., 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
        assert np.corrcoef(means.ravel(), train.scans[index].ravel())[0, 1] > 0.98


def test_a_range_of_the_classes(splits):
    """The same images in the same splits, with targets from 0."""
    for whole, kind in zip(splits, ("train", "validation")):
        low, high = Digits(kind, "0-4"), Digits(kind, "5-9")
        assert (low.classes, high.classes) == (list("01234"), list("56789"))
        assert set(low.targets) == set(high.targets) == set(range(5))
        assert sorted([*low.indices, *high.indices]) == list(whole.indices)
        digit = dict(zip(whole.indices, whole.targets))
        assert [high.classes[target] for target in high.targets] == [str(digit[index]) for index in high.indices]


@pytest.mark.parametrize("part", ["4-0", "3-3", "0-10", "even", "0-", "0-4/1"])
def test_not_a_range(part):
    with pytest.raises(UserError, match=f"dataset: 'digits/{part}': expected digits, or a range of them"):
        open_dataset(f"digits/{part}", "", "train", True)


def test_digits_by_name():
    assert len(open_dataset("digits", "", "train", True)) == 1437
    assert [len(open_dataset("digits", "", split, False)) for split in ("validation", "val", "test")] == [360] * 3
    with pytest.raises(UserError, match="no split 'tarin'; expected one of train"):
        open_dataset("digits", "", "tarin", True)
