"""Turn the labels that a dataset stores into class indices, or say which sample has none."""

import logging
import re
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from tnt_timm.data.class_maps import nearest
from tnt_timm.data.folders import class_name, class_order
from tnt_timm.errors import UserError

_logger = logging.getLogger(__name__)

NUMBER = re.compile(r"[+-]?\d+")
NO_LABEL = ("", "-1")


class Labels:
    """The classes of a dataset, and the index of each label.

    Args:
        place: of the dataset, for messages.
        classes: names of the integer labels, where known.
        by_name: index of each class, of a class map or of text labels. By default, a label is an index. Without `classes`,
            an integer is an index of the class map too, unless all names of the map are numbers.
    """

    def __init__(
        self, place: str, classes: Optional[Sequence[str]] = None, by_name: Optional[Mapping[str, int]] = None
    ):
        names = None if classes is None else [class_name(name) for name in classes]
        self.source = names or []  # names of the integer labels
        self.place = place
        self.by_name = by_name
        self.by_number: Optional[Dict[int, int]] = None  # by default, an integer is an index
        if by_name is not None:
            if names is not None:
                self.by_number = {number: by_name[name] for number, name in enumerate(names) if name in by_name}
            elif all(map(NUMBER.fullmatch, by_name)):
                self.by_number = {int(name): index for name, index in by_name.items()}
            names = sorted(by_name, key=by_name.get)
        self.classes: Optional[List[str]] = names  # in the order of the indices
        self.num_classes = None if names is None else len(names)
        self.range: Optional[Tuple[int, int]] = None  # lowest and highest index, if all labels have been read

    def index(self, label: Any, sample: Callable[[], str]) -> int:
        """Return the index of a label.

        Args:
            label: as stored: a number, a text or its bytes. Scalars of NumPy and PyTorch count as numbers, and so do whole
                floats and booleans.
            sample: returns the name of the sample.

        Raises:
            UserError: it is not the label of one class.
        """
        if getattr(label, "ndim", None) == 0:
            label = label.item()
        label = _plain(label)
        if isinstance(label, bytes):
            label = label.decode("utf-8", "backslashreplace").strip()
        try:
            return self._of_text(label) if isinstance(label, str) else self._of_number(label)
        except ValueError as error:
            shown = " ".join(repr(label).split())
            name = f" ({self.source[label]})" if type(label) is int and 0 <= label < len(self.source) else ""
            raise UserError(f"{sample()}: label {shown:.60}{name}: {error}") from None

    def _of_text(self, label: str) -> int:
        name = class_name(label)
        if self.by_name is not None and name in self.by_name:
            return self.by_name[name]
        if label.strip() in NO_LABEL:
            raise ValueError("expected a class; remove samples without a label")
        if NUMBER.fullmatch(label.strip()):
            return self._of_number(int(label))
        if self.by_name is None:
            raise ValueError("a text, expected a class index; pass --class-map FILE.txt with one class per line")
        raise ValueError(self._not_in_map(name))

    def _of_number(self, label: Any) -> int:
        if label is None:
            raise ValueError("expected the index of one class; remove samples without a label")
        if type(label) is not int:
            raise ValueError(f"{type(label).__name__}, expected the index of one class, a whole number")
        if self.by_number is not None:
            if label not in self.by_number:
                known = 0 <= label < len(self.source)
                raise ValueError(self._not_in_map(self.source[label] if known else str(label)))
            return self.by_number[label]
        if label < 0:
            raise ValueError("expected 0 or more; remove samples without a label")
        if self.num_classes is not None and label >= self.num_classes:
            raise ValueError(_too_large(label, self.num_classes))
        return label

    def _not_in_map(self, name: str) -> str:
        near = nearest(name, self.by_name)
        return f"not in the class map{f'; the nearest class is {near}' if near else ''}"

    def expect(self, num_classes: int) -> None:
        """Set the number of classes if the dataset does not tell it.

        Raises:
            UserError: a label is larger.
        """
        if self.classes is not None:
            return
        if self.range is not None and self.range[1] >= num_classes:
            lowest, highest = self.range
            what = _counts_from_1(highest) if lowest else f"label {highest}: {_too_large(highest, num_classes)}"
            raise UserError(f"{self.place}: {what}")
        self.num_classes = num_classes


def _plain(label: Any) -> Any:
    """Return a whole float (a column with a missing value becomes floats) or a boolean as the integer that it stands for."""
    return int(label) if isinstance(label, (bool, float)) and float(label).is_integer() else label


def _too_large(label: int, num_classes: int) -> str:
    hint = "; if the labels count from 1, subtract 1 from each" if label == num_classes else ""
    return f"expected 0 to {num_classes - 1} ({num_classes} classes){hint}"


def _counts_from_1(highest: int) -> str:
    return f"labels count from 1 to {highest}; subtract 1 from each, because classes count from 0"


def labels_of_column(
    column: Any, place: str, classes: Optional[Sequence[str]], class_map: Optional[Mapping[str, int]], is_training: bool
) -> Labels:
    """Check all labels of a table before any image is read.

    Text labels become classes in the order of class folders. So splits with the same texts have the same classes.

    Args:
        column: of the labels, a `pyarrow.ChunkedArray`.
        place: name of the dataset for messages.
        classes: names of integer labels, where known.
        class_map: index of each class.
        is_training: each class of the map needs samples.

    Raises:
        UserError: a label is not that of one class, or the map names a class without samples.
    """
    values = list(map(_plain, _distinct(column)))
    numbers = [value for value in values if type(value) is int]
    if class_map is None and any(isinstance(value, str) for value in values):
        texts = {class_name(text) for text in values if isinstance(text, str) and text.strip() not in NO_LABEL}
        by_name = {name: index for index, name in enumerate(sorted(texts, key=class_order))}
        labels = Labels(place, None, by_name)
    else:
        labels = Labels(place, classes, class_map)
        if class_map is None and classes and numbers and (min(numbers), max(numbers)) == (1, len(classes)):
            raise UserError(f"{place}: {_counts_from_1(max(numbers))}")
    found = {labels.index(value, lambda value=value: f"row {_row(column, value)} of {place}") for value in values}
    if found:
        labels.range = min(found), max(found)
    missing = [name for name, index in (class_map or {}).items() if index not in found]
    if missing:
        text = f"class_map: {place}: no samples of {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        if is_training:
            raise UserError(f"{text}; correct the name, or remove it from the map")
        _logger.info(f"warning: {text}")
    return labels


def _distinct(column: Any) -> List[Any]:
    """Return the distinct values in their order; of lists, only the first."""
    from pyarrow import ArrowNotImplementedError

    try:
        return column.unique().to_pylist()
    except ArrowNotImplementedError:
        return column.slice(0, 1).to_pylist()


def _row(column: Any, value: Any) -> int:
    """Return the number of the first row with a value, which may be NaN."""
    found = (row for row, item in enumerate(column) if (it := item.as_py()) == value or (it != it and value != value))
    return next(found)
