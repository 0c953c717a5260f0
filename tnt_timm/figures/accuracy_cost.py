"""Accuracy against what it costs (paper, figure 4): published rows, and rows measured by whoever draws the figure.

A table has the columns model, top1 and source, and any of the costs; `hardware` says what images/s were measured on. With
timm_name and image_size, FLOPs and parameters that nobody published are counted. `published.csv` and `published_speed.csv`
beside this file hold the papers' rows. What scripts/benchmark.py writes (`--output FILE.json`) is a table too.
"""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from tnt_timm.costs import benchmark_file, complexity
from tnt_timm.errors import UserError
from tnt_timm.figures import labels, picture
from tnt_timm.figures.tables import number, read_rows

PUBLISHED = tuple(Path(__file__).parent / name for name in ("published.csv", "published_speed.csv"))
COSTS = {"gmacs": "FLOPs (billions of multiply-adds)", "params_m": "parameters (millions)", "images_per_s": "images/s"}
COUNTED = ("gmacs", "params_m")  # those that `complexity.cost` knows
MEASURED = "images/s: scripts/benchmark.py; top-1: published"
FAMILIES = ("TNT", "DeiT", "ViT", "T2T", "PVT", "ResNet", "RegNet", "EfficientNet")  # each has its own colour
MARKERS = "osD^vPX*<>"


class Point(NamedTuple):
    """A model of a table."""

    model: str
    top1: float  # in percent
    costs: Dict[str, float]  # those that are known
    source: str
    hardware: str = ""  # that images/s were measured on
    calculated: Tuple[str, ...] = ()  # the costs that were counted here

    @property
    def family(self) -> str:
        """Which of FAMILIES it belongs to, by its name; '' for none."""
        return next((name for name in FAMILIES if self.model.lower().startswith(name.lower())), "")


def read(paths: Sequence[Path]) -> List[Point]:
    """The rows of tables that have an accuracy and any of the costs.

    Raises:
        UserError: a table that cannot be read, without a needed column, or with a row that does not say its source.
    """
    points = []
    for path in paths:
        points += _read_benchmark(path) if path.suffix == ".json" else _read_table(path)
    return points


def _read_table(path: Path) -> List[Point]:
    points = []
    for row in read_rows(path, ["model", "top1", "source"]):
        if not row["source"]:
            raise UserError(f"{path}: {row['model']}: says no source; every point needs one")
        top1 = number(row, "top1", path)
        costs = {name: value for name in COSTS if (value := number(row, name, path)) is not None}
        missing = [name for name in COUNTED if name not in costs]
        size = number(row, "image_size", path)
        calculated: Tuple[str, ...] = ()
        if missing and row.get("timm_name") and size:
            found = complexity.cost(row["timm_name"], int(size))
            costs |= {name: getattr(found, name) for name in missing}
            calculated = tuple(missing)
        if top1 is not None and costs:
            points.append(Point(row["model"], top1, costs, row["source"], row.get("hardware", ""), calculated))
    return points


def _read_benchmark(path: Path) -> List[Point]:
    """The models of a benchmark, with the accuracies that were published of them."""
    found = benchmark_file.read(path)
    if found.mode != "infer":
        raise UserError(f"{path}: measures training steps; the figure shows inference (benchmark.py --mode infer)")
    published = {(row.timm_name, row.image_size): row for row in complexity.published()}
    points = []
    for speed in found.speeds:
        row = published.get((speed.model.partition(".")[0], speed.img_size))
        if row is None or row.top1 is None:
            what = f"{speed.model}: nobody published its top-1 at {speed.img_size} pixels"
            raise UserError(f"{path}: {what}; give a row of it in a CSV file")
        counted = complexity.cost(row.timm_name, row.image_size)
        costs = {"gmacs": counted.gmacs, "params_m": counted.params_m, "images_per_s": speed.images_per_s}
        hardware = f"{found.hardware}, batch {speed.batch_size}"
        points.append(Point(row.model, row.top1, costs, MEASURED, hardware, COUNTED))
    return points


def numbers(points: Sequence[Point]) -> List[dict]:
    """A row per point."""
    return [
        dict(
            model=p.model,
            top1=p.top1,
            **{name: round(p.costs[name], 3) if name in p.costs else None for name in COSTS},
            hardware=p.hardware,
            source=p.source,
            calculated=" ".join(p.calculated),
        )
        for p in points
    ]


# ---------------------------------------------------------------------------------------------------------- as a picture


