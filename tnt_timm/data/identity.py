"""What identifies a dataset, cheaply: to notice that it changed between two starts of a run, or differs between two ranks.

Only file names are taken in full. Lengths and contents are those of a few files, because reading them all takes minutes on a
network drive.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Sequence

import numpy as np

from tnt_timm.data.datasets import Images, ReaderImages, StreamSet
from tnt_timm.data.slices import SplitPart

LENGTHS = 256  # files whose length is looked up, evenly spread over the dataset
CONTENTS = (
    16  # files of which the first bytes are read: folds may share names and, in formats without compression, lengths
)
FIRST_BYTES = 1 << 16

WORDS = {
    "classes": "other class names",
    "positions": "another part of the split",
    "targets": "other targets",
    "names": "other file names",
    "lengths": "other file lengths",
    "contents": "other file contents",
}


def identity_of(images: Images) -> Dict[str, Any]:
    """Return what identifies a split, as values for JSON: its number of "images", and a digest of each of its parts.

    The digests are of the "classes" (their names in order), "targets", "names", "lengths" and "contents", where the kind of
    dataset has them. Names are relative to the folder that all files share, so a moved dataset stays the same.
    """
    if isinstance(images, SplitPart):
        first_and_last = [images.positions.start, images.positions.stop]
        return {**identity_of(images.whole), "images": len(images), "positions": _of_values(first_and_last)}
    parts: Dict[str, Any] = {"classes": _of_values(images.classes or ())}
    files = list(getattr(images, "files", ()))
    if isinstance(images, StreamSet):
        parts.update(_shards(images))
    elif files:
        parts.update(_files(files))
    elif isinstance(images, ReaderImages):
        parts.update(_rows(images))
    targets = _targets(images)
    if targets:
        parts["targets"] = _of_values(targets)
    arrays = [array for part in _tables(images) if (array := getattr(part, "data", None)) is not None and len(array)]
    if arrays:
        parts["contents"] = _digest(np.asarray(array[i]).tobytes() for array in arrays for i in _spread(len(array)))
    return {"images": len(images), **parts}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words what differs between two identities, empty if nothing does. Parts that only one has are not compared."""
    different = _different(before, now)
    for cause, effects in (
        ("images", {"positions", "targets", "names", "lengths", "contents"}),
        ("names", {"lengths", "contents"}),
    ):
        if cause in different:
            different = [key for key in different if key not in effects]
    counts = f"{before.get('images', 0):,} -> {now.get('images', 0):,} images"
    return ", ".join(counts if key == "images" else WORDS.get(key, f"other {key}") for key in different)


def same_order(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two identities have the same images at the same positions, though some may have other content."""
    return not {"images", "positions", "classes", "targets", "names"} & set(_different(before, now))


def _different(before: Mapping[str, Any], now: Mapping[str, Any]) -> List[str]:
    return [key for key in before if key in now and before[key] != now[key]]


def _shards(images: StreamSet) -> Dict[str, Any]:
    names = [str(name) for name in images.reader.split_info.filenames]
    root = Path(images.reader.root or "")
    if not root.is_dir():  # the shards may be remote
        return {"names": _of_values(names)}
    return {**_files([str(root / name) for name in names]), "names": _of_values(names)}


def _files(files: Sequence[str]) -> Dict[str, Any]:
    start = len(
        os.path.commonpath([os.path.dirname(path) for path in (min(files), max(files))])
    )  # of all: they sort between
    names = "\0".join(path[start:] for path in files).encode(errors="surrogateescape")
    return {
        "names": _digest([names]),
        "lengths": _of_values([_length(files[i]) for i in _spread(len(files), LENGTHS)]),
        "contents": _digest(_first_bytes(files[i]) for i in _spread(len(files))),
    }


def _length(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _first_bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(FIRST_BYTES)
    except OSError:
        return b""


def _rows(images: ReaderImages) -> Dict[str, Any]:
    """Return what identifies rows of `hfds/...`, from a few of them: the labels lie scattered between the images."""
    reader = images.reader
    fields = [reader.image_key, reader.label_key.partition("/")[0]]  # others may be images, too, and slow to decode
    rows = list(map(reader.dataset.select_columns(fields).__getitem__, _spread(len(reader))))
    pictures = [row.pop(reader.image_key) or {} for row in rows]
    return {
        "targets": _of_values([str(row) for row in rows]),
        "contents": _digest((picture.get("bytes") or b"")[:FIRST_BYTES] for picture in pictures),
        "lengths": _of_values([len(picture.get("bytes") or b"") for picture in pictures]),
    }


def _tables(images: Any) -> List[Any]:
    """Return the torchvision datasets that make up `torch/...`, or the dataset itself."""
    return getattr(getattr(images, "dataset", None), "datasets", None) or [images]


def _targets(images: Any) -> List[Any]:
    """Return the targets of all images where the dataset has them in memory."""
    if isinstance(images, (ReaderImages, StreamSet)):
        return [target for _, target in getattr(images.reader, "samples", ())]
    return images.targets


def _spread(count: int, most: int = CONTENTS) -> List[int]:
    """Return at most `most` indices, evenly spread from the first to the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).astype(int).tolist()))


def _of_values(values: Sequence[Any]) -> str:
    return _digest([json.dumps(list(values)).encode()])


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:16]
