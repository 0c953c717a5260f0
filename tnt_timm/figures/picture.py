"""The one style of all figures, and how a figure is saved: the picture, and the numbers that it shows beside it."""

import csv
import functools
import io
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from tnt_timm import atomic_files
from tnt_timm.errors import ConfigError, UserError

PAGE_IN = 6.9  # width of a figure over both columns of a paper, in inches
COLUMN_IN = 3.35  # of one column
SUFFIXES = (".png", ".svg")
BESIDE = (".npz", ".csv")  # of the numbers: arrays, or rows of a table
SMALLEST = 5.5  # letters, in points
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


def check_path(path: Path, read: Sequence[Path]) -> None:
    """Find out before the slow part whether there can be a picture.

    Args:
        path: of the picture.
        read: the files that it is drawn from, which neither it nor its numbers may take the place of.

    Raises:
        ConfigError: neither PNG nor SVG, or one of the files that are read would be no more.
        UserError: matplotlib is not installed, or the folder cannot be made.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"output: {path}: expected a name that ends with {' or '.join(SUFFIXES)}")
    for file in (path, *map(path.with_suffix, BESIDE)):
        if any(file.exists() and given.exists() and file.samefile(given) for given in read):
            what = "it" if file == path else f"its numbers, {file},"
            raise ConfigError(f"output: {path}: {what} would take the place of what is read; choose another name")
    _matplotlib()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {path.parent}: cannot be made: {error.strerror}") from None


def new(width_in: float, height_in: float) -> Any:
    """An empty matplotlib Figure; without pyplot, so there is no window and no global state."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(
            figsize=(width_in, height_in), layout="compressed"
        )  # square maps close together
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
        atomic_files.replace(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi, **more))
    if isinstance(numbers, Mapping):
        beside = path.with_suffix(".npz")
        atomic_files.replace(beside, lambda file: np.savez_compressed(file, **numbers))
    else:
        beside = path.with_suffix(".csv")
        atomic_files.replace_text(beside, _csv_text(list(numbers)))
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


class Fitted(NamedTuple):
    """A text in lines that fit a width, and the size of its letters in points."""

    text: str
    size: float

    @property
    def height_in(self) -> float:
        return (self.text.count("\n") + 1) * self.size * 1.25 / 72


def fitted(text: str, width_in: float, size: float = STYLE["axes.titlesize"]) -> Fitted:
    """Break a text into lines of about one length. A word that is too wide makes the letters smaller; the smallest break it.

    Args:
        text: lines of it are kept apart.
        width_in: of the column that it stands in.
        size: of the letters in points.
    """
    within = 0.9 * width_in  # few dots per inch make letters wider, as each takes whole dots
    words = text.replace("\n", " ").split(" ")  # a NO-BREAK SPACE keeps a number with what it counts
    widest = max(_width_in(word, size) for word in words)
    size = max(SMALLEST, min(size, size * within / widest)) if widest else size
    return Fitted("\n".join(_broken(line, within, size) for line in text.split("\n")), size)


def _broken(line: str, width_in: float, size: float) -> str:
    def lines(characters: int) -> List[str]:
        return textwrap.wrap(line, characters, break_on_hyphens=False) or [""]

    longest = max(map(len, line.split(" ")))
    characters = max(1, len(line))
    while characters > 1 and any(_width_in(part, size) > 1.01 * width_in for part in lines(characters)):
        characters -= 1
    count = len(lines(characters))
    while characters > longest and len(lines(characters - 1)) == count:  # no last line of one word
        characters -= 1
    return "\n".join(lines(characters))


@functools.lru_cache(maxsize=1024)
def _width_in(text: str, size: float) -> float:
    _matplotlib()
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=size).get_extents().width / 72 if text.strip() else 0.0


def show_map(
    axes: Any, values: np.ndarray, title: Optional[Fitted] = None, limits: Optional[Tuple[float, float]] = None
) -> None:
    """A map (h, w) or an RGB image (h, w, 3) without ticks; `limits` are the values of the darkest and brightest colour."""
    low, high = limits or (None, None)
    axes.imshow(values, cmap=MAPS, vmin=low, vmax=high)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    if title:
        write_title(axes, title)


def write_title(axes: Any, title: Fitted) -> None:
    axes.set_title(title.text, fontsize=title.size, pad=3)


def write_heading(figure: Any, text: str) -> None:
    """Above all panels; the figure grows by its height."""
    heading = fitted(text, figure.get_figwidth())
    _grow(figure, heading.height_in)
    figure.suptitle(heading.text, fontsize=heading.size)


def write_caption(figure: Any, text: str) -> None:
    """Below the panels; the figure grows by its height."""
    caption = fitted(text, figure.get_figwidth(), 7)
    _grow(figure, caption.height_in)
    figure.supxlabel(caption.text, fontsize=caption.size)


def write_legend(figure: Any, lines: Sequence[Tuple[str, str, Any]]) -> None:
    """Below the panels, where it hides nothing: a text, a style and a colour per line. The figure grows by its height."""
    from matplotlib.lines import Line2D

    size = STYLE["legend.fontsize"]
    widest = max(_width_in(text, size) for text, _, _ in lines)
    columns = max(1, min(len(lines), int(figure.get_figwidth() / (widest + 0.6))))
    _grow(figure, -(-len(lines) // columns) * 1.4 * size / 72)
    handles = [Line2D([], [], linestyle=style, color=colour, label=text) for text, style, colour in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _grow(figure: Any, inches: float) -> None:
    figure.set_figheight(figure.get_figheight() + inches + 0.06)


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
