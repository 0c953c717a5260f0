#!/usr/bin/env python3
"""Speed: `python scripts/benchmark.py tnt_s tnt_s_patch16_224 deit_small_patch16_224 --mode train`.

Wiring only; the work is in tnt_timm/analysis/throughput.py.
"""

import json
import sys
from pathlib import Path
from typing import List, Literal, Optional, Sequence

import timm
import torch
from pydantic import Field, ValidationError

from tnt_timm import files
from tnt_timm.analysis.throughput import Setting, Speed, parts, speeds
from tnt_timm.console import run, say, table
from tnt_timm.errors import ConfigError
from tnt_timm.models.tnt import TNT
from tnt_timm.training import command_line, config, provenance
from tnt_timm.training.schema import Group

DESCRIPTION = """Measure models side by side on random images: their steps take turns, the median counts. The ratio compares
images per second with the first MODEL's; "of matmul", the operations done with those of one large product on the same device.
TNT_BACKEND=reference measures ours without its kernels. Memory is a step's own, beside the model's."""
HEADER = ("model", "ms", "fastest", "slowest", "images/s", "ratio", "memory MB", "of matmul")


class Own(Group):
    """What to measure"""

    models: List[str] = Field([], description="names of timm's models, ours among them")
    mode: Literal["infer", "train"] = Field("infer", description="forward, or forward, backward and AdamW")
    batch_size: int = Field(8, gt=0, description="images of a step")
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square images (default: the model's)")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="others mean autocast")
    compiled: bool = Field(False, description="through torch.compile")
    device: str = Field("cuda" if torch.cuda.is_available() else "cpu", description="cuda or cpu")
    repeats: int = Field(10, gt=0, description="timed steps of each model")
    threads: int = Field(0, ge=0, description="of the CPU (0: PyTorch's choice)")
    parts: bool = Field(False, description="where a TNT's forward pass spends its time, instead")
    format: Literal["table", "markdown", "csv"] = Field("table", description="of the table")
    output: str = Field("", description="file for all figures as JSON, with machine, versions and commit")


def main(argv: Sequence[str]) -> int:
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
    setting = Setting(own.mode, own.batch_size, own.img_size, own.dtype, own.compiled, own.device)
    if own.parts:
        for name in own.models:
            if not isinstance(timm.create_model(name), TNT):
                raise ConfigError(
                    f"command line: model: {name} is not a TNT of this package, whose parts --parts measures"
                )
            rows = [(part, f"{ms:.2f}") for part, ms in parts(name, setting, own.repeats)]
            say(table((name, "ms"), rows, own.format).rstrip("\n"))
        return
    found = speeds(own.models, setting, own.repeats, lambda line: print(line, file=sys.stderr))
    say(table(HEADER, [_row(speed, found[0]) for speed in found], own.format).rstrip("\n"))
    if own.output:
        origin = provenance.describe(torch.device(own.device), 1)
        figures = {**origin, "setting": setting._asdict(), "speeds": [speed._asdict() for speed in found]}
        files.replace_text(Path(own.output), json.dumps(figures, indent=2) + "\n")


def _row(speed: Speed, first: Speed) -> List[str]:
    times = [f"{ms:.1f}" for ms in (speed.median_ms, speed.fastest_ms, speed.slowest_ms)]
    rates = [
        f"{speed.images_per_s:.1f}",
        f"{speed.ratio(first):.2f}",
        f"{speed.peak_mb:.0f}",
        f"{100 * speed.matmul_share:.0f} %",
    ]
    return [speed.model, *times, *rates]


def _parse(argv: Sequence[str]) -> Own:
    settings = {name: field for name, field in Own.model_fields.items() if name != "models"}
    parser = command_line.build_parser({Own.__doc__: settings}, DESCRIPTION, {})
    parser.usage = "%(prog)s MODEL [MODEL ...] [--KEY VALUE ...]"
    parser.add_argument("models", metavar="MODEL", nargs="+", help="names of timm's models")
    given = command_line.parse(parser, argv)
    for name in given["models"]:
        config.check_model_name(name, "command line")
    try:
        own = Own(**given)
    except ValidationError as error:
        raise ConfigError(config.first_mistake(error, dict.fromkeys(given, "command line"))) from None
    if own.device != "cpu" and not (own.device == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"command line: device: {own.device!r} is not here; choose cpu")
    return own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
