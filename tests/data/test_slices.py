"""Slices of a split, such as train[:1000]."""

import numpy as np
import pytest

from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.identity import differences, identity_of, same_order
from tnt_timm.data.slices import SplitPart, check_disjoint, read_slice
from tnt_timm.errors import UserError


@pytest.fixture(params=["digits", "torch/fashion_mnist"])
def opened(request, write_fashion, tmp_path):
    """opened(split) -> the dataset"""
    name = request.param
    place = "" if name == "digits" else str(write_fashion(tmp_path, 60, 40))
    return lambda split: open_dataset(name, place, split, split.startswith("train"))


def contents(images):
    return [(np.asarray(image).tobytes(), target) for image, target in map(images.load, range(len(images)))]


@pytest.mark.parametrize(
    "text, expected", [("[:40]", slice(40)), ("[-33:]", slice(-33, None)), ("[10:-5]", slice(10, -5))]
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_slices_are_pythons(opened, split, text, expected):
    whole, part = opened(split), opened(split + text)
    assert contents(part) == contents(whole)[expected]
    assert part.classes == whole.classes and part.name(0) == whole.name(range(len(whole))[expected][0])


@pytest.mark.parametrize(
    "split, message",
    [
        ("train[:999999]", r"^split: train\[:999999\]: the split has [\d,]+ images; choose positions inside it"),
        ("train[-999999:]", r"the split has [\d,]+ images"),
        ("train[9:9]", r"the split has [\d,]+ images"),
        ("train[9:3]", r"the split has [\d,]+ images"),
        ("train[:9]", r"holds no image of \d of the 10 classes"),
        ("train[:20%]", r"^split: 'train\[:20%\]': expected whole numbers, as in train\[:1000\]"),
        ("train[20]", "expected whole numbers"),
        ("train[:20", "expected whole numbers"),
        ("train[::2]", "expected whole numbers"),
        ("[:20]", "expected whole numbers"),
        ("train[-:20]", "expected whole numbers"),
        ("tarin[:20]", "no split 'tarin'"),
    ],
)
def test_mistakes(opened, split, message):
    with pytest.raises(UserError, match=message):
        opened(split)


def test_a_dataset_that_is_sorted_by_class(make_folder):
    root = str(make_folder())  # 3 classes of 8
    with pytest.raises(
        UserError, match="holds no image of 1 of the 3 classes, because this dataset is sorted by class"
    ):
        open_dataset("torch/image_folder", root, "train[:16]", True)
    part = open_dataset("torch/image_folder", root, "train[2:20]", True)
    assert len(part) == 18 and part.files[0].endswith("ant/2.png") and len(part.files) == 18


def test_the_identity_tells_which_images_and_which_data(opened):
    first, last = identity_of(opened("train[:40]")), identity_of(opened("train[-40:]"))
    assert differences(first, last) == "another part of the split" and not same_order(first, last)
    short, long = identity_of(opened("train[:40]")), identity_of(opened("train[:50]"))
    assert differences(short, long) == "40 -> 50 images"
    assert differences(short, identity_of(opened("train[:40]"))) == ""
    assert differences({**short, "targets": "0"}, short) == "other targets"


@pytest.mark.parametrize(
    "train, validation, shared",
    [
        ("train[:40]", "train[7:40]", 33),
        ("train", "train[-33:]", 33),
        ("train[-33:]", "train", 33),
        ("train[:40]", "training[:30]", 30),
        ("train[:40]", "train[40:]", 0),
        ("train[:40]", "validation", 0),
        ("train[:40]", "validation[:30]", 0),
        ("train[:40]", "train[:40]", 0),  # on purpose: can the model learn its training images?
    ],
)
def test_training_and_validation_images_must_differ(opened, train, validation, shared):
    if not shared:
        return check_disjoint(opened(train), opened(validation))
    with pytest.raises(UserError, match=rf"^val_split: .*: {shared} of its [\d,]+ images are training images as well"):
        check_disjoint(opened(train), opened(validation))


def test_a_dataset_without_targets_in_memory():
    class Whole:
        classes, targets = None, []

        def __len__(self):
            return 9

    assert len(SplitPart(Whole(), read_slice("train[2:5]")[1])) == 3


def test_a_run_on_a_slice(run_train, run_validate, write_fashion, tiny, tmp_path):
    root = write_fashion(tmp_path)
    splits = ["--train-split", "train[:40]", "--val-split", "train[-24:]"]
    short = "-b 20 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --workers 0 --experiment run".split()
    out = run_train(root, "--dataset", "torch/fashion_mnist", *tiny, *splits, *short, "--output", tmp_path)
    assert out.status == 0, out.err
    assert "40 training and 24 validation images (train[:40] and train[-24:]), 10 classes" in out.out
    assert "(24 images, each counted once)" in run_validate(tmp_path / "run").out
    assert "(32 images, each counted once)" in run_validate(tmp_path / "run", "--val-split", "test").out
    out = run_train(root, "--dataset", "torch/fashion_mnist", *tiny, *short, "--val-split", "train[-24:]")
    assert out.status == 1 and out.err.startswith(
        "error: val_split: train[-24:]: 24 of its 24 images are training images"
    )
    out = run_train(root, "--dataset", "torch/fashion_mnist", *tiny, *short, "--train-split", "train[:7")
    assert out.status == 1 and out.err.startswith("error: split: 'train[:7': expected whole numbers")