class Panel(NamedTuple):
    """The points that have a cost; images per second on one kind of hardware."""

    cost: str
    label: str
    points: List[Point]


def panels(points: Sequence[Point], costs: Sequence[str]) -> List[Panel]:
    """A panel per cost, of images/s one per hardware.

    Raises:
        UserError: no row has one of the costs.
    """
    found = []
    for cost in costs:
        having = [point for point in points if cost in point.costs]
        if not having:
            raise UserError(f"costs: {cost}: no row of the tables has it")
        for hardware in dict.fromkeys(point.hardware if cost == "images_per_s" else "" for point in having):
            of_it = [point for point in having if cost != "images_per_s" or point.hardware == hardware]
            # The same model with the same accuracy, from another table, is the same point: the first one is drawn.
            once: Dict[Tuple[str, float], Point] = {}
            for point in of_it:
                once.setdefault((point.model, point.top1), point)
            found.append(Panel(cost, f"{COSTS[cost]}, {hardware}" if hardware else COSTS[cost], [*once.values()]))
    return found


def draw(points: Sequence[Point], costs: Sequence[str]) -> Any:
    """Colours are families, markers are sources, hollow is counted here; the points of a family and source are joined.

    Raises:
        UserError: no row has one of the costs.
    """
    shown = panels(points, costs)
    sources = list(dict.fromkeys(point.source for point in points if any(point in panel.points for panel in shown)))
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    with picture.styled():
        figure = picture.new(picture.PAGE_IN if columns > 1 else picture.COLUMN_IN * 1.4, 3.0 * rows + 0.6)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        lines = [_draw_panel(axes, panel, sources) for axes, panel in zip(grid, shown)]
        for axes in figure.axes[len(shown) :]:
            axes.set_axis_off()
        for axes in figure.axes[0 : len(shown) : columns]:
            axes.set_ylabel("ImageNet top-1 (%)")
        _write_legend(figure, shown, sources)
        for _ in range(2):  # the second time moves the panels a little
            figure.draw_without_rendering()
        figure.set_layout_engine("none")  # from here on they stay where they are, and places in pixels are known
        for axes, panel, joined in zip(figure.axes, shown, lines):
            names = [labels.Label(p.model, (p.costs[panel.cost], p.top1), _colour(p.family)) for p in panel.points]
            labels.write(axes, names, joined, fontsize=5.8)
    return figure


def _draw_panel(axes: Any, panel: Panel, sources: Sequence[str]) -> List[List[Tuple[float, float]]]:
    """Points, axes, and the lines that join points, which are returned."""
    lines = []
    for family in dict.fromkeys(point.family for point in panel.points):
        for source in sources:
            points = [p for p in panel.points if (p.family, p.source) == (family, source)]
            places = sorted((p.costs[panel.cost], p.top1) for p in points)
            colour = _colour(family)
            if family and len(places) > 1:
                axes.plot(*zip(*places), color=colour, linewidth=0.7, alpha=0.5, zorder=1)
                lines.append(places)
            for p in points:
                hollow = panel.cost in p.calculated
                axes.scatter(
                    p.costs[panel.cost], p.top1, s=14, marker=_marker(source, sources), linewidths=0.8,
                    facecolors="white" if hollow else [colour], edgecolors=[colour], zorder=2,
                )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(panel.label)
    axes.grid(True, which="both")
    axes.margins(0.2, 0.1)
    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high > 8 * low else (1, 2, 3, 4, 6, 8)
    ticks = [step * 10**power for power in range(-2, 6) for step in steps if low <= step * 10**power <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    axes.set_ylim(axes.get_ylim())
    return lines


def _write_legend(figure: Any, shown: Sequence[Panel], sources: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    def sign(marker: str, filled: bool) -> Any:
        fill = "grey" if filled else "white"
        return Line2D([], [], linestyle="", marker=marker, markersize=4, markerfacecolor=fill, markeredgecolor="grey")

    entries = {source: sign(_marker(source, sources), True) for source in sources}
    if any(panel.cost in point.calculated for panel in shown for point in panel.points):
        entries["hollow: calculated here (scripts/complexity.py)"] = sign("o", False)
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=2, frameon=False, handlelength=1
    )


def _colour(family: str) -> Any:
    return dict(zip(FAMILIES, picture.colours(len(FAMILIES)))).get(family, "black")


def _marker(source: str, sources: Sequence[str]) -> str:
    return MARKERS[sources.index(source) % len(MARKERS)]
