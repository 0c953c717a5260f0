import gzip
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tnt_timm.data import torchvision_sets
from tnt_timm.data.datasets import (
    StreamSet,
    check_no_empty_files,
    check_same_classes,
    check_several_classes,
    expect_classes,
    open_dataset,
)
from tnt_timm.data.decoding import DamagedImage
from tnt_timm.errors import UserError

# ---- class folders


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "validation"), ("train", "val"), ("training", "valid"), ("train", "eval"), ("training", "evaluation")],
)
def test_folder_layouts(train, validation, write_folders, open_folder):
    root = write_folders(**{train: dict(cat=3, dog=2), validation: dict(cat=1, dog=1)})
    assert len(open_folder(root, "train")) == 5
    assert len(open_folder(root, "validation")) == len(open_folder(root, "val")) == 2


def test_the_named_split_folder_comes_first(write_folders, open_folder):
    root = write_folders(train=dict(cat=1), validation=dict(cat=2), val=dict(cat=3), extra=dict(cat=4))
    assert [len(open_folder(root, split)) for split in ("validation", "val", "extra")] == [2, 3, 4]


@pytest.mark.parametrize(
    "names",
    [
        ["a", "c9", "c10"],
        ["c001", "c01", "c1", "CAT", "Cat", "cat"],  # equal natural keys, which timm orders by their hashes
        ["0", "9", "10", "100"],  # iNaturalist 2019
    ],
)
def test_targets_are_the_class_folders_in_natural_order(names, write_folders, open_folder):
    data = open_folder(write_folders(train=dict.fromkeys(reversed(names), 1)))
    assert data.classes == names
    shown = [(names[data.load(i)[1]], *data.name(i).split("/")[-2:]) for i in range(len(names))]
    assert sorted(shown) == sorted((name, name, "0.jpg") for name in names)


def test_images_are_decoded_to_rgb(write_folders, open_folder):
    root = write_folders(train=dict(cat=1))
    with Image.open(root / "train/cat/0.jpg") as image:
        expected = np.asarray(image.convert("RGB"))
        for mode in ("L", "P", "RGBA", "LA"):
            image.convert(mode).save(root / f"train/cat/{mode}.png")
        image.convert("CMYK").save(root / "train/cat/CMYK.jpg")
    data = open_folder(root)
    images = {data.name(i).rpartition("/")[2]: data.load(i)[0] for i in range(len(data))}
    assert len(images) == 6
    assert {(image.mode, image.size) for image in images.values()} == {("RGB", (48, 32))}
    assert np.array_equal(np.asarray(images["0.jpg"]), expected)


@pytest.mark.parametrize(
    ("split", "classes", "renamed", "message"),
    [
        ("validation", dict(cat=1), {}, "no validation folder; looked for validation, val, valid, eval, evaluation"),
        ("train", dict(cat=1, dog=1, eel=0), {}, "train: class folder eel holds no images"),
        ("train", dict(cat=1, **{f"empty{i}": 0 for i in range(5)}), {}, "empty0, empty1, empty2 and 2 more"),
        ("train", dict(cat=2), {"cat/0.jpg": "0.jpg", "cat/1.jpg": "1.jpg", "cat": "../cat"}, "one folder per class"),
        ("train", dict(cat=2, dog=1), {"cat/0.jpg": "0.jpg"}, r"train/0\.jpg: not in a class folder"),
        ("train", dict(cat=2, dog=1), {"dog": "cat/dog"}, r"cat/dog/0\.jpg: deeper than a class folder"),
        ("train", dict(cat=0), {"cat": "../cat"}, "train: no images; expected one folder of"),
        ("train", dict(cat=0), {"": "../nowhere"}, "no train folder"),
    ],
)
def test_wrong_layouts(split, classes, renamed, message, write_folders, open_folder):
    root = write_folders(train=classes)
    for old, new in renamed.items():
        (root / "train" / old).rename(root / "train" / new)
    with pytest.raises(UserError, match=message):
        open_folder(root, split)


@pytest.mark.parametrize("name", ["", "torch/mnist", "wds/x", "hfds/x"])
def test_a_missing_class_map(tmp_path, name):
    with pytest.raises(UserError, match=r"class_map: .*classes\.txt: no such file"):
        open_dataset(name, str(tmp_path), "train", True, class_map=str(tmp_path / "classes.txt"))


