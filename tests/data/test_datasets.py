import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tnt_timm.data.datasets import DAMAGE, StreamSet, check_no_empty_files, check_same_classes, open_dataset
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


def test_targets_are_the_class_folders_in_natural_order(write_folders, open_folder):
    data = open_folder(write_folders(train={"c10": 1, "c9": 2, "a": 1}))
    assert data.classes == ["a", "c9", "c10"]
    assert [data.load(i)[1] for i in range(4)] == [0, 1, 1, 2]
    assert data.name(3).endswith("train/c10/0.jpg")


def test_images_are_decoded_to_rgb(write_folders, open_folder, pixels):
    root = write_folders(train=dict(cat=1))
    with Image.open(root / "train/cat/0.jpg") as image:
        expected = pixels(image.convert("RGB"))
        for mode in ("L", "P", "RGBA", "LA"):
            image.convert(mode).save(root / f"train/cat/{mode}.png")
        image.convert("CMYK").save(root / "train/cat/CMYK.jpg")
    data = open_folder(root)
    images = {data.name(i).rpartition("/")[2]: data.load(i)[0] for i in range(len(data))}
    assert len(images) == 6
    assert {(image.mode, image.size) for image in images.values()} == {("RGB", (48, 32))}
    assert np.array_equal(pixels(images["0.jpg"]), expected)


def test_missing_folder(tmp_path, open_folder):
    with pytest.raises(UserError, match=r"data_dir: .*nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")


def test_no_data_at_all():
    with pytest.raises(UserError, match="--dataset digits"):
        open_dataset("", "", "train", True)


def test_no_validation_folder(write_folders, open_folder):
    root = write_folders(train=dict(cat=1))
    with pytest.raises(UserError, match="no validation folder; looked for validation, val, valid, eval, evaluation"):
        open_folder(root, "validation")


def test_empty_class_folder_is_named(write_folders, open_folder):
    root = write_folders(train=dict(cat=1, dog=1, eel=0))
    (root / "train/eel/notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"train: class folder eel holds no images"):
        open_folder(root)


def test_many_empty_class_folders_are_counted(write_folders, open_folder):
    root = write_folders(train=dict(cat=1, **{f"empty{i}": 0 for i in range(5)}))
    with pytest.raises(UserError, match="empty0, empty1, empty2 and 2 more"):
        open_folder(root)


def test_split_folder_without_images(tmp_path, open_folder):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="Found 0 images"):
        open_folder(tmp_path)


def test_images_side_by_side(write_folders, open_folder):
    root = write_folders(train=dict(cat=2))
    (root / "train/cat").rename(root / "flat")
    (root / "train").rmdir()
    (root / "flat").rename(root / "train")
    with pytest.raises(UserError, match="one folder per class"):
        open_folder(root)


def test_stray_image_makes_no_class(write_folders, open_folder):
    root = write_folders(train=dict(cat=1, dog=1))
    (root / "train/0.jpg").write_bytes((root / "train/cat/0.jpg").read_bytes())
    with pytest.raises(UserError, match=r"train/0\.jpg: an image beside the class folders"):
        open_folder(root)


def test_targets_of_classes_that_timm_orders_by_chance(write_folders, open_folder):
    """Their natural keys are equal; each process would order them by its own hashes of strings."""
    names = ["c1", "c01", "Cat", "cat", "c001", "CAT"]
    data = open_folder(write_folders(train=dict.fromkeys(names, 1)))
    assert data.classes == ["c001", "c01", "c1", "CAT", "Cat", "cat"]
    assert [data.classes[data.load(i)[1]] for i in range(6)] == [data.name(i).split("/")[-2] for i in range(6)]


def test_images_that_are_not_read_are_mentioned(write_folders, open_folder, caplog):
    root = write_folders(train=dict(cat=1))
    with caplog.at_level("INFO", "tnt_timm"):
        open_folder(root)
        assert not caplog.messages
        for name in ("1.webp", "2.webp", "3.bmp", "notes.txt"):
            (root / "train/cat" / name).touch()
        assert len(open_folder(root)) == 1
    (message,) = caplog.messages
    assert message.startswith(f"warning: {root}/train: not read, for their suffix: 2 .webp, 1 .bmp")


