"""Class folders on disk: find the folder of a split, and list its classes and images without opening a file."""

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, Generic, Iterator, List, NamedTuple, Optional, Tuple, TypeVar

from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions

from tnt_timm.errors import UserError, one_line

_logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}
# Suffixes of images that timm's reader skips, though their owner may believe that the model trains on them.
OTHER_IMAGES = frozenset(".avif .bmp .gif .heic .jfif .jp2 .jpe .jxl .pgm .ppm .tif .tiff .webp".split())
KEPT = 10_000  # items kept per kind: if all images of a dataset are wrong, there are millions

Item = TypeVar("Item")


class FirstItems(Generic[Item]):
    """The first items of a kind, and the number of all of them."""

    def __init__(self) -> None:
        self.first: List[Item] = []
        self.count = 0

    def add(self, item: Item, count: int = 1) -> None:
        """Add an item that stands for `count` of its kind."""
        self.count += count
        if len(self.first) < KEPT:
            self.first.append(item)


class Survey:
    """Classes of a split, and everything in its folder that does not belong to a class.

    Args:
        folder: of the split. Its subfolders are the classes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.stray: FirstItems[str] = FirstItems()  # images outside of any class folder
        self.deep: FirstItems[str] = FirstItems()  # images in subfolders of class folders
        self.unlisted: FirstItems[Tuple[str, str]] = FirstItems()  # unreadable folders, and why they are
        self.skipped: Counter = Counter()  # images that timm's reader skips, by suffix

        by_label, by_class_folder = Counter(), Counter()
        for place in _walk(folder, lambda e: self.unlisted.add((str(e.filename), e.strerror or one_line(e)))):
            if place.images:
                by_label[place.label] += len(place.images)
            if place.parts:
                by_class_folder[place.parts[0]] += len(place.images)
            if len(place.parts) != 1:
                for name in place.images:
                    (self.deep if place.parts else self.stray).add(os.path.join(place.path, name))
            self.skipped.update(place.skipped)
        # Images by class, in the order of the targets. Stray images have the class ""
        self.counts: Dict[str, int] = {label: by_label[label] for label in sorted(by_label, key=class_order)}
        self.empty = sorted(name for name, count in by_class_folder.items() if not count and name[0] != ".")  # classes

    def check_depth(self) -> None:
        """Raise UserError if an image lies in a subfolder of a class folder."""
        for path in self.deep.first:
            raise UserError(f"{path}: deeper than a class folder of {self.folder}; move it into its class folder")

    def warn_of_skipped(self) -> None:
        """Log one line about the images that timm's reader skips."""
        if self.skipped:
            found = ", ".join(f"{count:,} {suffix}" for suffix, count in self.skipped.most_common())
            fix = "convert them to .jpg or .png to use them"
            _logger.info(f"warning: {self.folder}: skipped because of their suffix: {found}; {fix}")


def images_of(folder: Path) -> Iterator[Tuple[str, str]]:
    """Yield (path, class) of each image of a split, one folder at a time, so that memory stays small."""
    for place in _walk(folder):
        for name in sorted(place.images):
            yield os.path.join(place.path, name), place.label


class _Folder(NamedTuple):
    path: str
    parts: Tuple[str, ...]  # of the path below the folder of the split
    images: List[str]  # names of the files that timm's reader takes
    skipped: Counter
    label: str  # class of the images by timm's rule: the name of their folder


def _walk(folder: Path, on_error: Optional[Callable[[OSError], object]] = None) -> Iterator[_Folder]:
    readable = get_img_extensions(as_set=True)
    for path, subfolders, names in os.walk(folder, followlinks=True, onerror=on_error):
        subfolders.sort()
        images, skipped = [], Counter()
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in readable:
                images.append(name)
            elif suffix in OTHER_IMAGES:
                skipped[suffix] += 1
        parts = Path(path).relative_to(folder).parts
        yield _Folder(path, parts, images, skipped, parts[-1] if parts else "")


def class_order(name: str) -> Tuple[list, str]:
    """Return a sort key that orders classes as timm does: `c9` before `c10`.

    timm's own key is the same for `Cat` and `cat`, or `1` and `01`, so their order, and with it their targets, differs
    from rank to rank. Here the name itself decides.
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def split_folder(root: Path, split: str) -> Path:
    """Return the folder of a split. Training and validation may have any of their usual names.

    Raises:
        UserError: there is none.
    """
    usual = next((names for names in SPLIT_FOLDERS.values() if split in names), ())
    candidates = list(dict.fromkeys((split, *usual)))
    for name in candidates:
        if (root / name).is_dir():
            return root / name
    others = (
        [name for name in ("test", "testing") if (root / name).is_dir()] if split in SPLIT_FOLDERS["validation"] else []
    )
    hint = f"; to evaluate on {root / others[0]}, pass --val-split {others[0]}" if others else ""
    raise UserError(f"{root}: no {split} folder; looked for {', '.join(candidates)}{hint}")


def read_class_map(path: str) -> Dict[str, int]:
    """Read classes and their targets from a file (`.txt`, one class per line, or timm's `.pkl`).

    Raises:
        UserError: the file is missing or damaged, or a line is empty or repeats a class.
    """
    if not Path(path).is_file():
        raise UserError(f"class_map: {path}: no such file")
    try:
        targets = load_class_map(path)
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"class_map: {path}: {one_line(error)}") from None
    if path.lower().endswith(".txt"):
        with open(path, encoding="utf-8") as lines:
            for number, name in enumerate(map(str.strip, lines)):
                if not name or targets[name] != number:
                    what = f"{name} comes again later" if name else "empty"
                    raise UserError(f"class_map: {path}: line {number + 1}: {what}; expected a new class on each line")
    return targets
