"""A confusion matrix, from a CSV of counts: a row per true class, a column per predicted class, with their names."""

from pathlib import Path
from typing import Any, List, Sequence, Tuple

import numpy as np

from tnt_timm.errors import UserError
from tnt_timm.figures import lettering, picture
from tnt_timm.figures.network import Output
from tnt_timm.figures.tables import read_rows

MOST_NAMED, MOST_WRITTEN = 40, 20  # classes up to which their names, and their counts, are readable


def draw_confusion(paths: Sequence[str], own: Output) -> picture.Drawn:
    """Draw a confusion matrix."""
    classes, counts = read(Path(paths[0]))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # of the images of each true class
    rows = [
        {"true": classes[i], "predicted": classes[j], "count": counts[i, j], "share_of_true": round(shares[i, j], 6)}
        for i, j in np.argwhere(counts)
    ]
    return draw(classes, counts, shares), rows


def read(path: Path) -> Tuple[List[str], np.ndarray]:
    """Return the classes, and the counts (n, n) of true (row) and predicted (column) ones.

    Raise UserError if rows and columns name different classes, or if a cell is not a count.
    """
    table = read_rows(path)
    classes, lines = list(table[0])[1:], [list(row.values()) for row in table]
    if [name for name, *_ in lines] != classes:
        raise UserError(f"{path}: the first row and the first column do not name the same classes in the same order")
    for name, *cells in lines:
        for cell in cells:
            if not cell.isdecimal():
                raise UserError(f"{path}: class {name}: {cell!r} is not a count")
    return classes, np.array([[int(cell) for cell in cells] for _, *cells in lines])


def draw(classes: Sequence[str], counts: np.ndarray, shares: np.ndarray) -> Any:
    """Draw the matrix, coloured by the share of the true class; counts are written where there is room."""
    count = len(classes)
    size_in = min(picture.PAGE_IN, max(picture.COLUMN_IN, 0.25 * count + 1))
    figure = picture.new(size_in, size_in)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= MOST_NAMED:
        names = list(map(lettering.shown, classes))
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(count), names)
    for row, column in np.argwhere(counts) if count <= MOST_WRITTEN else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=6)
    accuracy = 100 * np.trace(counts) / max(1, counts.sum())
    axes.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.2f} % of {counts.sum():,} images are right")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return figure
