"""ImageNet's other test sets, as they come out of their archives: which image is which of ImageNet-1k's thousand classes.

- imagenet-v2 (arXiv 1902.10811): the folders are the classes' numbers, 0 to 999, so their names say nothing in their order;
- imagenet-a (arXiv 1907.07174), imagenet-r (arXiv 2006.16241): folders of 200 of the synsets; the other logits do not count;
- imagenet-real (arXiv 2006.07159): the validation images with any number of right classes; those without one do not count.

The lists of classes and labels are timm's.
"""

import logging
import pkgutil
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from tnt_timm.data.folders import SPLIT_FOLDERS, Survey, images_of
from tnt_timm.data.transforms import to_rgb
from tnt_timm.errors import UserError

_logger = logging.getLogger(__name__)

NAMES = ("imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-real")
NUM_REAL = 50_000  # validation images of ImageNet-1k


class LabelledFiles:
    """Image files and their targets, as `data.datasets.ImageSet`."""

    classes = None

    def __init__(self, samples: Sequence[Tuple[str, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        path, target = self.samples[index]
        with Image.open(path) as image:
            return to_rgb(image), target

    def name(self, index: int) -> str:
        return self.samples[index][0]


class ImageNetSet(NamedTuple):
    """A test set for models of ImageNet-1k."""

    images: LabelledFiles
    columns: Optional[List[int]] = None  # the logits that count, in the order of the targets; None is all of them
    labels: Optional[Tensor] = None  # (images, 1000), bool: all right classes of an image, whose target is its row


def synsets() -> List[str]:
    """The thousand classes, in the order of the logits."""
    return ImageNetInfo().label_names()


def open_imagenet_set(name: str, folder: Path) -> ImageNetSet:
    """One of NAMES.

    Args:
        name: of the set.
        folder: that holds the class folders; of imagenet-real, ImageNet's (with `val` in it) or that of the images.

    Raises:
        UserError: another layout, classes that are missing or not of the set, no images.
    """
    if not folder.is_dir():
        raise UserError(f"data_dir: {folder}: no such folder")
    if name == "imagenet-real":
        return _real(folder)
    if name == "imagenet-v2":
        return ImageNetSet(_class_folders(name, folder, {str(index): index for index in range(1000)}))
    columns = [int(index) for index in _listed(f"{name.replace('-', '_')}_indices.txt")]
    of_all = synsets()
    targets = {of_all[column]: target for target, column in enumerate(columns)}
    return ImageNetSet(_class_folders(name, folder, targets), columns)


def _listed(file: str) -> List[str]:
    return pkgutil.get_data("timm.data", f"_info/{file}").decode().split()


def _class_folders(name: str, folder: Path, targets: Dict[str, int]) -> LabelledFiles:
    survey = Survey(folder)
    for what, names in (
        ("holds no images of", targets.keys() - survey.counts.keys()),
        ("holds what is no class of it:", survey.counts.keys() - targets.keys()),
    ):
        if names:
            first = ", ".join(n or "images beside the class folders" for n in sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{folder}: {name}: {what} {first}{more}; give the folder of its {len(targets)} classes")
    for path in survey.deep.first:
        raise UserError(f"{path}: lies deeper than a class folder of {folder}; its class would be a guess, so move it")
    if survey.passed_over:
        _logger.info("warning: %s", survey.passed_over_text())
    return LabelledFiles([(path, targets[label]) for path, label in images_of(folder)])


def _real(folder: Path) -> ImageNetSet:
    found = [folder / split for split in SPLIT_FOLDERS["validation"] if (folder / split).is_dir()]
    folder = found[0] if found else folder
    known = RealLabelsImagenet(range(NUM_REAL)).real_labels
    kept: List[Tuple[str, List[int]]] = []
    for path, _ in images_of(folder):
        match = re.match(r"ILSVRC2012_val_\d{8}", Path(path).name)
        labels = known.get(f"{match[0]}.JPEG") if match else None
        if labels is None:
            raise UserError(f"{path}: imagenet-real knows only ILSVRC2012_val_00000001.JPEG to ..._{NUM_REAL:08}.JPEG")
        if labels:
            kept.append((path, labels))
    if not kept:
        raise UserError(f"{folder}: no validation images of ImageNet in there")
    right = torch.zeros(len(kept), 1000, dtype=torch.bool)
    for row, (_, labels) in enumerate(kept):
        right[row, labels] = True
    return ImageNetSet(LabelledFiles([(path, row) for row, (path, _) in enumerate(kept)]), labels=right)
