"""The paper's transfer sets, read from small data in the layout that torchvision expects of each."""

import hashlib
import http.server
import pickle
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102, OxfordIIITPet

from tnt_timm.data.datasets import check_no_empty_files, open_dataset
from tnt_timm.errors import UserError


def both(name, root, **more):
    return [open_dataset(name, str(root), split, split == "train", **more) for split in ("train", "validation")]


# ---- CIFAR: batches of pickled arrays, whose checksums torchvision knows


@pytest.fixture
def write_cifar(tmp_path, photograph, monkeypatch):
    grey = np.asarray(photograph.resize((320, 320)))

    def image(number):  # (3 * 32 * 32,), channel by channel
        return grey[32 * (number % 10) : 32 * (number % 10) + 32, :32].transpose(2, 0, 1).ravel()

    def dump(folder, name, content):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def write(kind):
        folder = tmp_path / kind.base_folder
        labels = "labels" if kind is CIFAR10 else "fine_labels"
        classes = 10 if kind is CIFAR10 else 100
        for attribute, count in (("train_list", 3), ("test_list", 2)):
            sums = []
            for number, (name, _) in enumerate(getattr(kind, attribute)):
                numbers = [count * number + i for i in range(count)]
                content = {"data": np.stack([image(n) for n in numbers]), labels: [n % classes for n in numbers]}
                sums.append([name, dump(folder, name, content)])
            monkeypatch.setattr(kind, attribute, sums)
        names = [f"class {number}" for number in range(classes)]
        sum_ = dump(folder, kind.meta["filename"], {kind.meta["key"]: names})
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sum_})
        return tmp_path

    write.image = image
    return write


@pytest.mark.parametrize("name, kind, lengths", [("cifar10", CIFAR10, (15, 2)), ("cifar100", CIFAR100, (3, 2))])
def test_cifar(name, kind, lengths, write_cifar):
    root = write_cifar(kind)
    train, test = both(f"torch/{name}", root)
    assert (len(train), len(test)) == lengths
    assert train.classes == test.classes and len(train.classes) == int(name[5:]) and train.classes[3] == "class 3"
    image, target = train.load(2)
    assert target == 2 and np.array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), write_cifar.image(2))
    assert (train.split, train.published, test.split, test.published) == ("train", 50_000, "test", 10_000)


# ---- Oxford-IIIT Pets: images in one folder, a list per split


