"""Open datasets by timm's names, behind one interface: length, image, image name, class names.

`hfds/...` and `wds/...` come from `timm.data.create_dataset`, `torch/...` from torchvision. Folders have timm's classes and
order of images. `digits` is ours. What timm skips silently is an error here: a missing split folder, an empty class folder,
splits with different classes. Other things that are left out are counted and logged.
"""

import os
from pathlib import Path
from typing import IO, Any, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import IterableImageDataset
from torch import Tensor

from tnt_timm.data.class_maps import compare_with_folders, read_class_map
from tnt_timm.data.decoding import DamagedImage, Decoder, as_damage, decode
from tnt_timm.data.digits import Digits
from tnt_timm.data.folders import SPLIT_FOLDERS, Survey, class_name, split_folder
from tnt_timm.data.labels import Labels, labels_of_column
from tnt_timm.data.slices import SplitPart, read_slice
from tnt_timm.data.torchvision_sets import check_split, open_torchvision
from tnt_timm.errors import UserError, one_line


class Damage(NamedTuple):
    """An image that cannot be read."""

    name: str
    reason: str


class ImageSet(Protocol):
    """A dataset with random access to its images."""

    classes: Optional[List[str]]  # names in the order of the targets, where known

    def __len__(self) -> int: ...

    def load(self, index: int) -> Tuple[Union[Image.Image, Tensor], int]:
        """Return the decoded RGB image and its target. Raise DamagedImage if it cannot be read."""

    def name(self, index: int) -> str:
        """Return the name of an image for messages: the path of a file."""


class StreamSet:
    """A dataset that can only be read from its start (`wds/...`). `dataset` yields (image, label)."""

    def __init__(self, dataset: IterableImageDataset, labels: Labels, decoder: Decoder = decode):
        self.dataset = dataset
        self.decoder = decoder
        self.reader = dataset.reader
        self.labels = labels
        self.classes = labels.classes

    def __len__(self) -> int:
        return self.reader.num_samples

    @property
    def num_shards(self) -> int:
        return len(self.reader.split_info.filenames)


