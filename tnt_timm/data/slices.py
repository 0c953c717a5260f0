"""Parts of a split by position, such as `train[:12000]` and `train[-4000:]`, in the notation of Hugging Face datasets."""

import re
from typing import Any, List, NamedTuple, Optional, Tuple

from PIL import Image

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
        targets = whole.targets
        if missing := set(targets) - {targets[position] for position in positions}:
            raise UserError(
                f"split: {part.text}: holds no image of {len(missing)} of the {len(set(targets))} classes, because this "
                f"dataset is sorted by class or the slice is short; choose another slice"
            )

    def __len__(self) -> int:
        return len(self.positions)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        return self.whole.load(self.positions[index])

    def name(self, index: int) -> str:
        return self.whole.name(self.positions[index])