def test_pets(write_pets, tmp_path):
    train, test = both("torch/oxford_iiit_pet", write_pets(tmp_path / "pets"))
    assert (len(train), len(test)) == (6, 3)
    assert train.classes == test.classes == ["Abyssinian", "American Bulldog", "Bengal"]
    assert [train.load(i)[1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert train.load(0)[0].size == (48, 32)
    assert train.name(2).endswith("oxford-iiit-pet/images/american_bulldog_2.jpg")
    assert (train.split, train.published, test.split, test.published) == ("trainval", 3_680, "test", 3_669)
    assert len(open_dataset("torch/oxford_iiit_pet", str(tmp_path / "pets"), "test", False)) == 3


def test_pets_with_a_misspelt_split_or_an_empty_image(write_pets, tmp_path):
    root = write_pets(tmp_path / "pets")
    with pytest.raises(UserError, match="torch/oxford_iiit_pet: no split 'tarin'; expected one of train, test"):
        open_dataset("torch/oxford_iiit_pet", str(root), "tarin", True)
    (root / "oxford-iiit-pet/images/Bengal_8.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"Bengal_8\.jpg: empty or missing validation image"):
        check_no_empty_files(both("torch/oxford_iiit_pet", root)[1])


def test_pets_are_downloaded_and_unpacked_once(write_pets, tmp_path, monkeypatch):
    """From a local server, in the archives that Oxford offers."""
    source, asked = write_pets(tmp_path / "source") / "oxford-iiit-pet", Counter()
    archives = tmp_path / "archives"
    archives.mkdir()
    for part in ("images", "annotations"):
        with tarfile.open(archives / f"{part}.tar.gz", "w:gz") as tar:
            tar.add(source / part, part)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=archives)

        def do_GET(self):
            asked[self.path] += 1
            super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in archives.iterdir()}
        resources = [(f"{address}/{name}", sums[name]) for name in ("images.tar.gz", "annotations.tar.gz")]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", tuple(resources))
        with pytest.raises(UserError, match="Dataset not found"):
            both("torch/oxford_iiit_pet", tmp_path / "new")
        assert not asked
        train, test = both("torch/oxford_iiit_pet", tmp_path / "new", download=True)
        assert (len(train), len(test)) == (6, 3) and set(asked) == {"/images.tar.gz", "/annotations.tar.gz"}
        once = dict(asked)
        both("torch/oxford_iiit_pet", tmp_path / "new", download=True)
        assert asked == once
        server.shutdown()


# ---- Flowers-102: numbered images, labels and splits in MATLAB files


@pytest.fixture
def flowers(tmp_path, cut, monkeypatch):
    """Images 1 to 9, of the classes 1, 2, 3, 1, 2, 3, ...; two to train on, three to validate on, four to test."""
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 10):
        cut(number).save(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1 + i % 3 for i in range(9)]])})
    savemat(folder / "setid.mat", {"trnid": [[5, 2]], "valid": [[1, 8, 9]], "tstid": [[3, 4, 6, 7]]})
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("imagelabels.mat", "setid.mat")}
    known = {key: (name, sums.get(name)) for key, (name, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", known)
    return tmp_path


def test_flowers_are_trained_on_train_and_val_and_validated_on_test(flowers, cut):
    train, test = both("torch/flowers102", flowers)
    assert (len(train), len(test)) == (5, 4)
    assert len(train.classes) == 102 and train.classes[0] == "pink primrose" and train.classes == test.classes
    assert [train.name(i)[-6:-4] for i in range(5)] == ["05", "02", "01", "08", "09"]
    assert [train.load(i)[1] for i in range(5)] == [1, 1, 0, 1, 2]
    assert [test.load(i)[1] for i in range(4)] == [2, 0, 2, 0]
    assert np.abs(np.asarray(test.load(1)[0]).astype(int) - np.asarray(cut(4)).astype(int)).mean() < 8
    assert (train.split, train.published, test.split, test.published) == ("train+val", 2_040, "test", 6_149)


@pytest.mark.parametrize(("split", "size"), [("only-train", 2), ("only-val", 3)])
def test_parts_of_flowers_for_choosing_settings(split, size, flowers):
    assert len(open_dataset("torch/flowers102", str(flowers), split, True)) == size


# ---- ImageNet, as torchvision unpacks it


@pytest.fixture
def imagenet(tmp_path, cut):
    """Three classes, two of which are called "crane"."""
    words = {"n02012849": ("crane",), "n03126707": ("crane",), "n01440764": ("tench", "Tinca tinca")}
    torch.save((words, ["n01440764"]), tmp_path / "meta.bin")
    for split, count in (("train", 2), ("val", 1)):
        for number, wnid in enumerate(words):
            (tmp_path / split / wnid).mkdir(parents=True)
            for i in range(count):
                cut(10 * number + i).save(tmp_path / split / wnid / f"{i}.JPEG")
    return tmp_path


def test_imagenet_has_the_classes_of_its_folders(imagenet):
    """A checkpoint trained on class folders can be validated on it, and the other way round."""
    train, validation = both("torch/imagenet", imagenet)
    assert (len(train), len(validation)) == (6, 3)
    assert train.classes == ["n01440764", "n02012849", "n03126707"]
    for mine, other in zip((train, validation), both("", imagenet)):
        assert mine.classes == other.classes
        assert [mine.load(i)[1] for i in range(len(mine))] == [other.load(i)[1] for i in range(len(other))]
        assert [mine.name(i) for i in range(len(mine))] == [other.name(i) for i in range(len(other))]
    assert (train.published, validation.published) == (1_281_167, 50_000)


def test_imagenet_names_the_missing_archive(tmp_path):
    with pytest.raises(UserError, match=r"torch/imagenet, split train, in .*ILSVRC2012_devkit_t12\.tar\.gz"):
        open_dataset("torch/imagenet", str(tmp_path), "train", True, download=True)