def test_class_map_gives_the_order(tmp_path, write_folders, open_folder):
    root = write_folders(train=dict(cat=1, dog=2))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    data = open_folder(root, class_map=str(tmp_path / "classes.txt"))
    assert data.classes == ["dog", "cat"]
    assert sorted(data.load(i)[1] for i in range(3)) == [0, 0, 1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_mistyped_name_in_a_class_map(split, tmp_path, write_folders, open_folder):
    root = write_folders(train=dict(cat=1, dog=2), val=dict(cat=1, dog=2))
    (tmp_path / "classes.txt").write_text("dgo\ncat\n")
    with pytest.raises(UserError, match=f"class_map: {root}/{split}: no images of dgo; the nearest .* is dog"):
        open_folder(root, split, class_map=str(tmp_path / "classes.txt"))


@pytest.mark.parametrize("name", ["digits", "torch/mnist"])
def test_datasets_without_a_class_map(name, tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=f"class_map: {name} has its own classes"):
        open_dataset(name, str(tmp_path), "train", True, class_map=str(tmp_path / "classes.txt"))


def test_what_does_not_belong_to_a_dataset(write_folders, open_folder):
    root = write_folders(train={"cat": 2, "dog": 1, ".ipynb_checkpoints": 1})
    (root / "train/cat/._0.jpg").write_bytes(b"no image")
    (root / "train/cat/up").symlink_to("..")
    for data in (open_folder(root), open_dataset("torch/image_folder", str(root), "train", True)):
        assert (len(data), data.classes) == (3, ["cat", "dog"])


def test_a_single_class(write_folders, open_folder):
    root = write_folders(train=dict(images=2), val=dict(cat=1, dog=1))
    with pytest.raises(UserError, match=f"^{root}/train: a single class, images: accuracy would always be 100 %"):
        check_several_classes(open_folder(root), "")
    check_several_classes(open_folder(root, "val"), "")
    check_several_classes(open_dataset("digits", "", "train", True), "")


def test_the_number_of_classes_of_the_model(write_shards):
    data = open_dataset("wds/set", str(write_shards(validation=[2])), "validation", False)
    with pytest.raises(UserError, match="num_classes: 1: accuracy would always be 100 %"):
        expect_classes(data, 1)
    expect_classes(data, 2)
    assert data.labels.num_classes == 2
    expect_classes(open_dataset("digits", "", "train", True), 10)


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("", "", "data_dir: no dataset given; .*--dataset digits"),
        ("", "nowhere", "data_dir: nowhere: no such folder"),
        ("torch/cifar10", "", "data_dir: torch/cifar10 needs the folder"),
        ("torch/cifar10", "/proc", "torch/cifar10, split train, in /proc: Dataset not found"),
        ("torch/cifar11", "/proc", "Unknown torchvision dataset cifar11"),
        ("wds/x", "", "data_dir: wds/x needs the folder"),
        *(
            (name, "/proc", f"dataset: '{name}': expected digits, torch/")
            for name in ("imagenet", "tfds/mnist", "digit")
        ),
    ],
)
def test_names_and_folders_that_are_no_dataset(name, data_dir, message):
    with pytest.raises(UserError, match=message):
        open_dataset(name, data_dir, "train", True)


def test_images_that_are_left_out_are_mentioned(write_folders, open_folder, caplog):
    root = write_folders(train=dict(cat=1))
    with caplog.at_level("INFO", "tnt_timm"):
        open_folder(root)
        assert not caplog.messages
        for name in ("1.webp", "2.webp", "3.bmp", "notes.txt"):
            (root / "train/cat" / name).touch()
        assert len(open_folder(root)) == 1
    (message,) = caplog.messages
    assert message.startswith(f"warning: {root}/train: left out: 2 .webp, 1 .bmp (convert images to")


def test_a_folder_that_cannot_be_listed(write_folders, open_folder, monkeypatch):
    root, scan = write_folders(train=dict(cat=1, dog=1)), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as root, whom no permission stops
    with pytest.raises(UserError, match=r"train/dog: cannot be listed: Permission denied"):
        open_folder(root)


@pytest.mark.parametrize("kind", ["empty", "broken link"])
def test_empty_validation_files_are_found_before_the_run(kind, write_folders, open_folder):
    root = write_folders(train=dict(cat=1), val=dict(cat=3))
    check_no_empty_files(open_folder(root, "val"))
    for name in ("0.jpg", "2.jpg"):
        file = root / "val/cat" / name
        file.unlink()
        file.touch() if kind == "empty" else file.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"val/cat/0\.jpg \(and 1 more\): empty or missing validation image"):
        check_no_empty_files(open_folder(root, "val"))


def test_other_datasets_have_no_empty_files(write_shards):
    check_no_empty_files(open_dataset("digits", "", "val", False))
    check_no_empty_files(open_dataset("wds/set", str(write_shards(validation=[2])), "validation", False))


