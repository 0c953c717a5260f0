"""How cost grows with image size and batch, from files that scripts/benchmark.py wrote."""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from tnt_timm.costs import benchmark_file
from tnt_timm.errors import UserError
from tnt_timm.figures import picture
from tnt_timm.figures.network import Output

Row = Dict[str, Any]  # a model at an image size and batch
MEASURES = {"ms_per_image": "ms per image", "peak_mb": "memory of a step (MB)"}
AXES = {"img_size": "image edge (pixels)", "batch_size": "batch (images)"}
TITLES = {"img_size": "batch of {batch_size}", "batch_size": "{img_size} pixels"}  # what stays the same along an axis


def draw_growth(paths: Sequence[str], own: Output) -> picture.Drawn:
    """Draw time and memory against image size and batch."""
    rows = read([Path(path) for path in paths])
    return draw(rows), rows


def read(files: Sequence[Path]) -> List[Row]:
    """Join the files of `benchmark.py --output`. If several contain the same case, the first counts.

    Raise UserError if the files are of different steps or machines, or if nothing grows in them.
    """
    rows: Dict[Any, Row] = {}
    for file in files:
        found = benchmark_file.read(file)
        measured = f"{'inference' if found.mode == 'infer' else 'a training step'}; {found.hardware}"
        for x in found.speeds:
            case = dict(model=x.model, img_size=x.img_size, batch_size=x.batch_size)
            values = dict(ms_per_image=x.median_ms / x.batch_size, peak_mb=x.peak_mb, measured=measured)
            rows.setdefault(tuple(case.values()), case | values)
        first = next(iter(rows.values()))["measured"]
        if measured != first:
            raise UserError(f"{file}: {measured}, but {files[0]}: {first}; draw each alone")
    if not panels(list(rows.values())):
        given = ", ".join(map(str, files))
        raise UserError(f"{given}: nothing grows; measure several sizes at one batch (benchmark.py --img-size 224 384)")
    return list(rows.values())


def panels(rows: Sequence[Row]) -> List[Tuple[str, str, List[Row]]]:
    """Return axis, measure and rows of each panel, at the batch (or size) that was measured at most sizes (or batches)."""
    found = []
    for axis, fixed, measures in (("img_size", "batch_size", MEASURES), ("batch_size", "img_size", ["ms_per_image"])):
        groups = [[row for row in rows if row[fixed] == value] for value in {row[fixed] for row in rows}]
        most = max(groups, key=lambda group: (len({row[axis] for row in group}), group[0][fixed]))
        if len({row[axis] for row in most}) > 1:
            found += [(axis, measure, most) for measure in measures]
    return found


def draw(rows: Sequence[Row]) -> Any:
    """Draw a panel for each thing that grows, with a line per model."""
    shown, models = panels(rows), list(dict.fromkeys(row["model"] for row in rows))
    figure = picture.new(picture.PAGE_IN, 2.3)
    legend = {}
    for axes, (axis, measure, points) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        for model, colour in zip(models, picture.colours(len(models))):
            line = sorted((row[axis], row[measure]) for row in points if row["model"] == model)
            if line:
                axes.plot(*zip(*line), marker="o", color=colour)
                legend[model] = dict(marker="o", color=colour)
        ticks = sorted({row[axis] for row in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        if axis == "img_size":
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.set(xlabel=AXES[axis], ylabel=MEASURES[measure], title=TITLES[axis].format(**points[0]))
        axes.grid(True)
    picture.write_legend(figure, legend)
    picture.write_heading(figure, f"{rows[0]['measured']}; medians")
    return figure
