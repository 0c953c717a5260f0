"""Class folders on disk: find the folder of a split, and list its classes and images without opening a file."""

import logging
import os
import re
import unicodedata
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Container, Dict, Generic, Iterator, List, Mapping, NamedTuple, Optional, Tuple, TypeVar

from timm.data.readers.img_extensions import get_img_extensions

from tnt_timm.errors import UserError, one_line

_logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}
# Suffixes of images that timm does not read, though their owner may believe that the model trains on them.
OTHER_IMAGES = frozenset(".avif .bmp .gif .heic .jfif .jp2 .jpe .jxl .pgm .ppm .tif .tiff .webp".split())
# Suffixes of files that are no images, as their owner knows. All others are counted and named.
NOTES = frozenset(
    ".csv .db .html .ini .json .jsonl .lnk .log .md .md5 .py .sha256 .tsv .txt .url .xlsx .xml .yaml .yml".split()
)
# Folders that operating systems, NAS devices and Python make by themselves, in lower case. Those that start with a dot are
# left out too.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "__pycache__", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "lost+found")
    + ("system volume information",)
)
SYSTEM_FILES = frozenset(("icon\r",))
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


class Folder(NamedTuple):
    """A folder of a split and the names of the images in it."""

    path: str
    parts: Tuple[str, ...]  # of the path below the folder of the split
    images: List[str]

    @property
    def label(self) -> str:
        """Class of the images by timm's rule: the name of their folder. Empty for the folder of the split."""
        return class_name(self.parts[-1]) if self.parts else ""


class _ToList(NamedTuple):
    """A folder that has not been listed yet."""

    path: str
    parts: Tuple[str, ...]
    real: str  # its path without links
    passed: Tuple[str, ...]  # real paths of the folders whose links led here


