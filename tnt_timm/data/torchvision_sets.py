"""`torch/...`: open torchvision's datasets by name, with the splits of the paper, and download each only once."""

import contextlib
import fcntl
import functools
import gzip
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision.datasets import FashionMNIST, Flowers102, ImageFolder, ImageNet, OxfordIIITPet
from torchvision.datasets.folder import IMG_EXTENSIONS

from tnt_timm.data.decoding import Decoder, as_damage, decode, quiet, read_image
from tnt_timm.data.folders import SPLIT_FOLDERS, Survey, class_name, split_folder
from tnt_timm.data.labels import Labels
from tnt_timm.data.pixels import to_rgb
from tnt_timm.errors import UserError, one_line

# Published number of images in each split. Fewer mean that a download or its unpacking was interrupted.
_SIZES = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "oxford_iiit_pet": {"trainval": 3_680, "test": 3_669},
    "flowers102": {"train": 1_020, "val": 1_020, "train+val": 2_040, "test": 6_149},
    "imagenet": {"train": 1_281_167, "val": 50_000},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
}
# Where Debian's package dataset-fashion-mnist puts its four files, as the authors publish them. Only there are they taken for
# Fashion-MNIST: the files of MNIST and KMNIST have the same names.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_FILES = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class SurveyedFolder(ImageFolder):
    """torchvision's class folders, except that hidden files, system folders and loops of links are left out."""

    def find_classes(self, directory: str) -> Tuple[List[str], Dict[str, int]]:
        survey = Survey(Path(directory), IMG_EXTENSIONS)
        survey.check_class_folders()
        survey.warn_of_left_out()
        self.survey = survey
        classes = sorted({class_name(folder.parts[0]) for folder in survey.folders if folder.parts})
        return classes, {name: index for index, name in enumerate(classes)}

    def make_dataset(self, directory: str, class_to_idx: Dict[str, int], *_: Any, **__: Any) -> List[Tuple[str, int]]:
        """Return (path, target) of all images in torchvision's order."""
        folders = [
            (class_to_idx[class_name(at.parts[0])], at.path, at.images) for at in self.survey.folders if at.parts
        ]
        return [(os.path.join(path, name), target) for target, path, names in sorted(folders) for name in names]


class SurveyedImageNet(SurveyedFolder, ImageNet):
    """torchvision's ImageNet, read as `SurveyedFolder` reads."""


class Pets(OxfordIIITPet):
    """torchvision's Oxford pets, with a `loader` as other datasets of files have it."""

    loader = staticmethod(read_image)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        return self.loader(self._images[index]), self._labels[index]


# Datasets that timm does not know: torchvision's class, and which of its splits make up each of ours. As in the paper
# (section 4) and its predecessors, all images that are not test images are for training.
_OWN: Dict[str, Tuple[Callable[..., Dataset], Dict[str, List[str]]]] = {
    "oxford_iiit_pet": (Pets, {"train": ["trainval"], "test": ["test"]}),
    "flowers102": (
        Flowers102,
        {"train": ["train", "val"], "test": ["test"], "only-train": ["train"], "only-val": ["val"]},
    ),
}


class TorchvisionImages:
    """One or several splits of a torchvision dataset, concatenated.

    Args:
        parts: the splits.
        name: of the dataset, `torch/...`.
        split: the dataset's own name for them, such as `train+val`.
        decoder: of images that are files.
    """

    def __init__(self, parts: Sequence[Dataset], name: str, split: str, decoder: Decoder = decode):
        for part in parts:
            if hasattr(part, "loader"):  # torchvision's own would clip 16-bit images
                part.loader = functools.partial(read_image, decoder=decoder)
        self.dataset: Dataset = ConcatDataset(parts)
        self.label = f"{name} {split}"
        self.split = split
        self.published: Optional[int] = _SIZES.get(_kind(name), {}).get(split)  # number of images, where known
        # For ImageNet the synsets, as in class folders: its words are not unique (two classes are "crane")
        classes = getattr(parts[0], "wnids", None) or getattr(parts[0], "classes", None) or ()
        names = [label if isinstance(label, str) else ", ".join(label) for label in classes] or None
        self.labels = Labels(self.label, names)
        self.classes = self.labels.classes
        self.files: List[str] = [file for part in parts for file in _files(part)]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def targets(self) -> List[Any]:
        """Targets of all images, empty if torchvision's class does not hold them in memory."""
        found: List[Any] = []
        for part in self.dataset.datasets:
            lists = (getattr(part, name, None) for name in ("targets", "_labels", "labels"))
            found_here = next((one for one in lists if one is not None and len(one)), ())
            found += found_here.tolist() if hasattr(found_here, "tolist") else list(found_here)
        return found

    def load(self, index: int) -> Tuple[Union[Image.Image, Tensor], int]:
        with as_damage(), quiet():
            image, label = self.dataset[index]
            image = image if isinstance(image, Tensor) else to_rgb(image)
        return image, self.labels.index(label, lambda: self.name(index))

    def name(self, index: int) -> str:
        return self.files[index] if self.files else f"image {index} of {self.label}"


