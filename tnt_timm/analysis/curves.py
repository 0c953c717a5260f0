"""Training curves of one or more runs, from their summary.csv (this project's, or of timm's train.py)."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from tnt_timm.analysis import picture
from tnt_timm.analysis.tables import number, read_rows

# column of summary.csv -> panel, name in the legend, style of the line
LINES = {
    "train_loss": ("loss", "training", ":"),
    "eval_loss": ("loss", "validation", "--"),
    "eval_ema_loss": ("loss", "validation, EMA", "-"),
    "eval_top1": ("top-1 (%)", "validation", "--"),
    "eval_ema_top1": ("top-1 (%)", "validation, EMA", "-"),
}
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
    file = path / "summary.csv" if path.is_dir() else path
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
    """Loss on the left, top-1 on the right; a colour per run, a kind of line per column."""
    with picture.styled():
        figure = picture.new(picture.PAGE_IN, 2.5)
        panels = dict(zip(PANELS, figure.subplots(1, 2)))
        for run, colour in zip(runs, picture.colours(len(runs))):
            for name, values in run.columns.items():
                panel, text, style = LINES[name]
                label = text if len(runs) == 1 else f"{run.name}: {text}"
                points = [(epoch, value) for epoch, value in zip(run.epochs, values) if value is not None]
                panels[panel].plot(
                    *zip(*points), style, color=colour, label=label, marker="." if len(points) == 1 else ""
                )
        for name, axes in panels.items():
            axes.set_xlabel("epoch")
            axes.set_ylabel(name)
            axes.grid(True)
            if axes.lines:
                axes.legend(frameon=False)
        if len(runs) == 1:
            figure.suptitle(runs[0].name, fontsize=8)
    return figure
