"""Training curves of one or more runs, from their summary.csv (this project's or of timm's train.py)."""

import itertools
from pathlib import Path
from typing import Any, Dict, List, Sequence

from tnt_timm.figures import picture
from tnt_timm.figures.network import Output
from tnt_timm.figures.tables import number, read_rows

Run = List[Dict[str, Any]]  # a row per epoch: name of the run, epoch from 1, and those of LINES that there are
SUMMARY = "summary.csv"
PANELS = ("loss", "top-1 (%)")
# column of summary.csv -> panel, name in the legend, style of the line
LINES = {
    "train_loss": ("loss", "training", ":"),
    "eval_loss": ("loss", "validation", "--"),
    "eval_ema_loss": ("loss", "validation, EMA", "-"),
    "eval_top1": ("top-1 (%)", "validation", "--"),
    "eval_ema_top1": ("top-1 (%)", "validation, EMA", "-"),
}


def draw_curves(paths: Sequence[str], own: Output) -> picture.Drawn:
    """Draw loss and top-1 by epoch."""
    runs = [read_run(Path(path)) for path in paths]
    return draw(runs), list(itertools.chain(*runs))


def read_run(path: Path) -> Run:
    """Read a run folder or a summary.csv. Raise UserError if it is neither."""
    file = path / SUMMARY if path.is_dir() else path
    name, rows = file.resolve().parent.name, read_rows(file, ["epoch"])
    columns = [column for column in LINES if column in rows[0]]
    return [
        dict(run=name, epoch=int(number(row, "epoch", file)) + 1) | {each: number(row, each, file) for each in columns}
        for row in rows
    ]


def draw(runs: Sequence[Run]) -> Any:
    """Draw loss on the left and top-1 on the right, with a colour per run and a line style per column."""
    figure = picture.new(picture.PAGE_IN, 2.4)
    panels = dict(zip(PANELS, figure.subplots(1, 2)))
    runs_legend, styles_legend = {}, {}
    for run, colour in zip(runs, picture.colours(len(runs))):
        runs_legend[run[0]["run"]] = dict(color=colour)
        for column, (panel, kind, style) in LINES.items():
            points = [(row["epoch"], row[column]) for row in run if row.get(column) is not None]
            if points:
                panels[panel].plot(*zip(*points), style, color=colour, marker="." if len(points) == 1 else "")
                styles_legend[kind] = dict(linestyle=style, color="black")
    for name, axes in panels.items():
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(True)
    if len(runs) == 1:
        picture.write_heading(figure, runs[0][0]["run"])
        runs_legend = {}
    picture.write_legend(figure, runs_legend | styles_legend)
    return figure
