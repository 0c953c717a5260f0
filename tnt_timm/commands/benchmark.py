"""Speed: `python scripts/benchmark.py tnt_s_patch16_224 tnt_s deit_small_patch16_224 --mode train`."""

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, List, Literal, Optional, Sequence

import timm
import torch
from pydantic import Field

from tnt_timm import files
from tnt_timm.commands.runner import run
from tnt_timm.console import say, table
from tnt_timm.costs.breakdown import Part, parts
from tnt_timm.costs.throughput import Setting, Speed, speeds
from tnt_timm.errors import ConfigError
from tnt_timm.models.tnt import TNT
from tnt_timm.ops import backends_used
from tnt_timm.runtime import provenance
from tnt_timm.settings import command_line, config
from tnt_timm.settings.schema import Group

DESCRIPTION = """Measure models side by side on random images: their steps take turns, the median counts. The ratio compares
images per second with the first MODEL's; "of matmul", the operations done with those of one large product on the same device;
"of bandwidth", what must be read and written with a large copy. TNT_BACKEND=reference measures ours without its kernels. Memory
is a step's own, beside the model's. `figures.py growth` draws what --output writes for several sizes."""
HEADER = ("model", "px", "batch", "ms", "fastest", "slowest", "images/s", "ratio", "memory MB", "of matmul")
PARTS_HEADER = ("model", "px", "batch", "part", "ms", "of all", "of matmul", "of bandwidth")
Size = Annotated[int, Field(gt=0)]


class Own(Group):
    """What to measure"""

    models: List[str] = Field([], description="names of timm's models, ours among them")
    mode: Literal["infer", "train"] = Field("infer", description="forward, or forward, backward and AdamW")
    batch_size: List[Size] = Field([8], min_length=1, description="images of a step; several: each in turn")
    img_size: Optional[List[Size]] = Field(
        None, min_length=1, description="edges of the square images, each in turn (default: the model's)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="others mean autocast")
    compiled: bool = Field(False, description="through torch.compile")
    device: str = Field("cuda" if torch.cuda.is_available() else "cpu", description="cuda or cpu")
    repeats: int = Field(10, gt=0, description="timed steps of each model")
    threads: int = Field(0, ge=0, description="of the CPU (0: PyTorch's choice)")
    parts: bool = Field(False, description="where a TNT's step spends its time, instead")
    format: Literal["table", "markdown", "csv"] = Field("table", description="of the table")
    output: str = Field("", description="file for all figures as JSON, with machine, versions and commit")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Returns the exit status."""
    return run(benchmark, argv)


def benchmark(argv: Sequence[str]) -> None:
    """Run the command line.

    Raises:
        UserError: a model or a device that does not exist, or a file that cannot be written.
    """
    own = _parse(argv)
    if own.threads:
        torch.set_num_threads(own.threads)
    sizes: List[Optional[int]] = [*own.img_size] if own.img_size else [None]
    settings = [
        Setting(own.mode, batch, size, own.dtype, own.compiled, own.device)
        for size, batch in itertools.product(sizes, own.batch_size)
    ]
    if own.output and not Path(own.output).absolute().parent.is_dir():
        raise ConfigError(f"command line: output: {own.output}: its folder does not exist")
    origin = provenance.describe(torch.device(own.device), 1)
    threads = f"{origin['threads']} CPU thread" + "s" * (origin["threads"] > 1)
    say(f"{origin['device']}, {threads} ({origin['instruction_set']}), torch {origin['versions']['torch']}")
    measure = _parts if own.parts else _speeds
    found = measure(own, settings)
    if own.output:
        del origin["host"]
        origin["backends"] = backends_used()
        common = {key: value for key, value in settings[0]._asdict().items() if key not in ("batch_size", "img_size")}
        rows = [row._asdict() for row in found]
        figures = {**origin, "setting": common, "parts" if own.parts else "speeds": rows}
        files.replace_text(Path(own.output), json.dumps(figures, indent=2) + "\n")


def _speeds(own: Own, settings: Sequence[Setting]) -> List[Speed]:
    found: List[Speed] = []
    for setting in settings:
        found += speeds(own.models, setting, own.repeats, lambda line: print(line, file=sys.stderr))
    rows = [_row(speed, found[number - number % len(own.models)]) for number, speed in enumerate(found)]
    say(table(HEADER, rows, own.format).rstrip("\n"))
    return found


def _parts(own: Own, settings: Sequence[Setting]) -> List[Part]:
    for name in own.models:
        if not isinstance(timm.create_model(name), TNT):
            raise ConfigError(f"command line: model: {name} is not a TNT of this package, whose parts --parts measures")
    found, rows = [], []
    for name, setting in itertools.product(own.models, settings):
        group = parts(name, setting, own.repeats)
        total = sum(part.ms for part in group)
        found += group
        for part in group:
            shares = map(_percent, (part.ms / total, part.matmul_share, part.bandwidth_share))
            rows.append((name, str(part.img_size), str(part.batch_size), part.part, f"{part.ms:.2f}", *shares))
    say(table(PARTS_HEADER, rows, own.format).rstrip("\n"))
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _row(speed: Speed, first: Speed) -> List[str]:
    times = [f"{ms:.1f}" for ms in (speed.median_ms, speed.fastest_ms, speed.slowest_ms)]
    rates = [f"{speed.images_per_s:.1f}", f"{speed.ratio(first):.2f}", f"{speed.peak_mb:.0f}"]
    return [
        speed.model, str(speed.img_size), str(speed.batch_size), *times, *rates, _percent(speed.matmul_share)
    ]  # fmt: skip


def _parse(argv: Sequence[str]) -> Own:
    settings = {name: field for name, field in Own.model_fields.items() if name != "models"}
    parser = command_line.build_parser({Own.__doc__: settings}, DESCRIPTION, {})
    parser.usage = "%(prog)s MODEL [MODEL ...] [--KEY VALUE ...]"
    parser.add_argument("models", metavar="MODEL", nargs="+", help="names of timm's models")
    given = command_line.parse(parser, argv)
    for name in given["models"]:
        config.check_model_name(name, "command line")
    own = config.own_settings(Own, given)
    if own.device != "cpu" and not (own.device == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"command line: device: {own.device!r} is not here; choose cpu")
    return own
