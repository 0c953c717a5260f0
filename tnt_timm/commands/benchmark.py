"""Measure speed: `tnt-benchmark tnt_s_patch16_224 tnt_s deit_small_patch16_224 --mode train`."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Sequence

import timm
import torch
from pydantic import NonNegativeInt, PositiveInt

from tnt_timm.atomic_files import replace_text
from tnt_timm.commands.entry_point import run
from tnt_timm.console import say, show, table, write_line
from tnt_timm.costs.breakdown import parts
from tnt_timm.costs.throughput import Setting, speeds
from tnt_timm.errors import ConfigError
from tnt_timm.models.tnt import TNT
from tnt_timm.ops import backends_used
from tnt_timm.runtime import provenance
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.config import check_model_name
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schema import Group, OutputFile

HEADER = ("model", "px", "batch", "ms", "fastest", "slowest", "images/s", "ratio", "memory MB", "of matmul")
PARTS_HEADER = ("model", "px", "batch", "part", "ms", "of all", "of matmul", "of bandwidth")


class Settings(Group):
    """Measure models side by side on random images. Their steps alternate, and the median counts. "ratio" compares images per
    second with the first MODEL; "of matmul" compares operations per second with a large matrix product on the same device; "of
    bandwidth" compares bytes per second with a large copy. Memory is a step's own, without the model. Set TNT_BACKEND=reference
    to measure a TNT without its kernels. `tnt-figures growth` draws the --output of several sizes."""

    models: List[PathText] = setting(about="timm model names", positional="MODEL")
    mode: Literal["infer", "train"] = setting("infer", "forward only, or forward, backward and AdamW")
    batch_size: List[PositiveInt] = setting([8], "one or more batch sizes to measure", min_length=1)
    img_size: Optional[List[PositiveInt]] = setting(
        None, "one or more input sizes to measure, pixels (default: the model's)", min_length=1
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "autocast type, unless float32")
    compiled: bool = setting(False, "use torch.compile")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    repeats: PositiveInt = setting(10, "timed steps per model")
    threads: NonNegativeInt = setting(0, "CPU threads (0: PyTorch's choice)")
    parts: bool = setting(False, "measure the parts of a TNT's step instead")
    format: Literal["table", "markdown", "csv"] = setting("table", "table format")
    output: OutputFile = setting("", "JSON file for all figures, with machine, versions and commit")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Return the exit status."""
    return run(benchmark, argv, Settings)


def benchmark(settings: Settings) -> None:
    """Measure, print the table, and write the JSON file if one is wanted.

    Raises:
        UserError: a model or a device does not exist, or the file cannot be written.
    """
    for name in settings.models:
        check_model_name(name, "command line")
        if settings.parts and not isinstance(timm.create_model(name), TNT):
            raise ConfigError(f"command line: model: {name}: not a TNT of this package; --parts measures only those")
    if settings.device != "cpu" and not (settings.device == "cuda" and torch.cuda.is_available()):
        raise ConfigError(f"command line: device: {settings.device!r}: not available here; pass --device cpu")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    origin = provenance.describe(torch.device(settings.device), 1)
    threads = f"{origin['threads']} CPU thread" + "s" * (origin["threads"] > 1)
    say(f"{origin['device']}, {threads} ({origin['instruction_set']}), torch {origin['versions']['torch']}")

    cases = [
        Setting(settings.mode, batch, size, settings.dtype, settings.compiled, settings.device)
        for size, batch in itertools.product(settings.img_size or [None], settings.batch_size)
    ]
    found = (_parts if settings.parts else _speeds)(settings, cases)
    if settings.output:
        del origin["host"]
        origin["backends"] = backends_used()
        common = {key: value for key, value in cases[0]._asdict().items() if key not in ("batch_size", "img_size")}
        figures = {**origin, "setting": common, "parts" if settings.parts else "speeds": found}
        replace_text(Path(settings.output), json.dumps(figures, indent=2) + "\n")


def _speeds(settings: Settings, cases: Sequence[Setting]) -> List[Dict[str, Any]]:
    found, rows = [], []
    for case in cases:
        group = speeds(settings.models, case, settings.repeats, lambda line: write_line(line, sys.stderr))
        found += group
        for speed in group:
            times = [f"{ms:.1f}" for ms in (speed.median_ms, speed.fastest_ms, speed.slowest_ms)]
            rates = [f"{speed.images_per_s:.1f}", f"{speed.ratio(group[0]):.2f}", f"{speed.peak_mb:.0f}"]
            share = f"{100 * speed.matmul_share:.0f} %"
            rows.append([speed.model, str(speed.img_size), str(speed.batch_size), *times, *rates, share])
    show(table(HEADER, rows, settings.format))
    return [speed._asdict() for speed in found]


def _parts(settings: Settings, cases: Sequence[Setting]) -> List[Dict[str, Any]]:
    found, rows = [], []
    for name, case in itertools.product(settings.models, cases):
        group = parts(name, case, settings.repeats)
        found += group
        total = sum(part.ms for part in group)
        for part in group:
            shares = [f"{100 * x:.0f} %" for x in (part.ms / total, part.matmul_share, part.bandwidth_share)]
            rows.append([name, str(part.img_size), str(part.batch_size), part.part, f"{part.ms:.2f}", *shares])
    show(table(PARTS_HEADER, rows, settings.format))
    return [part._asdict() for part in found]
