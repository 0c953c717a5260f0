"""The one style of all figures, and how a figure is saved: the picture, and the numbers that it shows beside it."""

import csv
import io
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from tnt_timm import files
from tnt_timm.errors import ConfigError, UserError

PAGE_IN = 6.9  # width of a figure over both columns of a paper, in inches
COLUMN_IN = 3.35  # of one column
SUFFIXES = (".png", ".svg")
MAPS = "viridis"  # colours of feature maps and attention
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.grid": False,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    "lines.linewidth": 1.2,
    "image.interpolation": "nearest",
    "svg.fonttype": "path",
    "svg.hashsalt": "tnt-timm",  # the same figure is the same file
    "figure.constrained_layout.use": True,
}
Numbers = Union[Mapping[str, Any], Sequence[Mapping[str, Any]]]  # arrays by name, or rows of a table


def check_path(path: Path) -> None:
    """Find out before the slow part whether there can be a picture.

    Raises:
        ConfigError: neither PNG nor SVG.
        UserError: matplotlib is not installed, or the folder cannot be made.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"output: {path}: expected a name that ends with {' or '.join(SUFFIXES)}")
    _matplotlib()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {path.parent}: cannot be made: {error.strerror}") from None


def new(width_in: float, height_in: float) -> Any:
    """An empty matplotlib Figure; without pyplot, so there is no window and no global state."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width_in, height_in), layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)  # attaches itself; with it, texts know their size at once
    return figure


def styled() -> Any:
    """A context in which axes and texts that are made have the style."""
    return _matplotlib().rc_context(STYLE)


def save(figure: Any, path: Path, numbers: Numbers, dpi: int = 200) -> Path:
    """Write the picture, and its numbers beside it: arrays into .npz, rows of a table into .csv.

    Returns:
        The path of the numbers.

    Raises:
        UserError: a file cannot be written.
    """
    more = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"pil_kwargs": {"optimize": True}}
    with styled():
        files.replace(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi, **more))
    if isinstance(numbers, Mapping):
        beside = path.with_suffix(".npz")
        files.replace(beside, lambda file: np.savez_compressed(file, **numbers))
    else:
        beside = path.with_suffix(".csv")
        files.replace_text(beside, _csv_text(list(numbers)))
    return beside


def _csv_text(rows: List[Mapping[str, Any]]) -> str:
    columns: Dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show_map(axes: Any, values: np.ndarray, title: str = "", limits: Optional[Tuple[float, float]] = None) -> None:
    """A map (h, w) or an RGB image (h, w, 3) without ticks; `limits` are the values of the darkest and brightest colour."""
    low, high = limits or (None, None)
    axes.imshow(values, cmap=MAPS, vmin=low, vmax=high)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    if title:
        axes.set_title(title, pad=3)


def write_caption(figure: Any, text: str) -> None:
    """Below the panels, in lines that fit the width."""
    characters = int(figure.get_figwidth() * 17)
    figure.supxlabel("\n".join(textwrap.wrap(text, characters)), fontsize=7)


def colours(count: int) -> List[Any]:
    """As many colours, apart from each other as far as they can be."""
    colormaps = _matplotlib().colormaps
    if count <= 20:
        return list(colormaps["tab10" if count <= 10 else "tab20"].colors[:count])
    return list(colormaps["turbo"](np.linspace(0, 1, count)))


def mosaic(maps: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Maps (n, h, w) side by side in one array, with gaps of NaN, which matplotlib leaves white."""
    n, h, w = maps.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap), np.nan, dtype=np.float32)
    for number, values in enumerate(maps):
        top, left = (number // columns) * (h + gap), (number % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = values
    return sheet


def _matplotlib() -> Any:
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError:
        raise UserError("a package is missing: matplotlib; pip install '.[figures]' brings it") from None
    return matplotlib
