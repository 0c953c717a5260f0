"""Parts of a split by position, such as `train[:12000]` and `train[-4000:]`, in the notation of Hugging Face datasets."""

import re
from typing import Any, List, NamedTuple, Optional, Tuple, Union

from PIL import Image
from torch import Tensor

from tnt_timm.errors import UserError

NOTATION = re.compile(r"(?P<base>[^\[\]]+)\[(?P<first>-?\d*):(?P<last>-?\d*)\]")


class Slice(NamedTuple):
    """Positions of a split; None is its start or end, negative numbers count from the end."""

    text: str  # as typed
    first: Optional[int]
    last: Optional[int]


def read_slice(split: str) -> Tuple[str, Slice]:
    """Return the name of the split, and the slice of it.

    Raises:
        UserError: the brackets do not hold a slice.
    """
    found = NOTATION.fullmatch(split)
    try:
        first, last = (int(found[key]) if found[key] else None for key in ("first", "last"))
    except (TypeError, ValueError):
        raise UserError(
            f"split: {split!r}: expected whole numbers, as in train[:1000], train[1000:] or train[-1000:]"
        ) from None
    return found["base"], Slice(split, first, last)


class SplitPart:
    """Some images of a dataset with random access, as a dataset of their own.

    Args:
        whole: the split.
        part: the slice of it.

    Raises:
        UserError: the split is shorter, the slice is empty, or it lacks a class that the split has.
    """

    def __init__(self, whole: Any, part: Slice):
        count = len(whole)
        positions = range(count)[part.first : part.last]
        if not positions or any(abs(bound) > count for bound in (part.first, part.last) if bound is not None):
            raise UserError(f"split: {part.text}: the split has {count:,} images; choose positions inside it")
        self.whole = whole
        self.positions = positions
        self.classes: Optional[List[str]] = whole.classes
        self.labels = getattr(whole, "labels", None)
        self.label = f"{getattr(whole, 'label', '')} {part.text[part.text.index('[') :]}".lstrip()
        self.split = part.text
        self.files: List[str] = list(getattr(whole, "files", ()))[positions.start : positions.stop]
        targets = whole.targets  # empty if the dataset does not hold them in memory
        if missing := set(targets) - {targets[position] for position in positions if targets}:
            raise UserError(
                f"split: {part.text}: holds no image of {len(missing)} of the {len(set(targets))} classes, because this "
                f"dataset is sorted by class or the slice is short; choose another slice"
            )

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, index: int) -> Tuple[Union[Image.Image, Tensor], int]:
        return self.whole.load(self.positions[index])

    def name(self, index: int) -> str:
        return self.whole.name(self.positions[index])


def check_disjoint(train: Any, validation: Any) -> None:
    """Raise UserError if training and validation images are two slices of a split that share images.

    The same text for both is no mistake: some people try first whether a model can learn its training images by heart.
    """
    parts = [part for part in (train, validation) if isinstance(part, SplitPart)]
    wholes = [getattr(part, "whole", part).split for part in (train, validation) if hasattr(part, "split")]
    if not parts or len(set(wholes)) != 1 or len(wholes) != 2 or train.split == validation.split:
        return
    first, second = (getattr(part, "positions", range(len(part))) for part in (train, validation))
    shared = min(first.stop, second.stop) - max(first.start, second.start)
    if shared > 0:
        raise UserError(
            f"val_split: {validation.split}: {shared:,} of its {len(validation):,} images are training images as well "
            f"(train_split: {train.split}); choose parts that share none"
        )
