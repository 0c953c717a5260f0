"""Read the file that scripts/benchmark.py writes with `--output FILE.json`, for the figures that show it."""

import json
from pathlib import Path
from typing import List, NamedTuple

from tnt_timm.costs.throughput import Speed
from tnt_timm.errors import UserError, one_line


class Benchmark(NamedTuple):
    mode: str  # "infer" or "train"
    hardware: str  # device, threads and precision, as text
    speeds: List[Speed]


def read(path: Path) -> Benchmark:
    """Read a benchmark file.

    Raises:
        UserError: the file cannot be read, or is another kind of file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        setting, device, threads = found["setting"], found["device"], found["threads"]
        mode, dtype, compiled = (setting[key] for key in ("mode", "dtype", "compiled"))
        speeds = [Speed(**row) for row in found["speeds"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not what `benchmark.py --output FILE` writes without --parts: {one_line(error)}"
        ) from None
    kind, _, hardware = device.partition(": ")
    if kind == "cpu":
        hardware += f", {found['instruction_set']}" if "instruction_set" in found else ""  # missing in older files
        hardware += f", {threads} thread" + "s" * (threads > 1)
    return Benchmark(mode, f"{hardware}, {dtype}" + ", torch.compile" * compiled, speeds)
