"""Training curves of one or more runs, from their summary.csv (this project's, or of timm's train.py)."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from tnt_timm.figures import picture
from tnt_timm.figures.tables import number, read_rows

# column of summary.csv -> panel, name in the legend, style of the line
LINES = {
    "train_loss": ("loss", "training", ":"),
    "eval_loss": ("loss", "validation", "--"),
    "eval_ema_loss": ("loss", "validation, EMA", "-"),
    "eval_top1": ("top-1 (%)", "validation", "--"),
    "eval_ema_top1": ("top-1 (%)", "validation, EMA", "-"),
}
SUMMARY = "summary.csv"
PANELS = ("loss", "top-1 (%)")


class Run(NamedTuple):
    """A run by name, and its columns that there are, with None for epochs without the number."""

    name: str
    epochs: List[int]  # counted from 1
    columns: Dict[str, List[Any]]


def read_run(path: Path) -> Run:
    """A run folder, or a summary.csv.

    Raises:
        UserError: there is none, or it is not one.
    """
    file = path / SUMMARY if path.is_dir() else path
    rows = read_rows(file, ["epoch"])
    columns = {name: [number(row, name, file) for row in rows] for name in LINES if name in rows[0]}
    epochs = [int(number(row, "epoch", file) or 0) + 1 for row in rows]
    return Run(path.name if path.is_dir() else path.resolve().parent.name, epochs, columns)


def numbers(runs: Sequence[Run]) -> List[dict]:
    """A row per run and epoch."""
    return [
        dict(run=run.name, epoch=epoch, **{name: values[index] for name, values in run.columns.items()})
        for run in runs
        for index, epoch in enumerate(run.epochs)
    ]


def draw(runs: Sequence[Run]) -> Any:
    """Loss on the left, top-1 on the right, the legend below them; a colour per run, a kind of line per column."""
    with picture.styled():
        figure = picture.new(picture.PAGE_IN, 2.4)
        panels = dict(zip(PANELS, figure.subplots(1, 2)))
        kinds: Dict[str, str] = {}
        for run, colour in zip(runs, picture.colours(len(runs))):
            for name, values in run.columns.items():
                panel, kind, style = LINES[name]
                points = [(epoch, value) for epoch, value in zip(run.epochs, values) if value is not None]
                if points:
                    marker = "." if len(points) == 1 else ""
                    panels[panel].plot(*zip(*points), style, color=colour, marker=marker)
                    kinds[kind] = style
        for name, axes in panels.items():
            axes.set(xlabel="epoch", ylabel=name)
            axes.grid(True)
        if len(runs) == 1:
            picture.write_heading(figure, runs[0].name)
        entries = [(run.name, "-", colour) for run, colour in zip(runs, picture.colours(len(runs)))]
        entries = entries if len(runs) > 1 else []
        entries += [(kind, style, "black") for kind, style in kinds.items()]
        picture.write_legend(figure, entries)
    return figure