# ---- classes of the splits


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (["cat", "dog"], ["cat", "dog"], None),
        (None, ["cat"], None),
        (["cat"], None, None),
        (["cat", "dog", "elk"], ["cat", "dgo", "elk"], "only train has dog; only validation has dgo"),
        (list("abcd"), list("ac"), "do not have the same classes: only train has b, d$"),
        ([f"c{i}" for i in range(9)], [], r"only train has c0, c1, c2, c3, c4, \.\.\.$"),
        (["cat", "dog"], ["dog", "cat"], "the order differs"),
        (["caf\u00e9"], ["cafe\u0301"], None),
    ],
)
def test_same_classes(ours, theirs, message):
    if message is None:
        check_same_classes(ours, theirs, "train", "validation")
        return
    with pytest.raises(UserError, match=message):
        check_same_classes(ours, theirs, "train", "validation")


# ---- damaged files


def test_damage_is_raised(write_folders, open_folder):
    root = write_folders(train=dict(cat=4))
    whole = (root / "train/cat/0.jpg").read_bytes()
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)  # claims 3.6 billion pixels
    sized = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x10IDAT"
    damaged = [whole[: len(whole) // 2], b"", b"no image", b"\x89PNG\r\n\x1a\n" + sized]
    for number, content in enumerate(damaged, 1):
        (root / f"train/cat/{number}.jpg").write_bytes(content)
    data = open_folder(root)
    assert data.load(0)[0].size == (48, 32)
    for index in (1, 2, 3, 4):
        with pytest.raises(DamagedImage):
            data.load(index)


# ---- torch/...


@pytest.mark.parametrize("gzipped", [False, True])
def test_fashion_mnist(tmp_path, write_fashion, gzipped, monkeypatch):
    """Unpacked, as torchvision downloads it, and gzipped, as Debian's package has it."""
    write_fashion(tmp_path, 64, 32, gzipped)
    if gzipped:
        monkeypatch.setattr(torchvision_sets, "DEBIAN_FASHION_MNIST", tmp_path)
    train, validation = (open_dataset("torch/fashion_mnist", str(tmp_path), s, False) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (64, 32)
    assert train.classes == validation.classes and train.classes[0] == "T-shirt/top" and len(train.classes) == 10
    image, target = train.load(14)
    assert (image.mode, image.size, target, type(target)) == ("RGB", (28, 28), 4, int)
    pixels = np.random.default_rng(0).integers(0, 100, (64, 28, 28), dtype=np.uint8)[14] + 60
    assert np.array_equal(np.asarray(image)[..., 1], pixels)
    assert validation.name(2) == "image 2 of torch/fashion_mnist test"
    with pytest.raises(UserError, match="no split 'tarin'"):
        open_dataset("torch/fashion_mnist", str(tmp_path), "tarin", True)


def test_fashion_mnist_of_debian_needs_no_folder(tmp_path, write_fashion, monkeypatch):
    monkeypatch.setattr(torchvision_sets, "DEBIAN_FASHION_MNIST", write_fashion(tmp_path / "debian", gzipped=True))
    assert len(open_dataset("torch/fashion_mnist", "", "train", True)) == 64
    with pytest.raises(UserError, match="Dataset not found"):  # its files have the same names
        open_dataset("torch/mnist", str(tmp_path / "debian"), "train", True)
    with pytest.raises(UserError, match="Dataset not found"):
        open_dataset("torch/fashion_mnist", str(tmp_path), "train", True)
    monkeypatch.setattr(torchvision_sets, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^data_dir: torch/fashion_mnist needs .* package dataset-fashion-mnist"):
        open_dataset("torch/fashion_mnist", "", "train", True)


def test_a_damaged_archive_of_debian_is_one_line(tmp_path, write_fashion, monkeypatch):
    monkeypatch.setattr(torchvision_sets, "DEBIAN_FASHION_MNIST", tmp_path)
    file = write_fashion(tmp_path, gzipped=True) / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for damaged in (
        whole[:-100],
        b"no archive",
        whole[:100] + bytes(100) + whole[200:],
        gzip.compress(b"\0\0\x08\x03"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^dataset: torch/fashion_mnist, split train, in {tmp_path}: "):
            open_dataset("torch/fashion_mnist", str(tmp_path), "train", True)


def test_torchvision_folders(write_folders):
    root = write_folders(train=dict(cat=2, dog=1), val=dict(cat=1, dog=1))
    train, validation = (open_dataset("torch/image_folder", str(root), s, False) for s in ("train", "validation"))
    assert (len(train), len(validation)) == (3, 2)
    assert train.classes == validation.classes == ["cat", "dog"]
    assert train.load(2)[1] == 1
    assert train.name(2).endswith("train/dog/0.jpg")
    (root / "val").rename(root / "other")
    with pytest.raises(UserError, match="no validation folder"):
        open_dataset("torch/image_folder", str(root), "validation", False)


def test_torchvision_folders_in_the_order_of_torchvision(write_folders):
    root = write_folders(train={"c9": 12, "c10": 2, "C1": 1, "c9/b": 1, "c9/b-c": 1, "c9/b/d": 1})
    expected = ImageFolder(str(root / "train"))
    data = open_dataset("torch/image_folder", str(root), "train", True)
    assert [(data.name(i), data.load(i)[1]) for i in range(len(data))] == expected.samples
    assert data.classes == expected.classes == ["C1", "c10", "c9"]


# ---- hfds/...


@pytest.fixture
def parquet(tmp_path, photograph):
    """parquet(train=[image, ...], ...) -> open(split, **settings) of a local `datasets` folder; targets 0, 1, 0, 1, ..."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})

    def write(**splits):
        root = tmp_path / "parquet"
        root.mkdir()
        for split, images in splits.items():
            rows = dict(image=images, label=[i % 2 for i in range(len(images))])
            datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{split}-00000.parquet")
        return lambda split, **more: open_dataset(f"hfds/{root}", str(tmp_path / "cache"), split, False, **more)

    return write


@pytest.fixture
def cuts(photograph):
    return [photograph.crop((8 * i, 0, 8 * i + 20, 20)) for i in range(5)]


def test_hugging_face_dataset(parquet, cuts):
    open_split = parquet(train=cuts, validation=cuts[:2])
    train, validation = open_split("train"), open_split("validation")
    assert (len(train), len(validation)) == (5, 2)
    assert train.classes == validation.classes == ["cat", "dog"]
    for index, cut in enumerate(cuts):
        image, target = train.load(index)
        assert np.array_equal(np.asarray(image), np.asarray(cut)) and target == index % 2
    assert train.name(3).startswith("image 3 of hfds/") and train.name(3).endswith("train")
    for split, settings, message in (
        ("train", dict(target_key="lable"), r"target_key: .* no field 'lable'; fields: image, label"),
        ("train", dict(input_key="img"), "'img'"),
        ("test", {}, r'split test.*Unknown split "test"'),
    ):
        with pytest.raises(UserError, match=message):
            open_split(split, **settings)


def test_a_hugging_face_row_without_an_image_is_damage(parquet, cuts):
    data = parquet(train=[cuts[0], None, dict(bytes=b"no image", path="x.jpg")])("train")
    assert data.load(0)[0].size == (20, 20)
    for index in (1, 2):
        with pytest.raises(DamagedImage):
            data.load(index)
    assert data.name(1).startswith("image 1 of hfds/")


def test_text_labels_of_hugging_face(tmp_path, cuts):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "info": {"animal": datasets.Value("string")}})
    for split, animals in (("train", ["dog", "cat"]), ("validation", ["cat", "dog"]), ("test", ["cat", None])):
        rows = dict(image=cuts[:2], info=[dict(animal=animal) for animal in animals])
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"hub/{split}-00000.parquet")

    def open_split(split, key="info/animal"):
        return open_dataset(f"hfds/{tmp_path}/hub", str(tmp_path / "cache"), split, False, target_key=key)

    train, validation = open_split("train"), open_split("validation")
    assert train.classes == validation.classes == ["cat", "dog"]
    assert [train.load(0)[1], validation.load(0)[1]] == [1, 0]
    for split, key, message in (
        ("test", "info/animal", "row 1 of hfds/.*hub test: label None: expected the index of one class"),
        ("train", "info/plant", "target_key: hfds/.*'info/plant'"),
        ("train", "info", r"row 0 of .*: label \{'animal': 'dog'\}: dict"),
        ("train", "info,image", "target_key: info,image: several fields"),
    ):
        with pytest.raises(UserError, match=message):
            open_split(split, key)


def test_missing_hugging_face_data(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"dataset: hfds/.*nowhere, split train"):
        open_dataset(f"hfds/{tmp_path}/nowhere", str(tmp_path / "cache"), "train", False)


# ---- wds/...

SHARDS = "set-{}-{{000..002}}.tar"


@pytest.mark.parametrize("split", ["validation", SHARDS.format("validation") + "|9"])
def test_a_stream_reads_every_sample(split, write_shards):
    data = open_dataset("wds/set", str(write_shards(train=[2], validation=[4, 3, 2])), split, False)
    assert isinstance(data, StreamSet)
    assert (data.num_shards, data.classes, len(data)) == (3, None, 9)
    found = [(image.getpixel((0, 0))[0] // 4, target) for image, target in data.dataset]
    assert found == [(number, number % 2) for number in range(9)]


def test_a_stream_takes_its_length_and_classes_from_the_settings(tmp_path, write_shards):
    root = write_shards(train=[4, 3, 1])
    (tmp_path / "classes.txt").write_text("zero\none\n")
    settings = dict(num_samples=8, class_map=str(tmp_path / "classes.txt"))
    data = open_dataset("wds/set", str(root), SHARDS.format("train"), True, **settings)
    assert (len(data), data.num_shards, data.classes) == (8, 3, ["zero", "one"])


@pytest.mark.parametrize(
    ("folder", "split", "is_training", "message"),
    [
        ("shards", "test", False, r"split test, in .*split test not found"),
        ("nowhere", "train", True, r"wds/set, split train, in .*nowhere"),
        ("shards", SHARDS.format("train"), True, "num_samples not specified"),
        ("shards", SHARDS.format("train"), False, "val_num_samples"),
        ("shards", "train", True, r"set-train-001\.tar: no such shard"),
    ],
)
def test_missing_streams(folder, split, is_training, message, tmp_path, write_shards):
    root = write_shards(train=[2, 2, 2])
    if split == "train":
        (root / "set-train-001.tar").unlink()
    with pytest.raises(UserError, match=message):
        open_dataset("wds/set", str(tmp_path / folder), split, is_training)


@pytest.mark.parametrize(
    ("content", "settings", "expected"),
    [
        (dict(cls=b"1\n"), {}, 1),
        (dict(cls=b"cat"), dict(class_map=True), 0),
        (dict(cls=b"1"), dict(class_map=True), 1),
        (dict(json=b'{"label": 1}'), dict(target_key="label"), 1),
        (dict(json=b'{"label": "dog"}'), dict(target_key="label", class_map=True), 1),
        (dict(cls=b"cat"), {}, "label 'cat': a text, expected a class index; pass --class-map"),
        (dict(cls=b"bird"), dict(class_map=True), "label 'bird': not in the class map; the nearest class is"),
        (dict(cls=b"-1"), {}, "label '-1': expected a class; remove samples without a label"),
        (dict(cls=b"2"), {}, r"label '2': expected 0 to 1 \(2 classes\); if the labels count from 1"),
        (dict(json=b'{"label": -1}'), dict(target_key="label"), "label -1: expected 0 or more"),
        (dict(json=b'{"label": null}'), dict(target_key="label"), "label None: expected the index"),
        (dict(json=b'{"label": 0.5}'), dict(target_key="label"), r"label 0\.5: float"),
        (dict(json=b'{"label": [0, 1]}'), dict(target_key="label"), r"label \[0, 1\]: list"),
        (
            dict(json=b'{"lable": 0}'),
            dict(target_key="label"),
            r"target_key: no field 'label' in s\.json; fields: lable",
        ),
        (dict(txt=b"cat"), {}, "no cls in this sample; check input_key and target_key"),
    ],
)
def test_labels_of_a_stream(content, settings, expected, tmp_path, evaluation_loader, photograph):
    pytest.importorskip("webdataset")
    image = io.BytesIO()
    photograph.crop((0, 0, 32, 32)).save(image, "PNG")
    with tarfile.open(tmp_path / "a-0.tar", "w") as tar:
        for suffix, data in {"png": image.getvalue(), **content}.items():
            member = tarfile.TarInfo(f"s.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    if "class_map" in settings:
        settings = settings | dict(class_map=str(tmp_path / "classes.txt"))
    stream = open_dataset("wds/set", str(tmp_path), "a-0.tar|1", False, **settings)
    expect_classes(stream, 2)
    if isinstance(expected, int):
        (batch,) = evaluation_loader(stream)
        assert batch.targets.tolist() == [expected]
        return
    with pytest.raises(UserError, match=expected) as error:
        list(evaluation_loader(stream))
    assert "s" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shard", ["/etc/hostname", "../set-validation-000.tar"])
def test_info_names_no_shard_outside_of_the_folder(shard, write_shards):
    root = write_shards(validation=[2])
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["validation"]["filenames"] = [shard]
    (root / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="is outside of the folder"):
        open_dataset("wds/set", str(root), "validation", False)