def test_folder_that_cannot_be_listed(write_folders, open_folder, monkeypatch):
    root, scan = write_folders(train=dict(cat=1, dog=1)), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the tests may run as one whom no permission stops
    with pytest.raises(UserError, match=r"train/dog: cannot be listed: Permission denied"):
        open_folder(root)


@pytest.mark.parametrize("kind", ["empty", "broken link"])
def test_validation_files_without_a_byte_are_found_before_the_run(kind, write_folders, open_folder):
    root = write_folders(train=dict(cat=1), val=dict(cat=3))
    check_no_empty_files(open_folder(root, "val"))
    for name in ("0.jpg", "2.jpg"):
        file = root / "val/cat" / name
        file.unlink()
        file.touch() if kind == "empty" else file.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"val/cat/0\.jpg \(and 1 more\): a validation image without a byte"):
        check_no_empty_files(open_folder(root, "val"))


def test_other_data_sets_have_no_empty_files(write_shards):
    check_no_empty_files(open_dataset("digits", "", "val", False))
    check_no_empty_files(open_dataset("wds/set", str(write_shards(validation=[2])), "validation", False))


def test_class_map_gives_the_order(tmp_path, write_folders, open_folder):
    root = write_folders(train=dict(cat=1, dog=2))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    data = open_folder(root, class_map=str(tmp_path / "classes.txt"))
    assert data.classes == ["dog", "cat"]
    assert sorted(data.load(i)[1] for i in range(3)) == [0, 0, 1]


@pytest.mark.parametrize("name", ["", "torch/mnist", "wds/x", "hfds/x"])
def test_class_map_missing(tmp_path, name):
    with pytest.raises(UserError, match=r"class_map: .*classes\.txt: no such file"):
        open_dataset(name, str(tmp_path), "train", True, class_map=str(tmp_path / "classes.txt"))


@pytest.mark.parametrize("name", ["imagenet", "tfds/mnist", "cifar10", "digit"])
def test_unknown_data_set(name, tmp_path):
    with pytest.raises(UserError, match=f"dataset: '{name}': expected digits, torch/"):
        open_dataset(name, str(tmp_path), "train", True)


# ---- classes of the splits


def test_same_classes_pass():
    check_same_classes(["cat", "dog"], ["cat", "dog"], "train", "validation")
    check_same_classes(None, ["cat"], "train", "validation")
    check_same_classes(["cat"], None, "train", "validation")


def test_classes_that_differ_are_named(write_folders, open_folder):
    root = write_folders(train=dict(cat=1, dog=1, elk=1), validation=dict(cat=1, dgo=1, elk=1))
    ours, theirs = open_folder(root).classes, open_folder(root, "validation").classes
    with pytest.raises(UserError, match="only train has dog; only validation has dgo"):
        check_same_classes(ours, theirs, "train", "validation")


def test_missing_class_is_named():
    with pytest.raises(UserError, match=r"do not have the same classes: only train has b, d$"):
        check_same_classes(list("abcd"), list("ac"), "train", "validation")


def test_many_different_classes_are_cut_short():
    with pytest.raises(UserError, match=r"only train has c0, c1, c2, c3, c4, \.\.\.$"):
        check_same_classes([f"c{i}" for i in range(9)], [], "train", "validation")


def test_other_order_is_refused():
    with pytest.raises(UserError, match="the order differs"):
        check_same_classes(["cat", "dog"], ["dog", "cat"], "train", "validation")


# ---- damaged files


