"""Accuracy against what it costs (paper, figure 4): published rows, and rows measured by whoever draws the figure.

A table has the columns model, top1 and source, and any of the costs. `published.csv` and `published_speed.csv` beside this
file hold the paper's rows.
"""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from tnt_timm.analysis import picture
from tnt_timm.analysis.tables import number, read_rows
from tnt_timm.errors import UserError

PUBLISHED = tuple(Path(__file__).parent / name for name in ("published.csv", "published_speed.csv"))
COSTS = {"gmacs": "FLOPs (billions of multiply-adds)", "params_m": "parameters (millions)", "images_per_s": "images/s"}
FAMILIES = ("TNT", "DeiT", "ViT", "T2T", "PVT", "ResNet", "RegNet", "EfficientNet")  # each has its own colour
MARKERS = "osD^vPX*<>"
# Of a name beside its point, the best first: how it is aligned, and its distance in points.
PLACES = [
    ("left", "center", (4, 0)),
    ("right", "center", (-4, 0)),
    ("center", "bottom", (0, 4)),
    ("center", "top", (0, -4)),
]
PLACES += [(across, "center", (x, y)) for y in (6, -6, 11, -11) for across, x in (("left", 4), ("right", -4))]


class Point(NamedTuple):
    """A model of a table."""

    model: str
    top1: float  # in percent
    costs: Dict[str, float]  # those that the table has
    source: str
    family: str  # '' for none of FAMILIES


def read(paths: Sequence[Path]) -> List[Point]:
    """The rows of tables that have an accuracy and any of the costs.

    Raises:
        UserError: a table that cannot be read, without a needed column, or with a row that does not say its source.
    """
    points = []
    for path in paths:
        for row in read_rows(path, ["model", "top1", "source"]):
            if not row["source"]:
                raise UserError(f"{path}: {row['model']}: says no source; every point needs one")
            top1 = number(row, "top1", path)
            costs = {name: value for name in COSTS if (value := number(row, name, path)) is not None}
            if top1 is not None and costs:
                points.append(Point(row["model"], top1, costs, row["source"], family_of(row["model"])))
    return points


def family_of(model: str) -> str:
    """Which of FAMILIES a model belongs to, by its name."""
    plain = model.lower()
    return next((name for name in FAMILIES if plain.startswith(name.lower())), "")


def numbers(points: Sequence[Point]) -> List[dict]:
    """A row per point."""
    return [
        dict(model=p.model, top1=p.top1, **{name: p.costs.get(name) for name in COSTS}, source=p.source) for p in points
    ]


def draw(points: Sequence[Point], costs: Sequence[str]) -> Any:
    """A panel per cost. Colours are families, markers are sources; the points of a family and source are joined.

    Raises:
        UserError: no row has one of the costs.
    """
    sources = list(dict.fromkeys(point.source for point in points))
    with picture.styled():
        figure = picture.new(picture.PAGE_IN if len(costs) > 1 else picture.COLUMN_IN * 1.4, 3.6)
        panels = dict(zip(costs, figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]))
        for cost, axes in panels.items():
            if not any(cost in point.costs for point in points):
                raise UserError(f"costs: {cost}: no row of the tables has it")
            _draw_panel(axes, [point for point in points if cost in point.costs], cost, sources)
        figure.axes[0].set_ylabel("ImageNet top-1 (%)")
        handles = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=2, frameon=False, handlelength=1
        )
        figure.draw_without_rendering()  # from here on the panels stay where they are, and places in pixels are known
        for cost, axes in panels.items():
            _write_names(axes, [point for point in points if cost in point.costs], cost)
    return figure


def _draw_panel(axes: Any, shown: Sequence[Point], cost: str, sources: Sequence[str]) -> None:
    for family in dict.fromkeys(point.family for point in shown):
        for source in sources:
            points = sorted((p.costs[cost], p.top1) for p in shown if (p.family, p.source) == (family, source))
            colour = _colour(family)
            if family and len(points) > 1:
                axes.plot(*zip(*points), color=colour, linewidth=0.7, alpha=0.5, zorder=1)
            for x, y in points:
                axes.scatter(x, y, s=16, color=[colour], marker=_marker(source, sources), linewidths=0, zorder=2)
    for source in dict.fromkeys(point.source for point in shown):
        axes.scatter([], [], s=16, color="grey", marker=_marker(source, sources), label=source)
    axes.set_xscale("log")
    axes.set_xlabel(COSTS[cost])
    axes.grid(True, which="both")
    axes.margins(0.16, 0.06)
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high > 8 * low else (1, 2, 3, 4, 6, 8)
    ticks = [step * 10**power for power in range(-2, 6) for step in steps if low <= step * 10**power <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _colour(family: str) -> Any:
    return dict(zip(FAMILIES, picture.colours(len(FAMILIES)))).get(family, "black")


def _marker(source: str, sources: Sequence[str]) -> str:
    return MARKERS[sources.index(source) % len(MARKERS)]


def _write_names(axes: Any, shown: Sequence[Point], cost: str) -> None:
    """Each name beside its point, where it covers least of other names and points."""
    from matplotlib.transforms import Bbox

    spots = [axes.transData.transform((point.costs[cost], point.top1)) for point in shown]
    taken: List[Any] = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in spots]
    for point in shown:
        text = axes.annotate(point.model, (point.costs[cost], point.top1), (0, 0), textcoords="offset points")
        text.set(fontsize=5.5, color=_colour(point.family), in_layout=False)

        def place(across: str, along: str, offset: Tuple[int, int], text: Any = text) -> Any:
            text.set(ha=across, va=along, position=offset)
            return text.get_window_extent()

        def covered(where: Tuple[str, str, Tuple[int, int]]) -> float:
            box = place(*where)
            inside = Bbox.intersection(box, axes.bbox)
            hidden = box.width * box.height - (inside.width * inside.height if inside is not None else 0)
            shared = [Bbox.intersection(box, other) for other in taken]
            return hidden + sum(part.width * part.height for part in shared if part is not None)

        taken.append(place(*min(PLACES, key=covered)))
