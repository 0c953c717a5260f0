"""Accuracy against cost (paper, figure 4): published rows, and the user's own.

A table is a CSV with the columns model, top1 (%), source and any of the costs. `top1_error` draws an error bar of this half
width; `hardware` says where images/s were measured.
Rows with timm_name and image_size get FLOPs and parameters counted if the table lacks them. The JSON that
scripts/benchmark.py writes is a table too.
"""

import itertools
from pathlib import Path
from typing import Any, Dict, Iterator, List, Literal, NamedTuple, Sequence

from pydantic import Field

from tnt_timm.costs import benchmark_file, complexity
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures import lettering, picture
from tnt_timm.figures.network import Output
from tnt_timm.figures.tables import number, read_rows

# model; top1 and COSTS as numbers (None where unknown); hardware, source, calculated (names of COSTS); perhaps top1_error
Row = Dict[str, Any]
PUBLISHED = (complexity.PUBLISHED, complexity.PUBLISHED.with_name("published_speed.csv"))
COSTS = {"gmacs": "FLOPs (billions of multiply-adds)", "params_m": "parameters (millions)", "images_per_s": "images/s"}
COUNTED = ("gmacs", "params_m")  # the costs that `complexity.cost` counts
MEASURED = "images/s: scripts/benchmark.py; rest: published"
FAMILIES = ("TNT", "DeiT", "ViT", "T2T", "PVT", "ResNet", "RegNet", "EfficientNet", "PyramidTNT")  # one colour each
TICKS = ((1, 2, 5), (1, 2, 3, 4, 6, 8), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))  # coarse to fine
MARKERS = "osD^vPX*<>"
NAME_IN = 0.17  # height of a panel for each name in it
ORDERS = 10  # orders in which names are placed, until all find room


class AccuracyCostSettings(Output):
    """Accuracy against cost"""

    costs: List[Literal[tuple(COSTS)]] = Field(list(COSTS), min_length=1, description="panels to draw")
    published: bool = Field(True, description="show the paper's rows too; without, top-1 need not be ImageNet's")


class Panel(NamedTuple):
    """The rows that have a cost; images/s on one kind of hardware."""

    cost: str
    hardware: str
    rows: List[Row]


def draw_accuracy_cost(paths: Sequence[str], own: AccuracyCostSettings) -> picture.Drawn:
    """Draw top-1 against FLOPs, parameters and images/s (paper, figure 4)."""
    if not paths and not own.published:
        raise ConfigError("command line: no table to draw; give one, or leave --no-published out")
    rows = read([*(PUBLISHED if own.published else ()), *map(Path, paths)])
    return draw(rows, own.costs, "ImageNet top-1 (%)" if own.published else "top-1 (%)"), rows


def read(paths: Sequence[Path]) -> List[Row]:
    """Read the rows of tables that have an accuracy and at least one cost. Raise UserError if a table is not one."""
    rows = []
    for path in paths:
        for raw in _rows_of_benchmark(path) if path.suffix == ".json" else read_rows(path, ["model", "top1", "source"]):
            if not raw["source"]:
                raise UserError(f"{path}: {raw['model']}: names no source; every row needs one")
            costs, calculated = {name: number(raw, name, path) for name in COSTS}, []
            if raw.get("timm_name") and raw.get("image_size"):
                calculated = [name for name in COUNTED if costs[name] is None]
            if calculated:
                counted = complexity.cost(raw["timm_name"], int(raw["image_size"]))
                costs |= {name: round(getattr(counted, name), 3) for name in calculated}
            row = dict(model=raw["model"], top1=number(raw, "top1", path), **costs, hardware=raw.get("hardware", ""))
            if error := number(raw, "top1_error", path):
                row["top1_error"] = error
            if row["top1"] is not None and any(costs.values()):
                rows.append(row | dict(source=raw["source"], calculated=" ".join(calculated)))
    return rows


def _rows_of_benchmark(path: Path) -> Iterator[Dict[str, str]]:
    """Yield published rows with the images/s of a benchmark."""
    found = benchmark_file.read(path)
    if found.mode != "infer":
        raise UserError(f"{path}: measures training steps; the figure shows inference (benchmark.py --mode infer)")
    published = {(row["timm_name"], row["image_size"]): row for row in read_rows(complexity.PUBLISHED) if row["top1"]}
    for speed in found.speeds:
        row = published.get((speed.model.partition(".")[0], str(speed.img_size)))
        if row is None:
            what = f"{speed.model}: no published top-1 at {speed.img_size} pixels is known"
            raise UserError(f"{path}: {what}; add the model as a row of a CSV file")
        hardware = f"{found.hardware}, batch {speed.batch_size}"
        yield row | dict(images_per_s=str(round(speed.images_per_s, 3)), hardware=hardware, source=MEASURED)


def family(row: Row) -> str:
    """Return the one of FAMILIES that the model's name starts with, '' for none."""
    return next((name for name in FAMILIES if row["model"].lower().startswith(name.lower())), "")


def colour(row: Row) -> Any:
    return dict(zip(FAMILIES, picture.colours(len(FAMILIES)))).get(family(row), "black")


