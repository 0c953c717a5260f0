"""Class folders as they lie on the disk: which folder is which split, and what is in it, known without opening a file."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, Generic, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions

from tnt_timm.errors import UserError, one_line

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}
# Images by their suffix that timm's reader does not take: whoever has them believes that they are trained on.
OTHER_IMAGES = frozenset(".avif .bmp .gif .heic .jfif .jp2 .jpe .jxl .pgm .ppm .tif .tiff .webp".split())
KEPT = 10_000  # names kept of a kind; a data set has millions of them where all are wrong

Item = TypeVar("Item")


class Some(Generic[Item]):
    """The first items of a kind, and how many there are."""

    def __init__(self) -> None:
        self.first: List[Item] = []
        self.count = 0

    def add(self, item: Item, count: int = 1) -> None:
        """Add one item, which may stand for more of its kind."""
        self.count += count
        if len(self.first) < KEPT:
            self.first.append(item)


class Survey:
    """What the folder of a split holds.

    Args:
        folder: of the split; its folders are the classes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.stray: Some[str] = Some()  # images beside the class folders
        self.deep: Some[str] = Some()  # images in folders of class folders
        self.unlisted: Some[Tuple[str, str]] = Some()  # folders that cannot be read, and why
        self.passed_over: Counter = Counter()  # files by those suffixes of images that are not read

        counts, beneath = Counter(), Counter()
        for place in _places(folder, lambda e: self.unlisted.add((str(e.filename), e.strerror or one_line(e)))):
            if place.images:
                counts[place.label] += len(place.images)
            if place.way:
                beneath[place.way[0]] += len(place.images)
            if len(place.way) != 1:
                for name in place.images:
                    (self.deep if place.way else self.stray).add(os.path.join(place.path, name))
            self.passed_over.update(suffix for suffix in map(_suffix, place.others) if suffix in OTHER_IMAGES)
        # Images by class, in the order of the targets; the class of images beside the folders is ""
        self.counts: Dict[str, int] = {name: counts[name] for name in sorted(counts, key=class_order)}
        self.empty = [name for name in sorted(beneath) if not beneath[name] and not name.startswith(".")]  # classes

    @property
    def num_images(self) -> int:
        return sum(self.counts.values())

    def passed_over_text(self) -> str:
        """One line on the images that are not read; empty where there are none."""
        if not self.passed_over:
            return ""
        found = ", ".join(f"{count:,} {suffix}" for suffix, count in self.passed_over.most_common())
        return f"{self.folder}: not read, for their suffix: {found}; convert them to .jpg or .png to use them"


def images_of(folder: Path) -> Iterator[Tuple[str, str]]:
    """(path, class) of each image of a split, folder by folder, so that millions of names are never held at once."""
    for place in _places(folder):
        for name in sorted(place.images):
            yield os.path.join(place.path, name), place.label


class _Place(NamedTuple):
    path: str
    way: Sequence[str]  # the folders' names on the way here from the folder of the split
    images: List[str]  # names of the files that timm's reader takes
    others: List[str]

    @property
    def label(self) -> str:
        """The class of the images here, by timm's rule."""
        return self.way[-1] if self.way else ""


def _places(folder: Path, on_error: Optional[Callable[[OSError], object]] = None) -> Iterator[_Place]:
    taken = get_img_extensions(as_set=True)
    for path, below, names in os.walk(folder, followlinks=True, onerror=on_error):
        below.sort()
        images, others = [], []
        for name in names:
            (images if _suffix(name) in taken else others).append(name)
        way = os.path.relpath(path, folder).split(os.sep)
        yield _Place(path, [] if way == ["."] else way, images, others)


def _suffix(name: str) -> str:
    dot = name.rfind(".")  # os.path.splitext takes five times as long, and there may be a million names
    return name[dot:].lower() if dot > 0 and name[0] != "." else os.path.splitext(name)[1].lower()


def class_order(name: str) -> Tuple[list, str]:
    """Sorts classes as timm does, `c9` before `c10`. But timm leaves `Cat` and `cat`, or `1` and `01`, in an order that is
    another one in each process, where each would train on targets of its own."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split by its name or, of training and validation, by one of the usual ones.

    Raises:
        UserError: there is none.
    """
    names = next((names for names in SPLIT_FOLDERS.values() if split in names), ())
    candidates = (split, *(name for name in names if name != split))
    for name in candidates:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"{root}: no {split} folder; looked for {', '.join(candidates)}")


def read_class_map(path: str) -> Dict[str, int]:
    """Class names and their targets from a file (`.txt`, a name per line, or timm's `.pkl`).

    Raises:
        UserError: no such file, or one that gives a class no target of its own.
    """
    if not Path(path).is_file():
        raise UserError(f"class_map: {path}: no such file")
    try:
        names = load_class_map(path)
    except Exception as error:  # damaged in whatever way
        raise UserError(f"class_map: {path}: {one_line(error)}") from None
    if not path.lower().endswith(".txt"):
        return names
    with open(path, encoding="utf-8") as lines:
        for number, name in enumerate(map(str.strip, lines)):
            if not name or names[name] != number:
                what = f"{name} again" if name else "empty"
                raise UserError(f"class_map: {path}: line {number + 1}: {what}; expected a new class on each line")
    return names
