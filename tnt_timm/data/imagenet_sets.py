"""Map ImageNet's other test sets, as unpacked, to the classes of ImageNet-1k.

- imagenet-v2 (arXiv 1902.10811): the folders are class indices, 0 to 999, so their names in order are not the classes.
- imagenet-a (arXiv 1907.07174), imagenet-r (arXiv 2006.16241): folders of 200 of the synsets; only these logits count.
- imagenet-real (arXiv 2006.07159): the validation images, each with any number of right classes; those with none are left out.

The lists of classes and labels are timm's.
"""

import pkgutil
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from tnt_timm.data.decoding import read_image
from tnt_timm.data.folders import SPLIT_FOLDERS, Survey
from tnt_timm.errors import UserError

NAMES = ("imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-real")
NUM_REAL = 50_000  # validation images of ImageNet-1k


class LabelledFiles:
    """Image files and their targets, a `data.datasets.ImageSet`."""

    classes = None

    def __init__(self, samples: Sequence[Tuple[str, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        path, target = self.samples[index]
        return read_image(path), target

    def name(self, index: int) -> str:
        return self.samples[index][0]

    @property
    def files(self) -> List[str]:
        return [path for path, _ in self.samples]


class ImageNetSet(NamedTuple):
    """A test set for models of ImageNet-1k."""

    images: LabelledFiles
    columns: Optional[List[int]] = None  # the logits that count, in the order of the targets; None means all
    labels: Optional[Tensor] = None  # (images, 1000), bool: all right classes of an image, whose target is its row


def synsets() -> List[str]:
    """Return the thousand classes in the order of the logits."""
    return ImageNetInfo().label_names()


def class_indices(name: str) -> List[int]:
    """Return the logits of the classes of imagenet-a or imagenet-r."""
    listed = pkgutil.get_data("timm.data", f"_info/{name.replace('-', '_')}_indices.txt").decode()
    return [int(index) for index in listed.split()]


def open_imagenet_set(name: str, folder: Path) -> ImageNetSet:
    """Open one of NAMES.

    Args:
        name: of the set.
        folder: of the class folders. For imagenet-real, ImageNet's folder (with `val` in it) or that of the images.

    Raises:
        UserError: the folder has another layout, other classes, or no images.
    """
    if not folder.is_dir():
        raise UserError(f"data_dir: {folder}: no such folder")
    if name == "imagenet-real":
        return _open_real(folder)
    if name == "imagenet-v2":
        return ImageNetSet(_class_folders(name, folder, {str(index): index for index in range(1000)}))
    columns, labels = class_indices(name), synsets()
    targets = {labels[column]: target for target, column in enumerate(columns)}
    return ImageNetSet(_class_folders(name, folder, targets), columns)


def _class_folders(name: str, folder: Path, targets: Dict[str, int]) -> LabelledFiles:
    survey = Survey(folder)
    survey.check_listed()
    missing, unknown = targets.keys() - survey.counts.keys(), survey.counts.keys() - targets.keys()
    for what, labels in (("holds no images of", missing), ("has folders that are none of its classes:", unknown)):
        if labels:
            first = ", ".join(label or "images outside of any folder" for label in sorted(labels)[:3])
            more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
            raise UserError(f"{folder}: {name}: {what} {first}{more}; pass the folder of its {len(targets)} classes")
    survey.check_depth()
    survey.warn_of_left_out()
    return LabelledFiles([(path, targets[label]) for path, label in survey.images()])


def _open_real(folder: Path) -> ImageNetSet:
    folder = next((folder / name for name in SPLIT_FOLDERS["validation"] if (folder / name).is_dir()), folder)
    known = RealLabelsImagenet(range(NUM_REAL)).real_labels
    samples: List[Tuple[str, int]] = []
    right: List[Tensor] = []
    survey = Survey(folder)
    survey.check_listed()
    for path, _ in survey.images():
        match = re.match(r"ILSVRC2012_val_\d{8}", Path(path).name)
        classes = known.get(f"{match[0]}.JPEG") if match else None
        if classes is None:
            raise UserError(f"{path}: imagenet-real knows only ILSVRC2012_val_00000001.JPEG to ..._{NUM_REAL:08}.JPEG")
        if classes:
            samples.append((path, len(samples)))
            right.append(torch.zeros(1000, dtype=torch.bool).index_fill(0, torch.tensor(classes), True))
    if not samples:
        raise UserError(f"{folder}: no validation images of ImageNet")
    survey.warn_of_left_out()
    return ImageNetSet(LabelledFiles(samples), labels=torch.stack(right))
