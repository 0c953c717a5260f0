"""How cost grows with image size and batch, from what scripts/benchmark.py wrote."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from tnt_timm.analysis import benchmark_file, picture
from tnt_timm.errors import UserError

MEASURES = {"ms_per_image": "ms per image", "peak_mb": "memory of a step (MB)"}


class Row(NamedTuple):
    """A model at one image size and batch: time per image, and the memory that a step takes."""

    model: str
    img_size: int
    batch_size: int
    ms_per_image: float
    peak_mb: float


def read(files: Sequence[Path]) -> List[Row]:
    """The rows of files of `benchmark.py --output`.

    Raises:
        UserError: a file that is not one; or one size and one batch are all there is.
    """
    speeds = [speed for file in files for speed in benchmark_file.read(file).speeds]
    rows = [Row(x.model, x.img_size, x.batch_size, x.median_ms / x.batch_size, x.peak_mb) for x in speeds]
    if len({(row.img_size, row.batch_size) for row in rows}) < 2:
        given = ", ".join(map(str, files))
        raise UserError(f"{given}: one size and one batch; measure several, as with `benchmark.py --img-size 224 384`")
    return rows


def numbers(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    return [row._asdict() for row in rows]


def draw(rows: Sequence[Row]) -> Any:
    """Time and memory against image size, at the batch that was measured at most sizes; time against batch likewise."""
    panels = []
    for axis, fixed, measures in (("img_size", "batch_size", MEASURES), ("batch_size", "img_size", ["ms_per_image"])):
        value = _most_varied(rows, axis, fixed)
        shown = [row for row in rows if getattr(row, fixed) == value]
        if len({getattr(row, axis) for row in shown}) > 1:
            panels += [(axis, fixed, value, shown, measure) for measure in measures]
    models = list(dict.fromkeys(row.model for row in rows))
    with picture.styled():
        figure = picture.new(picture.PAGE_IN, 2.5)
        for axes, (axis, fixed, value, shown, measure) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels
        ):
            for model, colour in zip(models, picture.colours(len(models))):
                points = sorted((getattr(row, axis), getattr(row, measure)) for row in shown if row.model == model)
                if points:
                    axes.plot(*zip(*points), marker="o", markersize=3, color=colour, label=model)
            ticks = sorted({getattr(row, axis) for row in shown})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            if axis == "img_size":
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            else:
                axes.set_ylim(bottom=0)
            axes.set_xlabel("image edge (pixels)" if axis == "img_size" else "batch (images)")
            axes.set_ylabel(MEASURES[measure])
            axes.set_title(f"batch of {value}" if fixed == "batch_size" else f"{value} pixels")
            axes.grid(True)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models), frameon=False
        )
    return figure


def _most_varied(rows: Sequence[Row], axis: str, fixed: str) -> int:
    """The value of `fixed` with most values of `axis`; of equals the largest."""
    return max(
        {getattr(row, fixed) for row in rows},
        key=lambda value: (len({getattr(row, axis) for row in rows if getattr(row, fixed) == value}), value),
    )
