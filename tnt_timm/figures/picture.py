"""Shared look of all figures: style, grids of images, legends, and saving a picture with its numbers."""

import contextlib
import csv
import io
import itertools
import textwrap
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple, Union

import numpy as np

from tnt_timm import atomic_files
from tnt_timm.errors import UserError
from tnt_timm.figures import lettering

PAGE_IN = 6.9  # width of a figure over both columns of a paper, in inches
COLUMN_IN = 3.35  # width of one column
LETTERS_PT, SMALLEST_PT = 8, 5.5
STYLE = {
    "font.size": LETTERS_PT,
    "axes.titlesize": LETTERS_PT,
    "axes.titlepad": 3,
    "figure.titlesize": LETTERS_PT,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "image.interpolation": "nearest",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.05,
    "text.parse_math": False,  # a class may be called US$1_$5
    "svg.hashsalt": "tnt-timm",  # the same figure is the same file
}
Numbers = Union[Mapping[str, Any], Sequence[Mapping[str, Any]]]  # arrays by name, or rows of a table
Drawn = Tuple[Any, Numbers]  # a matplotlib Figure, and the numbers that it shows


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Return a context in which figures are drawn and saved in the shared style. Raise UserError without matplotlib."""
    try:
        import matplotlib
        import textalloc  # noqa: F401
    except ImportError as error:
        raise UserError(f"a package is missing: {error.name}; pip install '.[figures]' brings it") from None
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # `lettering.choose_fonts` says what to do
        yield


def new(width_in: float, height_in: float) -> Any:
    """Return an empty figure. Saving crops it, so a height that is too large does no harm."""
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    return Figure((width_in, height_in), layout="compressed")


def wrapped(text: str, width_in: float, letters_pt: float = LETTERS_PT) -> str:
    """Break the lines of a text so that they fit a width in inches."""
    letters = max(1, int(width_in * 72 / (0.6 * letters_pt)))  # a letter is about 0.6 as wide as high
    return "\n".join(textwrap.fill(line, letters, break_on_hyphens=False) for line in lettering.shown(text).split("\n"))


def write_heading(figure: Any, text: str) -> None:
    """Write a text above all panels."""
    figure.suptitle(wrapped(text, figure.get_figwidth()))


def write_legend(figure: Any, entries: Mapping[str, Dict[str, Any]]) -> None:
    """Write texts, each with a line or marker of some properties, below the panels. The figure grows by their height."""
    from matplotlib.lines import Line2D

    columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.05 * max(map(len, entries)) + 0.55))))
    figure.set_figheight(figure.get_figheight() + 0.15 * -(-len(entries) // columns))
    handles = [Line2D([], [], label=lettering.legend_name(text), **properties) for text, properties in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def colours(count: int) -> List[Any]:
    """Return that many colours, as different as possible."""
    from matplotlib import colormaps

    return list(colormaps["tab10"].colors[:count] if count <= 10 else colormaps["turbo"](np.linspace(0, 1, count)))


class Panel(NamedTuple):
    """An image (h, w, 3) or a map (h, w) in a grid."""

    values: np.ndarray
    title: str = ""
    side: str = ""  # text on the left
    frames: Sequence[Tuple[float, float, float, float]] = ()  # left, top, width, height in pixels of the image


def draw_grid(columns: Sequence[Sequence[Panel]], heading: str, most_in: float = PAGE_IN) -> Any:
    """Draw columns of panels. All have the same height, at most `most_in`; each map has its own colour range."""
    widths = [max(panel.values.shape[1] / panel.values.shape[0] for panel in column) for column in columns]
    rows = max(map(len, columns))
    height_in = min(most_in, PAGE_IN / sum(widths))
    letters_pt = max(SMALLEST_PT, min(LETTERS_PT, 12 * height_in))
    figure = new(height_in * sum(widths), rows * (height_in + 0.5) + 1)
    cells = figure.add_gridspec(rows, len(columns), width_ratios=widths)
    for x, column in enumerate(columns):
        for y, panel in enumerate(column):
            axes = figure.add_subplot(cells[y, x], xticks=[], yticks=[])
            axes.imshow(panel.values, cmap="viridis")
            axes.spines[:].set_visible(False)
            axes.set_title(wrapped(panel.title, height_in * widths[x], letters_pt), fontsize=letters_pt)
            axes.set_ylabel(panel.side, fontsize=letters_pt)
            for frame in panel.frames:
                _draw_frame(axes, *frame)
    write_heading(figure, heading)
    return figure


def _draw_frame(axes: Any, left: float, top: float, width: float, height: float) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor="red", clip_on=False)
    frame.set_path_effects([withStroke(linewidth=2.2, foreground="white")])  # visible on an image of any colour
    axes.add_patch(frame)


def mosaic(maps: np.ndarray, columns: int) -> np.ndarray:
    """Join maps (n, h, w) in one array, with gaps of NaN, which matplotlib leaves white."""
    n, h, w = maps.shape
    gap, rows = max(1, w // 16), -(-n // columns)
    sheet = np.full((rows * columns, h + gap, w + gap), np.nan, np.float32)
    sheet[:n, :h, :w] = maps
    sheet = sheet.reshape(rows, columns, h + gap, w + gap).swapaxes(1, 2)
    return sheet.reshape(rows * (h + gap), columns * (w + gap))[:-gap, :-gap]


def save(figure: Any, path: Path, numbers: Numbers, dpi: int = 200) -> Path:
    """Write a picture, and its numbers next to it: arrays to .npz, rows to .csv. Return the path of the numbers.

    Raise UserError if a file cannot be written.
    """
    lettering.choose_fonts(figure)
    more = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"pil_kwargs": {"optimize": True}}
    atomic_files.replace(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi, **more))
    if isinstance(numbers, Mapping):
        numbers_path = path.with_suffix(".npz")
        atomic_files.replace(numbers_path, lambda file: np.savez_compressed(file, **numbers))
    else:
        numbers_path, text = path.with_suffix(".csv"), io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(itertools.chain(*numbers))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(numbers)
        atomic_files.replace_text(numbers_path, text.getvalue())
    return numbers_path
