"""How cost grows with image size and batch, from what scripts/benchmark.py wrote."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from tnt_timm.costs import benchmark_file
from tnt_timm.costs.throughput import Speed
from tnt_timm.errors import UserError
from tnt_timm.figures import picture


def _ms_per_image(speed: Speed) -> float:
    return speed.median_ms / speed.batch_size


MEASURES = {"ms per image": _ms_per_image, "memory of a step (MB)": lambda speed: speed.peak_mb}


class Growth(NamedTuple):
    """What was measured, in words, and its rows: each model once at a size and batch."""

    about: str
    speeds: List[Speed]


def read(files: Sequence[Path]) -> Growth:
    """What files of `benchmark.py --output` hold together; of a case that is in several, the first counts.

    Raises:
        UserError: a file that is not one; files of other steps or machines; or nothing grows in them.
    """
    found = [benchmark_file.read(file) for file in files]
    for file, other in zip(files, found):
        if other[:2] != found[0][:2]:
            raise UserError(f"{file}: {_about(other)}, and {files[0]}: {_about(found[0])}; draw each alone")
    cases = {}
    for speed in (speed for file in found for speed in file.speeds):
        cases.setdefault((speed.model, speed.img_size, speed.batch_size), speed)
    growth = Growth(_about(found[0]), list(cases.values()))
    if not _panels(growth.speeds):
        given = ", ".join(map(str, files))
        raise UserError(f"{given}: nothing grows; measure several sizes at one batch (benchmark.py --img-size 224 384)")
    return growth


def _about(found: benchmark_file.Benchmark) -> str:
    return f"{'inference' if found.mode == 'infer' else 'a training step'}; {found.hardware}"


def numbers(growth: Growth) -> List[Dict[str, Any]]:
    """A row per model, size and batch."""
    return [
        dict(
            model=x.model,
            img_size=x.img_size,
            batch_size=x.batch_size,
            ms_per_image=_ms_per_image(x),
            peak_mb=x.peak_mb,
            measured=growth.about,
        )
        for x in growth.speeds
    ]


class Panel(NamedTuple):
    """What grows along the axis, while the other one of size and batch stays as the title says."""

    axis: str
    title: str
    measure: str
    speeds: List[Speed]


def _panels(speeds: Sequence[Speed]) -> List[Panel]:
    """Time and memory against image size, at the batch that was measured at most sizes; time against batch likewise."""
    found = []
    for axis, fixed, title, measures in (
        ("img_size", "batch_size", "batch of {}", list(MEASURES)),
        ("batch_size", "img_size", "{} pixels", list(MEASURES)[:1]),
    ):
        values = {getattr(x, fixed): [y for y in speeds if getattr(y, fixed) == getattr(x, fixed)] for x in speeds}
        value, shown = max(values.items(), key=lambda item: (len({getattr(x, axis) for x in item[1]}), item[0]))
        if len({getattr(x, axis) for x in shown}) > 1:
            found += [Panel(axis, title.format(value), measure, shown) for measure in measures]
    return found


def draw(growth: Growth) -> Any:
    """A panel for each thing that grows, a line per model."""
    from matplotlib.ticker import LogLocator

    panels, models = _panels(growth.speeds), list(dict.fromkeys(x.model for x in growth.speeds))
    colours = dict(zip(models, picture.colours(len(models))))
    with picture.styled():
        figure = picture.new(picture.PAGE_IN, 2.3)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for model, colour in colours.items():
                points = sorted(
                    (getattr(x, panel.axis), MEASURES[panel.measure](x)) for x in panel.speeds if x.model == model
                )
                if points:
                    axes.plot(*zip(*points), marker="o", markersize=3, color=colour)
            ticks = sorted({getattr(x, panel.axis) for x in panel.speeds})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            if panel.axis == "img_size":
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(bottom=0)
            axes.minorticks_off()
            axes.set_xlabel("image edge (pixels)" if panel.axis == "img_size" else "batch (images)")
            axes.set_ylabel(panel.measure)
            axes.set_title(panel.title)
            axes.grid(True)
        picture.write_legend(figure, [(model, "-", colour) for model, colour in colours.items()])
        figure.suptitle(f"{growth.about}; medians", fontsize=8)
    return figure