class FileReader:
    """The images of class folders as a reader: index -> (open file, target)."""

    def __init__(self, samples: Sequence[Tuple[str, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tuple[IO[bytes], int]:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def filename(self, index: int, absolute: bool = True) -> str:
        return self.samples[index][0]


class ReaderImages:
    """Folders and `hfds/...`, decoded here to report damage instead of skipping it.

    Args:
        reader: a `FileReader` or timm's.
        label: of the dataset, for messages.
        labels: of the classes and of what the reader returns as targets.
        decoder: of the files.
    """

    def __init__(self, reader: Any, label: str, labels: Labels, decoder: Decoder = decode):
        self.reader = reader
        self.decoder = decoder
        self.label = label
        self.labels = labels
        self.classes = labels.classes

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def files(self) -> List[str]:
        """Paths of all images. Empty for hfds."""
        return [path for path, _ in getattr(self.reader, "samples", ())]

    def load(self, index: int) -> Tuple[Union[Image.Image, Tensor], int]:
        try:
            with as_damage((OSError, ValueError)):
                file, label = self.reader[index]
        except (AssertionError, TypeError):
            raise DamagedImage("the row holds no image") from None  # hfds
        target = self.labels.index(label, lambda: self.name(index))
        with file:
            return self.decoder(file), target

    def name(self, index: int) -> str:
        try:
            file = self.reader.filename(index, absolute=True)
        except TypeError:  # an hfds row without an image
            file = None
        return file or f"image {index} of {self.label}"


Images = Union[ImageSet, StreamSet]


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
    decoder: Decoder = decode,
) -> Images:
    """Open one split of a dataset.

    Args:
        name: `digits` or a range of its classes (`digits/0-4`), `torch/...`, `hfds/...`, `wds/...`, or empty for class
            folders.
        data_dir: folder of the dataset, if it has one.
        split: `train`, `validation`, or the dataset's own name of a split. Of digits, `torch/...` and `hfds/...` it may be a
            slice such as `train[:1000]`.
        is_training: shuffle a stream and deal it to the ranks.
        download: let torchvision download what is missing. Of several processes, one does and the others wait.
        class_map: file of class names for folders, hfds and wds.
        input_key, target_key: fields of hfds and wds samples.
        num_samples: number of images of a wds split, if its `_info.json` does not say.
        batch_size, seed: of the training run, for streams.
        decoder: of encoded images. `digits` and datasets such as CIFAR hold pixels, which become Pillow's images.

    Raises:
        UserError: the dataset or split cannot be opened, holds no images, has an empty class folder, labels that are no class
            or other classes than the class map.
    """
    kind = name.lower().partition("/")[0]
    if kind in ("digits", "torch") and "[" in split:
        split, part = read_slice(split)
        return SplitPart(open_dataset(name, data_dir, split, is_training, download, class_map, decoder=decoder), part)
    targets = read_class_map(class_map) if class_map else None
    if targets and kind in ("digits", "torch"):
        raise UserError(f"class_map: {name} has its own classes; leave the class map out")
    if kind == "digits":
        check_split(name, split)
        return Digits("train" if split in SPLIT_FOLDERS["train"] else "validation", name.partition("/")[2])
    if kind in ("", "folder"):
        return _open_folder(data_dir, split, is_training, targets, decoder)
    if kind == "torch":
        return open_torchvision(name, data_dir, split, download, decoder)
    fields = dict(input_key=input_key, target_key=target_key)
    if kind == "hfds":
        return _open_hugging_face(name, data_dir, split, is_training, targets, decoder, **fields)
    if kind == "wds":
        options = dict(num_samples=num_samples, batch_size=batch_size, seed=seed, **fields)
        return _open_stream(name, data_dir, split, is_training, targets, decoder, **options)
    raise UserError(f"dataset: {name!r}: expected digits, torch/..., hfds/..., wds/..., or nothing for class folders")


def _create(place: str, name: str, root: str, split: str, **options: Any) -> Any:
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return create_dataset(name, root=root or None, split=split, search_split=False, **given)
    except ImportError as error:
        raise UserError(
            f"{place}: a package is missing: {one_line(error)}; install it with pip install '.[data]'"
        ) from None
    except Exception as error:  # each source has its own exceptions for missing data, all with a clear message
        raise UserError(f"{place}: {one_line(error)}") from None


def _open_hugging_face(
    name: str,
    data_dir: str,
    split: str,
    is_training: bool,
    class_map: Optional[Dict[str, int]],
    decoder: Decoder,
    **fields: Any,
) -> ReaderImages:
    place = f"dataset: {name}, split {split}, in {data_dir or 'its cache'}"
    reader = _create(place, name, data_dir, split, **fields).reader
    from pyarrow import ArrowException  # comes with `datasets`
    from pyarrow.compute import struct_field

    _check_one_field(reader.target_keys)
    table, label = reader.dataset.data, f"{name} {split}"
    names = list(table.column_names)
    if table.column(reader.image_key).null_count == len(reader):  # the cast to images adds a missing field
        names.remove(reader.image_key)
        raise UserError(f"input_key: {name} has no images in field {reader.image_key!r}; fields: {', '.join(names)}")
    field, *inner = [reader.label_key] if reader.label_key in names else reader.label_key.split("/")
    if field not in names:
        raise UserError(f"target_key: {name} has no field {reader.label_key!r}; fields: {', '.join(names)}")
    try:
        column = struct_field(table.column(field), inner) if inner else table.column(field)
    except ArrowException as error:
        raise UserError(f"target_key: {name}: {reader.label_key!r}: {one_line(error)}") from None
    classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get) or None
    return ReaderImages(reader, label, labels_of_column(column, label, classes, class_map, is_training), decoder)


def _open_stream(
    name: str,
    data_dir: str,
    split: str,
    is_training: bool,
    class_map: Optional[Dict[str, int]],
    decoder: Decoder,
    **options: Any,
) -> StreamSet:
    if not data_dir:
        raise UserError(f"data_dir: {name} needs the folder of its shards")
    place = f"dataset: {name}, split {split}, in {data_dir}"
    dataset = _create(place, name, data_dir, split, is_training=is_training, **options)
    _check_one_field(dataset.reader.target_keys)
    stream = StreamSet(dataset, Labels(place, None, class_map), decoder)
    root = Path(data_dir)
    shards = stream.reader.split_info.filenames if root.is_dir() else ()  # shards may be remote
    for shard in () if "tar" in split else shards:  # names of its _info.json, which may come from anyone
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise UserError(f"{root}: {shard}: this shard of {name} is outside of the folder; correct its _info.json")
    missing = [shard for shard in shards if not (root / shard).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{root / missing[0]}{more}: no such shard of {name}, split {split}")
    if not is_training and not len(stream):
        raise UserError(f"val_num_samples: {name}, split {split}: unknown number of images; pass it")
    return stream


def _check_one_field(target_keys: Optional[Sequence[str]]) -> None:
    if target_keys:
        raise UserError(
            f"target_key: {','.join(target_keys)}: several fields; an image has one class, so pass one field"
        )


def _open_folder(
    data_dir: str, split: str, is_training: bool, class_map: Optional[Dict[str, int]], decoder: Decoder
) -> ReaderImages:
    if not data_dir:
        raise UserError(
            "data_dir: no dataset given; pass its folder (train.py DIR), or --dataset digits for a quick try"
        )
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(f"data_dir: {root}: no such folder")
    survey = Survey(split_folder(root, split))
    folder = str(survey.folder)
    if class_map is None:
        survey.check_class_folders()
        survey.check_depth()
        targets = {name: target for target, name in enumerate(survey.counts)}
    else:
        survey.check_listed()
        compare_with_folders(class_map, survey.counts, survey.folder, is_training)
        targets = class_map
    samples = survey.samples(targets)
    if not samples:
        raise UserError(f"{folder}: no images; expected one folder of .jpg or .png images per class")
    survey.warn_of_left_out()
    return ReaderImages(FileReader(samples), folder, Labels(folder, sorted(targets, key=targets.get)), decoder)


def check_several_classes(images: Images, place: str) -> None:
    """Raise UserError for a single class, because accuracy would always be 100 %."""
    if images.classes is not None and len(images.classes) == 1:
        name = f"{getattr(images, 'label', place)}: a single class, {images.classes[0]}"
        raise UserError(f"{name}: accuracy would always be 100 %; sort the images into two classes or more")


def expect_classes(images: Images, num_classes: int) -> None:
    """Set the number of classes of a dataset that does not tell it.

    Raises:
        UserError: there is a single class, or a label is too large. A stream raises it when it meets the label.
    """
    if num_classes == 1:
        raise UserError("num_classes: 1: accuracy would always be 100 %; expected two classes or more")
    if labels := getattr(images, "labels", None):
        labels.expect(num_classes)


def check_no_empty_files(images: Images) -> None:
    """Find empty validation files without opening any, because each would end the run at its first evaluation.

    Args:
        images: the validation set. Only datasets of one file per image are checked.

    Raises:
        UserError: names the first empty or missing file.
    """
    empty = [path for path in getattr(images, "files", ()) if not (os.path.isfile(path) and os.path.getsize(path))]
    if empty:
        more = f" (and {len(empty) - 1:,} more)" if len(empty) > 1 else ""
        raise UserError(
            f"{empty[0]}{more}: empty or missing validation image; replace or remove it; "
            f"`tnt-check` finds every damaged image of a dataset"
        )


def check_same_classes(
    ours: Optional[Sequence[str]], theirs: Optional[Sequence[str]], our_place: str, their_place: str
) -> None:
    """Check that targets mean the same in two places. Unknown class names (None) pass.

    Raises:
        UserError: names the classes that only one of them has.
    """
    if ours is None or theirs is None:
        return
    ours, theirs = list(map(class_name, ours)), list(map(class_name, theirs))
    if ours == theirs:
        return
    differences = []
    for place, here, there in ((our_place, ours, set(theirs)), (their_place, theirs, set(ours))):
        names = [name for name in here if name not in there]
        if names:
            differences.append(f"only {place} has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")
    what = "; ".join(differences) or "the order differs"
    raise UserError(f"{our_place} and {their_place} do not have the same classes: {what}")