def test_damage_is_raised_not_passed_over(write_folders, open_folder):
    root = write_folders(train=dict(cat=4))
    whole = (root / "train/cat/0.jpg").read_bytes()
    (root / "train/cat/1.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train/cat/2.jpg").write_bytes(b"")
    (root / "train/cat/3.jpg").write_text("no image")
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)  # claims 3.6 billion pixels
    sized = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x10IDAT"
    (root / "train/cat/4.jpg").write_bytes(b"\x89PNG\r\n\x1a\n" + sized)
    data = open_folder(root)
    assert data.load(0)[0].size == (48, 32)
    for index in (1, 2, 3, 4):
        with pytest.raises(DAMAGE):
            data.load(index)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_whatever_pillow_raises_is_damage(kind, tmp_path, write_folders, open_folder):
    """Any other exception over a damaged file would end a run with a traceback."""
    root = write_folders(train=dict(cat=1))
    file = root / "train/cat/0.jpg"
    with Image.open(file) as image:
        image.save(file, kind)
    data, whole, random = open_folder(root), file.read_bytes(), np.random.default_rng(0)
    raised = 0
    for attempt in range(400):
        broken = bytearray(whole)
        if attempt % 2:
            del broken[random.integers(len(whole)) :]
        else:
            for place in random.integers(0, len(whole), 20):
                broken[place] = random.integers(256)
        file.write_bytes(broken)
        try:
            assert data.load(0)[0].mode == "RGB"
        except DAMAGE:
            raised += 1
    assert raised > 200


# ---- digits


def test_digits_by_name():
    assert len(open_dataset("digits", "", "train", True)) == 1437
    assert [len(open_dataset("digits", "", split, False)) for split in ("validation", "val", "test")] == [360] * 3


def test_slip_of_the_pen_in_a_split_is_no_validation_set():
    with pytest.raises(UserError, match="no split 'tarin'; expected one of train"):
        open_dataset("digits", "", "tarin", True)


# ---- torch/...


@pytest.fixture
def fashion_mnist(tmp_path, photograph):
    """Fashion-MNIST's own files, with six training and three test images; torchvision checks no sums of these."""
    grey = np.asarray(photograph.convert("L"))
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 6), ("t10k", 3)):
        images = np.stack([grey[28 * i : 28 * i + 28, :28] for i in range(count)])
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(range(count)))
    return tmp_path


def test_torchvision_data_set(fashion_mnist, photograph, pixels):
    train = open_dataset("torch/fashion_mnist", str(fashion_mnist), "train", True)
    validation = open_dataset("torch/fashion_mnist", str(fashion_mnist), "validation", False)
    assert (len(train), len(validation)) == (6, 3)
    assert train.classes == validation.classes and train.classes[0] == "T-shirt/top" and len(train.classes) == 10
    image, target = train.load(4)
    assert (image.mode, image.size, target, type(target)) == ("RGB", (28, 28), 4, int)
    assert np.array_equal(pixels(image)[..., 1], pixels(photograph.convert("L"))[112:140, :28])
    assert validation.name(2) == "image 2 of torch/fashion_mnist test"


def test_torchvision_split_is_not_guessed(fashion_mnist):
    with pytest.raises(UserError, match="no split 'tarin'"):
        open_dataset("torch/fashion_mnist", str(fashion_mnist), "tarin", True)


def test_torchvision_data_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"torch/cifar10, split train, in .*: Dataset not found"):
        open_dataset("torch/cifar10", str(tmp_path), "train", True)


def test_torchvision_data_set_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="Unknown torchvision dataset cifar11"):
        open_dataset("torch/cifar11", str(tmp_path), "train", True)


@pytest.mark.parametrize("name", ["torch/cifar10", "wds/x"])
def test_data_sets_that_need_a_folder_say_so(name):
    with pytest.raises(UserError, match=f"data_dir: {name} needs the folder"):
        open_dataset(name, "", "train", True)


def test_torchvision_folders(write_folders):
    root = write_folders(train=dict(cat=2, dog=1), val=dict(cat=1, dog=1))
    train, validation = (
        open_dataset("torch/image_folder", str(root), split, False) for split in ("train", "validation")
    )
    assert (len(train), len(validation)) == (3, 2)
    assert train.classes == validation.classes == ["cat", "dog"]
    assert train.load(2)[1] == 1
    assert train.name(2).endswith("train/dog/0.jpg")


