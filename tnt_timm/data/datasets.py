"""Data sets by timm's names, each made to answer the same questions: how many, which image, which name, which classes.

Folders, `hfds/...` and `wds/...` come from `timm.data.create_dataset`, `torch/...` from torchvision; `digits` is ours. What
timm passes over in silence is an error here: a missing split folder, an empty class folder, class folders that the splits do
not share.
"""

import logging
import os
import struct
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import ImageDataset, IterableImageDataset

from tnt_timm.data.digits import Digits
from tnt_timm.data.folders import SPLIT_FOLDERS, Survey, read_class_map, split_folder
from tnt_timm.data.torchvision_sets import check_split, open_torchvision
from tnt_timm.data.transforms import to_rgb
from tnt_timm.errors import UserError, one_line

_logger = logging.getLogger(__name__)

# What Pillow raises over a damaged file.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


class Damage(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


class ImageSet(Protocol):
    """A data set whose images can be asked for one by one."""

    classes: Optional[List[str]]  # names in the order of the targets, where known

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tuple[Image.Image, int]:
        """The decoded RGB image and its target; raises one of DAMAGE for a damaged file."""

    def name(self, index: int) -> str:
        """What to call the image in a message; for a file, its path."""


class StreamSet:
    """A data set that can only be read from its start (`wds/...`): yields (image, target)."""

    def __init__(self, dataset: IterableImageDataset, classes: Optional[List[str]]):
        self.dataset = dataset
        self.classes = classes

    def __len__(self) -> int:
        return self.dataset.reader.num_samples

    @property
    def num_shards(self) -> int:
        return len(self.dataset.reader.split_info.filenames)


class ReaderImages:
    """Folders and `hfds/...`: timm's readers, decoded here so that damage is reported, not passed over."""

    def __init__(self, dataset: ImageDataset, label: str):
        self.reader = dataset.reader
        self.label = label
        names = self.reader.class_to_idx
        self.classes = sorted(names, key=names.get) if names else None

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        try:
            file, target = self.reader[index]
        except (AssertionError, TypeError):
            raise ValueError("the row holds no image") from None  # hfds
        with file, Image.open(file) as image:
            return to_rgb(image), target

    def name(self, index: int) -> str:
        try:
            file = self.reader.filename(index, absolute=True)
        except TypeError:  # an hfds row without an image
            file = None
        return file or f"image {index} of {self.label}"


def open_dataset(
    name: str,
    data_dir: str,
    split: str,
    is_training: bool,
    download: bool = False,
    class_map: str = "",
    input_key: Optional[str] = None,
    target_key: Optional[str] = None,
    num_samples: Optional[int] = None,
    batch_size: int = 1,
    seed: int = 42,
) -> Union[ImageSet, StreamSet]:
    """One split of a data set.

    Args:
        name: `digits` or a part of its classes (`digits/0-4`), `torch/...`, `hfds/...`, `wds/...`, or empty for folders
            of class folders.
        data_dir: the data set's folder, where it has one.
        split: `train`, `validation`, or the data set's own name of a split.
        is_training: whether a stream is shuffled and dealt to the processes.
        download: let torchvision fetch what is missing; of several processes that want to, one does and the others wait.
        class_map: file of class names for folders, hfds and wds.
        input_key, target_key: fields of hfds and wds samples.
        num_samples: images of a wds split that does not say.
        batch_size, seed: of the training run, for streams.

    Raises:
        UserError: the data set or the split cannot be opened, holds no images, or has an empty class folder.
    """
    if name == "digits" or name.startswith("digits/"):
        check_split(name, split)
        return Digits("train" if split in SPLIT_FOLDERS["train"] else "validation", name.partition("/")[2])
    kind = name.partition("/")[0].lower() if "/" in name else name
    if kind not in ("", "folder", "torch", "hfds", "wds"):
        raise UserError(
            f"dataset: {name!r}: expected digits, torch/..., hfds/..., wds/..., or nothing for class folders"
        )
    names = read_class_map(class_map) if class_map else None
    if kind in ("", "folder"):
        return _open_folder(data_dir, split, names)
    if kind == "torch":
        return open_torchvision(name, data_dir, split, download)
    if kind == "wds" and not data_dir:
        raise UserError(f"data_dir: {name} needs the folder that it lies in")

    options: Dict[str, Any] = dict(split=split, class_map=names, is_training=is_training, search_split=False)
    options.update(input_key=input_key, target_key=target_key)
    if kind == "wds":
        options.update(num_samples=num_samples, batch_size=batch_size, seed=seed)
    try:
        dataset = create_dataset(name, root=data_dir or None, **{k: v for k, v in options.items() if v is not None})
    except ImportError as error:
        raise UserError(
            f"dataset: {name}: a package is missing: {one_line(error)}; pip install '.[data]' brings it"
        ) from None
    except Exception as error:  # each source has its own exceptions for what is missing; all say what
        raise UserError(f"dataset: {name}, split {split}, in {data_dir or 'its cache'}: {one_line(error)}") from None
    if kind == "hfds":
        _check_fields(name, dataset.reader)
        return ReaderImages(dataset, f"{name} {split}")
    _check_stream(name, data_dir, split, dataset.reader, is_training)
    names = dataset.reader.class_to_idx
    return StreamSet(dataset, sorted(names, key=names.get) if names else None)


def _check_stream(name: str, data_dir: str, split: str, reader: Any, is_training: bool) -> None:
    shards = reader.split_info.filenames if Path(data_dir).is_dir() else ()  # shards may be remote
    missing = [shard for shard in shards if not (Path(data_dir) / shard).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{Path(data_dir) / missing[0]}{more}: no such shard of {name}, split {split}")
    if not is_training and not reader.num_samples:
        raise UserError(f"val_num_samples: {name}, split {split}, does not say how many images it has; pass the number")


def _check_fields(name: str, reader: Any) -> None:
    table = reader.dataset.data
    fields = list(table.column_names)
    if table.column(reader.image_key).null_count == len(reader):  # the cast to images makes a field that is not there
        fields.remove(reader.image_key)
        raise UserError(f"input_key: {name} has no images in field {reader.image_key!r}; fields: {', '.join(fields)}")
    if not reader.target_keys and reader.label_key.partition("/")[0] not in fields:
        raise UserError(f"target_key: {name} has no field {reader.label_key!r}; fields: {', '.join(fields)}")


def _open_folder(data_dir: str, split: str, class_map: Optional[Dict[str, int]]) -> ReaderImages:
    if not data_dir:
        raise UserError(
            "data_dir: no data set given; pass its folder (train.py DIR), or --dataset digits to try things out"
        )
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"data_dir: {root}: no such folder")
    survey = Survey(split_folder(root, split))
    if class_map is None:
        _check_layout(survey)
        class_map = {name: target for target, name in enumerate(survey.counts)}
    if survey.passed_over:
        _logger.info("warning: %s", survey.passed_over_text())
    folder = str(survey.folder)
    try:
        dataset = create_dataset("", root=folder, split=split, search_split=False, class_map=class_map)
    except Exception as error:
        raise UserError(f"{folder}: {one_line(error)}") from None
    return ReaderImages(dataset, folder)


def _check_layout(survey: Survey) -> None:
    """One folder per class, images right in it.

    Raises:
        UserError: the first thing that is otherwise.
    """
    folder = survey.folder
    for place, reason in survey.unlisted.first:
        raise UserError(f"{place}: cannot be listed: {reason}")
    if survey.empty:
        more = f" and {len(survey.empty) - 3} more" if len(survey.empty) > 3 else ""
        raise UserError(
            f"{folder}: class folder {', '.join(survey.empty[:3])}{more} holds no images; fill or remove it"
        )
    if list(survey.counts) == [""]:
        raise UserError(f"{folder}: the images lie side by side; sort them into one folder per class")
    for path in survey.stray.first:
        raise UserError(f"{path}: an image beside the class folders; move it into one of them, or away")
    for path in survey.deep.first:
        raise UserError(f"{path}: lies deeper than a class folder of {folder}; its class would be a guess, so move it")


def check_no_empty_files(images: Union[ImageSet, StreamSet]) -> None:
    """Find before a run, without opening anything, what would end it at its first evaluation: files of zero bytes.

    Args:
        images: the validation set; of those that are not one file per image nothing can be told so cheaply.

    Raises:
        UserError: naming the first of them.
    """
    samples = getattr(getattr(images, "reader", None), "samples", ())
    paths = getattr(images, "files", None) or [path for path, _ in samples]
    empty = [path for path in paths if not _size(path)]
    if empty:
        more = f" (and {len(empty) - 1:,} more)" if len(empty) > 1 else ""
        raise UserError(
            f"{empty[0]}{more}: a validation image without a byte; replace or remove it; "
            f"`tnt-check` finds every damaged image of a data set"
        )


def _size(path: str) -> int:
    """In bytes; 0 where there is nothing, as behind a broken link."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def check_same_classes(
    ours: Optional[Sequence[str]], theirs: Optional[Sequence[str]], our_place: str, their_place: str
) -> None:
    """Targets mean the same in two places only if the class names are the same.

    Raises:
        UserError: naming the classes that only one of them has.
    """
    if ours is None or theirs is None or list(ours) == list(theirs):
        return

    def only(left: Sequence[str], right: Sequence[str], place: str) -> List[str]:
        names = [name for name in left if name not in set(right)]
        return [f"only {place} has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"] if names else []

    found = only(ours, theirs, our_place) + only(theirs, ours, their_place)
    raise UserError(
        f"{our_place} and {their_place} do not have the same classes: {'; '.join(found) or 'the order differs'}"
    )
