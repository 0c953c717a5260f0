"""Small real images and datasets on disk for the tests of this room."""

import io
import json
import os
import tarfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before `datasets` is first imported: the tests use no network

import pytest
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.digits import Digits
from tnt_timm.data.loader import EvaluationLoader, TrainingLoader
from tnt_timm.data.transforms import evaluation_transform, split_training_transform, training_transform

NORMALISATION = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
ALONE = dict(device=torch.device("cpu"), workers=0, rank=0, world_size=1)


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits("train")


@pytest.fixture(scope="session")
def plain_transform():
    """The whole image at 16x16, nothing random."""
    config = dict(input_size=(3, 16, 16), interpolation="bilinear", crop_pct=1.0, crop_mode="center")
    return evaluation_transform(config | NORMALISATION)


@pytest.fixture(scope="session")
def recipe_transform():
    """The recipe's augmentation, at 16x16."""
    return training_transform((3, 16, 16), **NORMALISATION, auto_augment_policy="rand-m9-mstd0.5-inc1")


@pytest.fixture(scope="session")
def device_recipe():
    """The recipe's augmentation, at 16x16, as arguments of a loader that applies a part of it to whole batches."""
    transform, augment = split_training_transform(
        (3, 16, 16), **NORMALISATION, auto_augment_policy="rand-m9-mstd0.5-inc1"
    )
    return dict(transform=transform, augment=augment)


@pytest.fixture
def write_folders(tmp_path, photograph):
    """write_folders(train=dict(cat=2), ...) -> the dataset's folder. Each image is another part of the photograph."""

    def write(root="folders", **splits) -> Path:
        number = 0
        for split, classes in splits.items():
            for name, count in classes.items():
                folder = tmp_path / root / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    number += 1
                    x, y = 8 * number, 4 * number
                    photograph.crop((x, y, x + 48, y + 32)).save(folder / f"{i}.jpg")
        return tmp_path / root

    return write


@pytest.fixture
def write_shards(tmp_path):
    """write_shards(train=[5, 5], ...) -> folder of tar shards with `_info.json`, with so many samples in each.

    The samples of a split are numbered from 0. Image n has a single colour, grey level 4n, and its target is n % 2.
    """
    pytest.importorskip("webdataset")

    def write(**splits) -> Path:
        root = tmp_path / "shards"
        root.mkdir()
        info = {}
        for split, lengths in splits.items():
            names, number = [f"set-{split}-{shard:03d}.tar" for shard in range(len(lengths))], 0
            for name, length in zip(names, lengths):
                with tarfile.open(root / name, "w") as tar:
                    for _ in range(length):
                        png = io.BytesIO()
                        Image.new("RGB", (16, 16), (4 * number,) * 3).save(png, "PNG")
                        for ending, content in (("png", png.getvalue()), ("cls", str(number % 2).encode())):
                            member = tarfile.TarInfo(f"{number:05d}.{ending}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
                        number += 1
            info[split] = dict(name=split, num_samples=number, filenames=names, shard_lengths=lengths)
        (root / "_info.json").write_text(json.dumps({"splits": info}))
        return root

    return write


@pytest.fixture
def open_folder():
    """open_folder(root, split) -> the split of a dataset of class folders."""
    return lambda root, split="train", **more: open_dataset("", str(root), split, split == "train", **more)


@pytest.fixture
def training_loader(digits, recipe_transform):
    """TrainingLoader over the digits, with everything random switched on unless the arguments say otherwise."""

    def make(images=digits, transform=recipe_transform, mixing=True, **arguments) -> TrainingLoader:
        defaults = dict(mixup=None, erasing=None, repeats=1, seed=42, batch_size=8, batches_per_epoch=4)
        if mixing:
            defaults["mixup"] = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
            defaults["erasing"] = RandomErasing(0.5, mode="pixel", device="cpu")
        return TrainingLoader(images, transform, **{**defaults, **NORMALISATION, **ALONE, **arguments})

    return make


@pytest.fixture
def evaluation_loader(plain_transform):
    """EvaluationLoader that only resizes, unless the arguments say otherwise."""

    def make(images, transform=plain_transform, **arguments) -> EvaluationLoader:
        return EvaluationLoader(images, transform, **{**dict(batch_size=4), **NORMALISATION, **ALONE, **arguments})

    return make


@pytest.fixture
def same_bits():
    """same_bits(batches, batches): images and targets are equal, bit for bit, and there is at least one batch."""

    def compare(ours, theirs) -> bool:
        return 0 < len(ours) == len(theirs) and all(
            torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) for a, b in zip(ours, theirs)
        )

    return compare
