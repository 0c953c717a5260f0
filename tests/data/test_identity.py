"""What identifies a dataset: moved it stays the same, and every other change is found and named."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from tnt_timm.data import torchvision_sets
from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.digits import Digits
from tnt_timm.data.identity import LENGTHS, differences, identity_of


def test_a_moved_dataset_is_the_same(write_folders, open_folder, tmp_path, monkeypatch):
    root = write_folders(train=dict(cat=3, dog=2))
    before = identity_of(open_folder(root))
    assert before == json.loads(json.dumps(before)) and before["images"] == 5
    moved = shutil.copytree(root, tmp_path / "other" / "place")
    monkeypatch.chdir(tmp_path / "other")
    for path in (moved, "place", "place/", "./place"):
        assert identity_of(open_folder(path)) == before


def reencode(path) -> None:
    """The same length, other bytes."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda train: shutil.copy(train / "cat/0.jpg", train / "cat/9.jpg"), "5 -> 6 images"),
        (lambda train: (train / "cat/0.jpg").rename(train / "cat/9.jpg"), "other file names"),
        (lambda train: (train / "cat/0.jpg").rename(train / "dog/9.jpg"), "other targets, other file names"),
        (lambda train: (train / "cat").rename(train / "cow"), "other class names, other file names"),
        (lambda train: (train / "cat/0.jpg").write_bytes(b"short"), "other file lengths, other file contents"),
        (lambda train: reencode(train / "cat/0.jpg"), "other file contents"),
        (lambda train: (train / "dog").rename(train / "eel"), "other class names, other file names"),
    ],
)
def test_what_changed_is_named(write_folders, open_folder, change, words):
    root = write_folders(train=dict(cat=3, dog=2))
    before = identity_of(open_folder(root))
    change(root / "train")
    found = differences(before, identity_of(open_folder(root)))
    assert sorted(found.split(", ")) == sorted(words.split(", "))
    assert differences(before, before) == ""


def test_a_class_map_is_part_of_it(write_folders, open_folder, tmp_path):
    root = write_folders(train=dict(cat=3, dog=2))
    (tmp_path / "map.txt").write_text("dog\ncat\n")
    found = differences(
        identity_of(open_folder(root)), identity_of(open_folder(root, class_map=str(tmp_path / "map.txt")))
    )
    assert "other class names" in found and "other targets" in found


def test_only_a_few_files_are_touched(write_folders, open_folder, monkeypatch):
    """A data set of a million images on a network drive."""
    images = open_folder(write_folders(train=dict(cat=2)))
    images.reader.samples = [(f"/data/train/n{i // 1000}/{i}.JPEG", i // 1000) for i in range(100_000)]
    touched = []
    monkeypatch.setattr(os, "stat", lambda path: touched.append(path) or os.stat_result(range(10)))
    identity_of(images)
    assert len(touched) == LENGTHS and {"0.JPEG", "99999.JPEG"} <= {path.split("/")[-1] for path in touched}


def test_names_that_are_no_text(write_folders, open_folder):
    root = write_folders(train=dict(cat=2))
    before = identity_of(open_folder(root))
    os.rename(root / "train/cat/0.jpg", os.fsencode(root / "train/cat/0") + b"\xff.jpg")
    assert differences(before, identity_of(open_folder(root))) == "other file names"


def test_digits():
    names = ("", "0-4", "5-9")
    found = {name: identity_of(Digits("train", name)) for name in names}
    assert found[""] == identity_of(Digits("train")) and len({str(one) for one in found.values()}) == 3
    assert differences(found[""], identity_of(Digits("validation"))) == "1,437 -> 360 images"


def cifar(pixels, targets) -> torchvision_sets.TorchvisionImages:
    part = CIFAR10.__new__(CIFAR10)
    part.data, part.targets, part.classes, part.root = pixels, targets, ["a", "b"], ""
    part.transform = part.target_transform = None
    return torchvision_sets.TorchvisionImages([part], "torch/cifar10", "train")


def test_arrays_of_torchvision():
    pixels, targets = np.zeros((40, 32, 32, 3), np.uint8), [0, 1] * 20
    before = identity_of(cifar(pixels, targets))
    assert differences(before, identity_of(cifar(pixels.copy(), list(targets)))) == ""
    assert differences(before, identity_of(cifar(pixels, targets[::-1]))) == "other targets"
    assert differences(before, identity_of(cifar(pixels + 1, targets))) == "other file contents"
    assert differences(before, identity_of(cifar(pixels[:30], targets[:30]))) == "40 -> 30 images"


def test_files_of_torchvision(write_pets, tmp_path):
    first, second = (
        open_dataset("torch/oxford_iiit_pet", str(write_pets(tmp_path / name)), "train", True) for name in "ab"
    )
    assert identity_of(first) == identity_of(second) and "names" in identity_of(first)
    reencode(tmp_path / "b/oxford-iiit-pet/images/Abyssinian_0.jpg")
    assert differences(identity_of(first), identity_of(second)) == "other file contents"


def test_shards(write_shards):
    root = write_shards(train=[5, 5], val=[4])

    def train():
        return identity_of(open_dataset("wds/set", str(root), "train", True))

    before = train()
    assert before == train() and before["images"] == 10
    shard = root / "set-train-001.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert differences(before, train()) == "other file lengths, other file contents"


def test_rows_of_hugging_face(tmp_path):
    hf = pytest.importorskip("datasets")

    def rows(name, labels):
        features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["a", "b"])})
        images = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(len(labels))]
        folder = tmp_path / name
        folder.mkdir()
        hf.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            str(folder / "train-00000-of-00001.parquet")
        )
        return identity_of(open_dataset(f"hfds/{folder}", str(tmp_path / "cache"), "train", True))

    before = rows("one", [0, 1, 0])
    assert before == rows("moved", [0, 1, 0])
    assert differences(before, rows("labels", [0, 1, 1])) == "other targets"
    assert differences(before, rows("more", [0, 1, 0, 1])) == "3 -> 4 images"
