"""`torch/...`: torchvision's data sets by name: which of their splits is meant, what their classes are called, and a download
that happens once."""

import contextlib
import fcntl
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import ConcatDataset, Dataset
from torchvision.datasets import Flowers102, OxfordIIITPet

from tnt_timm.data.folders import SPLIT_FOLDERS, split_folder
from tnt_timm.data.transforms import to_rgb
from tnt_timm.errors import UserError, one_line


class _Splits(NamedTuple):
    """A data set that timm does not know: its class, and which of its splits make up one of ours."""

    make: Callable[..., Dataset]
    parts: Mapping[str, Sequence[str]]


# As the paper (section 4) and its predecessors divide them: training images are all that are not test images.
_OWN = {
    "oxford_iiit_pet": _Splits(OxfordIIITPet, {"train": ["trainval"], "test": ["test"]}),
    "flowers102": _Splits(
        Flowers102,
        {"train": ["train", "val"], "test": ["test"], "only-train": ["train"], "only-val": ["val"]},
    ),
}
# Images in each split, as published: fewer are the remains of a download or of unpacking that was cut off.
_SIZES = {
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "oxford_iiit_pet": {"trainval": 3_680, "test": 3_669},
    "flowers102": {"train": 1_020, "val": 1_020, "train+val": 2_040, "test": 6_149},
    "imagenet": {"train": 1_281_167, "val": 50_000},
}


class TorchvisionImages:
    """One or several splits of a data set of torchvision's, one after the other.

    Args:
        parts: the splits.
        name: of the data set, `torch/...`.
        split: what the data set itself calls them, as `train+val`.
    """

    def __init__(self, parts: Sequence[Dataset], name: str, split: str):
        self.dataset: Dataset = ConcatDataset(parts)
        self.label = f"{name} {split}"
        self.split = split
        self.published: Optional[int] = _SIZES.get(_kind(name), {}).get(split)  # how many images it should have
        self.classes = _class_names(parts[0])
        self.files: List[str] = [file for part in parts for file in _files(part)]

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return to_rgb(image), int(target)

    def name(self, index: int) -> str:
        return self.files[index] if self.files else f"image {index} of {self.label}"


def _kind(name: str) -> str:
    return name.partition("/")[2].lower()


def _class_names(dataset: Dataset) -> Optional[List[str]]:
    """ImageNet's are its synsets, as in class folders: its words are not unique (two classes are "crane")."""
    classes = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    return [name if isinstance(name, str) else ", ".join(name) for name in classes] if classes else None


def _files(dataset: Dataset) -> List[str]:
    """The images' paths, where each is a file."""
    samples = getattr(dataset, "samples", None)
    if samples:
        return [str(path) for path, _ in samples]
    return [str(path) for path in getattr(dataset, "_images", None) or getattr(dataset, "_image_files", None) or ()]


def open_torchvision(name: str, data_dir: str, split: str, download: bool) -> TorchvisionImages:
    """One split of a data set.

    Args:
        name: `torch/...`.
        data_dir: the folder that it lies in, or is downloaded to.
        split: `train`, `validation`, or the data set's own name of a split.
        download: fetch what is missing; of several processes that want to, one does and the others wait.

    Raises:
        UserError: the data set, or the split, is not there.
    """
    if not data_dir:
        raise UserError(f"data_dir: {name} needs the folder that it lies in (or is downloaded to)")
    kind = _kind(name)
    own = _OWN.get(kind)
    is_train, is_test = split in SPLIT_FOLDERS["train"], split in (*SPLIT_FOLDERS["validation"], "test")
    ours = "train" if is_train else "test" if is_test else split
    if own and ours not in own.parts:
        raise UserError(f"dataset: {name}: no split {split!r}; expected one of {', '.join(own.parts)}")
    if kind in ("image_folder", "folder"):
        data_dir = str(split_folder(Path(data_dir), split))

    def make(**more: Any) -> List[Dataset]:
        if own:
            return [own.make(root=data_dir, split=part, **more) for part in own.parts[ours]]
        return [create_dataset(name, root=data_dir, split=split, search_split=False, **more)]

    unpacked = Path(data_dir, "meta.bin").is_file() and Path(data_dir, "train" if is_train else "val").is_dir()
    fetch = download or (kind == "imagenet" and not unpacked)
    try:
        parts = _fetched_once(make, data_dir, download) if fetch else make()
    except Exception as error:  # each source has its own exceptions for what is missing; all say what
        raise UserError(f"dataset: {name}, split {split}, in {data_dir}: {one_line(error)}") from None
    if own:
        return TorchvisionImages(parts, name, "+".join(own.parts[ours]))
    if isinstance(getattr(parts[0], "train", None), bool):
        check_split(name, split)
        return TorchvisionImages(parts, name, ours)
    return TorchvisionImages(parts, name, getattr(parts[0], "split", split))


def check_split(name: str, split: str) -> None:
    """Where timm takes every split but `train` for the test images, a slip of the pen would too."""
    known = (*SPLIT_FOLDERS["train"], *SPLIT_FOLDERS["validation"], "test")
    if split not in known:
        raise UserError(f"dataset: {name}: no split {split!r}; expected one of {', '.join(known)}")


def _fetched_once(make: Callable[..., List[Dataset]], data_dir: str, download: bool) -> List[Dataset]:
    """What is missing or damaged is downloaded, or for ImageNet unpacked, by one process while the others wait."""
    if download:
        with contextlib.suppress(Exception):
            return make()
    with _one_process_at_a_time(Path(data_dir)):
        if download:
            with contextlib.suppress(Exception):  # another process may have brought it meanwhile
                return make()
        more: Dict[str, Any] = {"download": True} if download else {}
        return make(**more)


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Of all processes that see the folder, on other machines as well where its file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".download.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield
