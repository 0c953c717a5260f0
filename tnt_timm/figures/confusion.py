"""A confusion matrix, from a CSV of counts: a row per true class, a column per predicted one, named in row and column 1."""

from pathlib import Path
from typing import Any, List, NamedTuple

import numpy as np

from tnt_timm.errors import UserError
from tnt_timm.figures import picture
from tnt_timm.figures.tables import read_lines

MOST_NAMED = 40  # classes whose names are still readable
MOST_WRITTEN = 20  # classes whose counts are


class Confusion(NamedTuple):
    """Counts (n, n) of true (row) and predicted (column) classes."""

    classes: List[str]
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Of each true class, the share of its images; 0 where there are none."""
        return self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * np.trace(self.counts) / max(1, self.counts.sum())


def read(path: Path) -> Confusion:
    """The matrix in a CSV file.

    Raises:
        UserError: not square, classes named differently in row and column, or cells that are no counts.
    """
    header, *rows = read_lines(path)
    classes = header[1:]
    if [row[0] for row in rows] != classes:
        raise UserError(f"{path}: the first row and the first column do not name the same classes in the same order")
    for name, row in zip(classes, rows):
        if len(row) != len(header):
            raise UserError(f"{path}: class {name}: {len(row) - 1} counts for {len(classes)} classes")
        wrong = [cell for cell in row[1:] if not cell.isdecimal()]
        if wrong:
            raise UserError(f"{path}: class {name}: {wrong[0]!r} is not a count")
    if not classes:
        raise UserError(f"{path}: names no classes")
    return Confusion(classes, np.array([[int(cell) for cell in row[1:]] for row in rows]))


def numbers(matrix: Confusion) -> List[dict]:
    """A row per pair of classes that occurs."""
    return [
        {
            "true": matrix.classes[row],
            "predicted": matrix.classes[column],
            "count": int(matrix.counts[row, column]),
            "share_of_true": round(float(matrix.shares[row, column]), 6),
        }
        for row, column in zip(*np.nonzero(matrix.counts))
    ]


def draw(matrix: Confusion) -> Any:
    """Coloured by the share of the true class; counts are written while there is room for them."""
    count = len(matrix.classes)
    with picture.styled():
        size = min(picture.PAGE_IN, max(picture.COLUMN_IN, 0.25 * count + 1))
        figure = picture.new(size, size * 0.92)
        axes = figure.subplots()
        drawn = axes.imshow(matrix.shares, cmap="Blues", vmin=0, vmax=1)
        if count <= MOST_NAMED:
            upright = max(map(len, matrix.classes)) > 2
            axes.set_xticks(range(count), matrix.classes, rotation=90 if upright else 0)
            axes.set_yticks(range(count), matrix.classes)
        for row, column in zip(*np.nonzero(matrix.counts)) if count <= MOST_WRITTEN else ():
            colour = "white" if matrix.shares[row, column] > 0.5 else "black"
            axes.text(column, row, matrix.counts[row, column], ha="center", va="center", color=colour, fontsize=6)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{matrix.accuracy:.2f} % of {matrix.counts.sum():,} images are right")
        figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the true class")
    return figure