def test_torchvision_folders_without_the_split(write_folders):
    root = write_folders(train=dict(cat=2, dog=1))
    with pytest.raises(UserError, match="no validation folder"):
        open_dataset("torch/image_folder", str(root), "validation", False)


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


def test_hugging_face_data_set(parquet, cuts, pixels):
    open_split = parquet(train=cuts, validation=cuts[:2])
    train, validation = open_split("train"), open_split("validation")
    assert (len(train), len(validation)) == (5, 2)
    assert train.classes == validation.classes == ["cat", "dog"]
    for index, cut in enumerate(cuts):
        image, target = train.load(index)
        assert np.array_equal(pixels(image), pixels(cut)) and target == index % 2
    assert train.name(3).startswith("image 3 of hfds/") and train.name(3).endswith("train")


def test_hugging_face_fields_and_splits_that_are_not_there(parquet, cuts):
    open_split = parquet(train=cuts)
    with pytest.raises(UserError, match=r"target_key: .* no field 'lable'; fields: image, label"):
        open_split("train", target_key="lable")
    with pytest.raises(UserError, match="'img'"):
        open_split("train", input_key="img")
    with pytest.raises(UserError, match=r'split test.*Unknown split "test"'):
        open_split("test")


def test_hugging_face_row_without_an_image_is_damage(parquet, cuts):
    data = parquet(train=[cuts[0], None, dict(bytes=b"no image", path="x.jpg")])("train")
    assert data.load(0)[0].size == (20, 20)
    for index in (1, 2):
        with pytest.raises(DAMAGE):
            data.load(index)
    assert data.name(1).startswith("image 1 of hfds/")


def test_hugging_face_data_that_is_not_there(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"dataset: hfds/.*nowhere, split train"):
        open_dataset(f"hfds/{tmp_path}/nowhere", str(tmp_path / "cache"), "train", False)


# ---- wds/...


@pytest.mark.parametrize("split", ["validation", "set-validation-{000..002}.tar|9"])
def test_stream_reads_every_sample(split, write_shards):
    root = write_shards(train=[2], validation=[4, 3, 2])
    data = open_dataset("wds/set", str(root), split, False)
    assert isinstance(data, StreamSet)
    assert (data.num_shards, data.classes) == (3, None)
    assert len(data) == 9
    found = [(image.getpixel((0, 0))[0] // 4, target) for image, target in data.dataset]
    assert found == [(number, number % 2) for number in range(9)]


def test_stream_to_validate_on_must_say_its_length(write_shards):
    root = write_shards(train=[2], validation=[4, 3, 2])
    with pytest.raises(UserError, match="val_num_samples"):
        open_dataset("wds/set", str(root), "set-validation-{000..002}.tar", False)


def test_stream_takes_its_length_and_classes_from_the_settings(tmp_path, write_shards):
    root = write_shards(train=[4, 3])
    (tmp_path / "classes.txt").write_text("zero\none\n")
    data = open_dataset("wds/set", str(root), "set-train-{000..001}.tar", True, num_samples=7)
    assert (len(data), data.num_shards) == (7, 2)
    settings = dict(num_samples=7, class_map=str(tmp_path / "classes.txt"))
    assert open_dataset("wds/set", str(root), "set-train-{000..001}.tar", True, **settings).classes == ["zero", "one"]


def test_stream_that_is_not_there(write_shards, tmp_path):
    root = write_shards(train=[2, 2])
    with pytest.raises(UserError, match=r"split test, in .*split test not found"):
        open_dataset("wds/set", str(root), "test", False)
    with pytest.raises(UserError, match=r"wds/set, split train, in .*nowhere"):
        open_dataset("wds/set", str(tmp_path / "nowhere"), "train", True)
    with pytest.raises(UserError, match="num_samples not specified"):
        open_dataset("wds/set", str(root), "set-train-{000..001}.tar", True)


def test_missing_shard_is_named(write_shards):
    root = write_shards(train=[2, 2, 2])
    (root / "set-train-001.tar").unlink()
    with pytest.raises(UserError, match=r"set-train-001\.tar: no such shard"):
        open_dataset("wds/set", str(root), "train", True)