def panels(rows: Sequence[Row], costs: Sequence[str]) -> List[Panel]:
    """Return a panel per cost; for images/s, a panel per hardware.

    Of a model with the same accuracy in several tables, the first row is shown. Raise UserError if no row has a cost.
    """
    found = []
    for cost in costs:
        groups: Dict[str, Dict[Any, Row]] = {}
        for row in rows:
            if row[cost] is not None:
                group = groups.setdefault(row["hardware"] if cost == "images_per_s" else "", {})
                group.setdefault((row["model"], row["top1"]), row)
        if not groups:
            raise UserError(f"costs: {cost}: no row of the tables has it")
        found += [Panel(cost, hardware, list(group.values())) for hardware, group in groups.items()]
    return found


def draw(rows: Sequence[Row], costs: Sequence[str], accuracy: str = "ImageNet top-1 (%)") -> Any:
    """Draw a point per row: colours are families, markers are sources, hollow ones were counted here."""
    shown = panels(rows, costs)
    drawn = [row for panel in shown for row in panel.rows]
    markers = dict(zip(dict.fromkeys(row["source"] for row in rows if row in drawn), itertools.cycle(MARKERS)))
    columns = min(2, len(shown))
    panel_in = max(3, NAME_IN * max(len(panel.rows) for panel in shown))
    figure = picture.new(
        picture.PAGE_IN if columns > 1 else 1.4 * picture.COLUMN_IN, panel_in * -(-len(shown) // columns)
    )
    grid = [figure.add_subplot(-(-len(shown) // columns), columns, place + 1) for place in range(len(shown))]
    for place, (axes, panel) in enumerate(zip(grid, shown)):
        _draw_panel(axes, panel, markers)
        axes.set_ylabel(accuracy if place % columns == 0 else "")
    legend = {source: dict(linestyle="", marker=marker, color="grey") for source, marker in markers.items()}
    if any(panel.cost in row["calculated"] for panel in shown for row in panel.rows):
        hollow = dict(linestyle="", marker="o", markerfacecolor="white", markeredgecolor="grey")
        legend["hollow: calculated here (scripts/complexity.py)"] = hollow
    picture.write_legend(figure, legend)
    for _ in range(2):  # the second time moves the panels a little
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # names are placed in pixels, so the panels must not move any more
    for axes, panel in zip(grid, shown):
        _write_names(axes, panel)
    return figure


def _draw_panel(axes: Any, panel: Panel, markers: Dict[str, str]) -> None:
    for row in panel.rows:
        fill = "white" if panel.cost in row["calculated"] else colour(row)
        axes.scatter(row[panel.cost], row["top1"], s=14, marker=markers[row["source"]], linewidths=0.8,
                     facecolors=[fill], edgecolors=[colour(row)], zorder=2)  # fmt: skip
        if "top1_error" in row:
            axes.errorbar(row[panel.cost], row["top1"], row["top1_error"], color=colour(row), linewidth=0.7, capsize=2)
    for family_name, source in {(family(row), row["source"]): None for row in panel.rows if family(row)}:
        line = [row for row in panel.rows if (family(row), row["source"]) == (family_name, source)]
        points = sorted((row[panel.cost], row["top1"]) for row in line)
        axes.plot(*zip(*points), color=colour(line[0]), linewidth=0.7, alpha=0.5, zorder=1)
    axes.set_xscale("log")
    axes.set_xlabel(lettering.shown(f"{COSTS[panel.cost]}, {panel.hardware}".removesuffix(", ")))
    axes.grid(True, which="both")
    axes.margins(0.2, 0.1)
    low, high = axes.get_xlim()
    for steps in TICKS:
        ticks = [step * 10**power for power in range(-4, 6) for step in steps if low <= step * 10**power <= high]
        if len(ticks) >= 3:
            break
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlim=(low, high), ylim=axes.get_ylim())


def _write_names(axes: Any, panel: Panel) -> None:
    """Write the models' names so that they cover no other name, point or line."""
    import textalloc

    x, y = ([row[key] for row in panel.rows] for key in (panel.cost, "top1"))
    names = [lettering.shown(row["model"]) for row in panel.rows]
    bars = [(row[panel.cost], row["top1"], row["top1_error"]) for row in panel.rows if "top1_error" in row]
    lines = [
        [*(line.get_xdata() for line in axes.lines), *([cost, cost] for cost, _, _ in bars)],
        [*(line.get_ydata() for line in axes.lines), *([mean - error, mean + error] for _, mean, error in bars)],
    ]
    colours = [colour(row) for row in panel.rows]
    room = axes.scatter(x, y, s=20)  # what names must not cover: the markers and a little more
    for order in range(ORDERS):
        *_, texts, leaders = textalloc.allocate(
            axes, x, y, names, scatter_plot=room, x_lines=lines[0], y_lines=lines[1],
            textsize=5.8, textcolor=colours, linecolor=colours, linewidth=0.4,
            margin=0.006, min_distance=0.006, max_distance=0.25, nbr_candidates=400,
            avoid_label_lines_overlap=True, priority_strategy=order, draw_all=order == ORDERS - 1,
        )  # fmt: skip
        if None not in texts:
            break
        for artist in filter(None, [*texts, *leaders]):
            artist.remove()
    room.remove()