class Survey:
    """Images and classes of a split, and everything in its folder that does not belong to a class.

    The folder is read once, and no file is opened. Hidden files and folders, those of the operating system and links to a
    folder above them are left out.

    Args:
        folder: of the split. Its subfolders are the classes.
        suffixes: of images, in lower case (default: those that timm reads).
    """

    def __init__(self, folder: Path, suffixes: Optional[Container[str]] = None):
        self.folder = folder
        self.folders: List[Folder] = []  # each before its subfolders, which are sorted by name
        self.stray: FirstItems[str] = FirstItems()  # images outside of any class folder
        self.deep: FirstItems[str] = FirstItems()  # images in subfolders of class folders
        self.unlisted: FirstItems[Tuple[str, str]] = FirstItems()  # unreadable folders, and why they are
        self.hidden: FirstItems[str] = FirstItems()  # hidden images, and folders that are hidden or of the system
        self.loops: FirstItems[str] = FirstItems()  # links to a folder above them
        self.skipped: Counter = Counter()  # other files that may be images, by suffix
        self.suffixes = get_img_extensions(as_set=True) if suffixes is None else suffixes
        self._walk()

        by_label, by_class_folder = Counter(), Counter()
        for place in self.folders:
            if place.images:
                by_label[place.label] += len(place.images)
            if place.parts:
                by_class_folder[place.parts[0]] += len(place.images)
            if len(place.parts) != 1:
                for name in place.images:
                    (self.deep if place.parts else self.stray).add(os.path.join(place.path, name))
        # Images by class, in the order of the targets. Stray images have the class ""
        self.counts: Dict[str, int] = {label: by_label[label] for label in sorted(by_label, key=class_order)}
        self.empty = sorted(name for name, count in by_class_folder.items() if not count)  # class folders

    def _walk(self) -> None:
        to_list = [_ToList(str(self.folder), (), os.path.realpath(self.folder), ())]
        while to_list:
            place = to_list.pop()
            try:
                with os.scandir(place.path) as listed:
                    entries = sorted(listed, key=lambda entry: entry.name)
            except OSError as error:
                self.unlisted.add((place.path, error.strerror or one_line(error)))
                entries = []
            images, below = [], []
            for entry in entries:
                if _is_folder(entry):
                    below += self._enter(entry, place)
                elif self._is_image(entry):
                    images.append(entry.name)
            self.folders.append(Folder(place.path, place.parts, images))
            to_list += reversed(below)

    def _is_image(self, file: os.DirEntry) -> bool:
        suffix = os.path.splitext(file.name)[1].lower()
        if suffix not in self.suffixes:
            if not file.name.startswith(".") and suffix not in NOTES and file.name.lower() not in SYSTEM_FILES:
                self.skipped[suffix or "without a suffix"] += 1
        elif file.name.startswith("."):
            self.hidden.add(file.path)
        elif not (file.is_symlink() or file.is_file()):
            self.skipped["pipe or device"] += 1  # reading a pipe would wait forever
        else:
            return True
        return False

    def _enter(self, folder: os.DirEntry, inside: _ToList) -> List[_ToList]:
        """Return the subfolder to list, or nothing if it is left out."""
        if folder.name.startswith(".") or folder.name.lower() in SYSTEM_FOLDERS:
            self.hidden.add(folder.path)
            return []
        real, passed = os.path.join(inside.real, folder.name), inside.passed
        if folder.is_symlink():
            real, passed = os.path.realpath(folder.path), (*passed, inside.real)
            if any(Path(place).is_relative_to(real) for place in passed):
                self.loops.add(folder.path)
                return []
        return [_ToList(folder.path, (*inside.parts, folder.name), real, passed)]

    def images(self) -> Iterator[Tuple[str, str]]:
        """Yield (path, class) of each image, one folder at a time."""
        for place in self.folders:
            label = place.label
            for name in place.images:
                yield f"{place.path}/{name}", label

    def samples(self, targets: Mapping[str, int]) -> List[Tuple[str, int]]:
        """Return (path, target) of each image of these classes, in timm's order of all paths.

        Only class folders whose names differ by case or leading zeros mix their images. Sorting the others one by one takes
        a fraction of the memory.
        """

        def order(place: Folder) -> list:
            return class_order(place.parts[0] + "/")[0]

        found: List[Tuple[str, int]] = []
        named = [(place, targets[place.label]) for place in self.folders if place.label in targets]
        for _, group in groupby(sorted(named, key=lambda item: order(item[0])), key=lambda item: order(item[0])):
            samples = [(f"{place.path}/{name}", target) for place, target in group for name in place.images]
            found += sorted(samples, key=lambda sample: class_order(sample[0]))
        return found

    def check_listed(self) -> None:
        """Raise UserError if a folder cannot be listed."""
        for place, reason in self.unlisted.first:
            raise UserError(f"{place}: cannot be listed: {reason}")

    def check_class_folders(self) -> None:
        """Raise UserError unless every image is in a class folder and every class folder has images."""
        self.check_listed()
        if self.empty:
            more = f" and {len(self.empty) - 3} more" if len(self.empty) > 3 else ""
            others = f" (left out because of their suffix: {_listed(self.skipped)})" if self.skipped else ""
            raise UserError(
                f"{self.folder}: class folder {', '.join(self.empty[:3])}{more} holds no images{others}; fill or remove it"
            )
        if list(self.counts) == [""]:
            raise UserError(f"{self.folder}: no class folders; sort the images into one folder per class")
        for path in self.stray.first:
            raise UserError(f"{path}: not in a class folder; move it into one, or remove it")

    def check_depth(self) -> None:
        """Raise UserError if an image lies in a subfolder of a class folder."""
        inside = {place.parts[0] for place in self.folders if place.parts}
        if len(inside) == 1 and 0 < self.deep.count == sum(self.counts.values()):
            between = self.folder / inside.pop()
            raise UserError(f"{between}: a folder too many above the class folders; move its content up")
        for path in self.deep.first:
            raise UserError(f"{path}: deeper than a class folder of {self.folder}; move it into its class folder")

    def warn_of_left_out(self) -> None:
        """Log one line about everything that is left out."""
        found = []
        if self.skipped:
            found.append(f"{_listed(self.skipped)} (convert images to .jpg or .png to use them)")
        for what, some in (
            ("hidden or system files and folders", self.hidden),
            ("links to a folder above them", self.loops),
        ):
            if some.count:
                example = os.path.relpath(some.first[0], self.folder)
                found.append(f"{what}: {some.count:,}, such as {example}")
        if found:
            _logger.info(f"warning: {self.folder}: left out: {'; '.join(found)}")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as two links to each other
        return False


def _listed(counts: Counter) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())


def class_name(name: str) -> str:
    """Return the name of a class folder, or of a class in a file, as text that is the same everywhere and can be written.

    The Unicode form is NFC, because macOS and archives may store the accent of an é apart. Bytes that are not UTF-8 become
    escapes.
    """
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())


def class_order(name: str) -> Tuple[list, str]:
    """Return a sort key that orders classes, and paths of images, as timm does: `c9` before `c10`.

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
