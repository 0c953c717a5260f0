"""Class maps: read a file of classes and their targets, and compare it with the classes of the data."""

import difflib
import logging
from pathlib import Path
from typing import Collection, Dict, List, Mapping

from timm.data.readers.class_map import load_class_map

from tnt_timm.data.folders import class_name
from tnt_timm.errors import UserError, one_line

_logger = logging.getLogger(__name__)


def read_class_map(path: str) -> Dict[str, int]:
    """Read classes and their targets from a file: `.txt` with one class per line, or timm's `.pkl`, a dict of names and indices.

    Names are in the Unicode form NFC. No pickled code is run.

    Raises:
        UserError: the file is missing or damaged, a line is empty or repeats a class, or the indices are not 0 to n - 1.
    """
    place = f"class_map: {path}"
    if not Path(path).is_file():
        raise UserError(f"{place}: no such file")
    try:
        targets = _read_lines(path) if path.lower().endswith(".txt") else load_class_map(path)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{place}: {one_line(error)}") from None
    if not targets:
        raise UserError(f"{place}: no class in it")
    names: Dict[int, str] = {}
    for name, index in targets.items():
        if not isinstance(name, str) or type(index) is not int:
            raise UserError(f"{place}: {name!r}: {index!r}: expected the name of a class and its index")
        if index in names:
            raise UserError(
                f"{place}: {names[index]} and {name} both have index {index}; to merge classes, put their images in one folder"
            )
        names[index] = name
    if sorted(names) != list(range(len(names))):
        found = f"from {min(names)} to {max(names)}"
        raise UserError(f"{place}: its {len(names)} indices are {found}; expected 0 to {len(names) - 1}")
    merged = {class_name(name): index for name, index in targets.items()}
    if len(merged) < len(targets):
        raise UserError(f"{place}: two names differ only in the Unicode form of their accents")
    return merged


def _read_lines(path: str) -> Dict[str, int]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # as file names are decoded
        lines = [line.strip() for line in file]
    targets = {name: index for index, name in enumerate(lines)}
    for index, name in enumerate(lines):
        if not name or targets[name] != index:
            what = f"{name} comes again later" if name else "empty"
            raise UserError(f"class_map: {path}: line {index + 1}: {what}; expected a new class on each line")
    return targets


def nearest(name: str, names: Collection[str], cutoff: float = 0.0) -> str:
    """Return the most similar of the names, or an empty text if none is similar."""
    same = [other for other in names if other.casefold() == name.casefold()]
    return (same or difflib.get_close_matches(name, names, 1, cutoff) or [""])[0]


def compare_with_folders(
    targets: Mapping[str, int], counts: Mapping[str, int], folder: Path, is_training: bool
) -> None:
    """Check that the class map and the class folders of a split name the same classes.

    A map may name only some of the folders, and validation may have no images of some classes. Both are logged.

    Args:
        targets: the class map.
        counts: images by class folder.
        folder: of the split.
        is_training: each class needs images.

    Raises:
        UserError: a class of the map has no images, and they are needed, or a folder's name is similar.
    """
    missing, others = missing_and_others(targets, counts)
    if wrong := mistyped(missing, others, folder, is_training):
        raise UserError(f"class_map: {wrong}")
    if missing:
        _logger.info(f"warning: class_map: {folder}: no images of {_some(missing)}")
    if others:
        images = sum(counts[name] for name in others)
        named = _some([name or "the folder itself" for name in others])
        _logger.info(
            f"warning: class_map: {folder}: left out: {images:,} images of folders that it does not name: {named}"
        )


def missing_and_others(targets: Mapping[str, int], counts: Mapping[str, int]) -> tuple:
    """Return the classes of the map without an image, and the class folders that the map does not name."""
    return [name for name in targets if not counts.get(name)], [name for name in counts if name not in targets]


def mistyped(missing: List[str], others: List[str], folder: Path, is_training: bool) -> str:
    """Return what is wrong with the names of a class map, or an empty text; see `compare_with_folders`."""
    for name in missing:
        near = nearest(name, list(filter(None, others)), 0.0 if is_training else 0.6)
        if near or is_training:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            folders = f"the nearest folder that the map does not name is {near}" if near else "no folder is left over"
            return f"{folder}: no images of {name}{more}; {folders}; correct the name, or remove it from the map"
    return ""


def _some(names: List[str]) -> str:
    return f"{len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