def _kind(name: str) -> str:
    return name.partition("/")[2].lower()


def _files(dataset: Dataset) -> List[str]:
    """Return the images' paths. Empty if images are not files of their own."""
    samples = [path for path, _ in getattr(dataset, "samples", ())]
    found = samples or getattr(dataset, "_images", ()) or getattr(dataset, "_image_files", ())
    return [str(path) for path in found]


def open_torchvision(
    name: str, data_dir: str, split: str, download: bool, decoder: Decoder = decode
) -> TorchvisionImages:
    """Open one split of a dataset.

    Args:
        name: `torch/...`.
        data_dir: folder of the dataset, or to download it to.
        split: `train`, `validation`, or the dataset's own name of a split.
        download: download what is missing. Of several processes, one does and the others wait.
        decoder: of images that are files.

    Raises:
        UserError: the dataset or the split does not exist.
    """
    kind = _kind(name)
    if not data_dir and kind == "fashion_mnist" and DEBIAN_FASHION_MNIST.is_dir():
        data_dir = str(DEBIAN_FASHION_MNIST)
    if not data_dir:
        package = " or install Debian's package dataset-fashion-mnist" if kind == "fashion_mnist" else ""
        raise UserError(f"data_dir: {name} needs the folder that holds it (or that it is downloaded to){package}")
    is_train = split in SPLIT_FOLDERS["train"]
    generic = "train" if is_train else "test" if split in (*SPLIT_FOLDERS["validation"], "test") else split
    own, splits = _OWN.get(kind, (None, {}))
    if own and generic not in splits:
        raise UserError(f"dataset: {name}: no split {split!r}; expected one of {', '.join(splits)}")
    if kind in ("image_folder", "folder"):
        data_dir = str(split_folder(Path(data_dir), split))

    def make(**more: Any) -> List[Dataset]:
        if kind in ("image_folder", "folder"):
            return [SurveyedFolder(data_dir)]
        if kind == "imagenet":
            return [SurveyedImageNet(data_dir, "val" if split in SPLIT_FOLDERS["validation"] else split)]
        if own:
            return [own(root=data_dir, split=part, **more) for part in splits[generic]]
        if kind == "fashion_mnist" and Path(data_dir) == DEBIAN_FASHION_MNIST:
            return [_debians_fashion_mnist(is_train)]
        return [create_dataset(name, root=data_dir, split=split, search_split=False, **more)]

    is_unpacked = Path(data_dir, "meta.bin").is_file() and Path(data_dir, "train" if is_train else "val").is_dir()
    complete = not download and (kind != "imagenet" or is_unpacked)
    try:
        parts = make() if complete else _fetch(make, Path(data_dir), download)
    except UserError:
        raise
    except Exception as error:  # each source has its own exceptions for missing data, all with a clear message
        raise UserError(f"dataset: {name}, split {split}, in {data_dir}: {one_line(error)}") from None
    if own:
        found = "+".join(splits[generic])
    elif isinstance(getattr(parts[0], "train", None), bool):
        check_split(name, split)
        found = generic
    else:
        found = getattr(parts[0], "split", split)
    return TorchvisionImages(parts, name, found, decoder)


def _debians_fashion_mnist(is_train: bool) -> FashionMNIST:
    """Open the files of Debian's package. torchvision reads only unpacked ones, so they are unpacked for a moment."""
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, FashionMNIST.__name__, "raw")
        raw.mkdir(parents=True)
        for name in DEBIAN_FILES:
            with gzip.open(DEBIAN_FASHION_MNIST / name) as source, open(raw / name.removesuffix(".gz"), "wb") as target:
                shutil.copyfileobj(source, target)
        return FashionMNIST(root, train=is_train)


def check_split(name: str, split: str) -> None:
    """Raise UserError for an unknown split, because timm takes any split but `train`, even a typo, for the test images."""
    known = (*SPLIT_FOLDERS["train"], *SPLIT_FOLDERS["validation"], "test")
    if split not in known:
        raise UserError(f"dataset: {name}: no split {split!r}; expected one of {', '.join(known)}")


def _fetch(make: Callable[..., List[Dataset]], folder: Path, download: bool) -> List[Dataset]:
    """Download, or for ImageNet unpack, in one process while the others wait."""
    if download:
        with contextlib.suppress(Exception):
            return make()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".download.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        if not download:
            return make()
        with contextlib.suppress(Exception):  # another process may have downloaded it meanwhile
            return make()
        return make(download=True)
