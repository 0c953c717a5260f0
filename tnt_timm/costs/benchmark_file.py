"""What scripts/benchmark.py writes (`--output FILE.json`), read again by the figures that show it."""

import json
from pathlib import Path
from typing import List, NamedTuple

from tnt_timm.costs.throughput import Speed
from tnt_timm.errors import UserError, one_line


class Benchmark(NamedTuple):
    """Of a file: 'infer' or 'train', in words what it was measured on (batch apart), and its rows."""

    mode: str
    hardware: str
    speeds: List[Speed]


def read(path: Path) -> Benchmark:
    """Read a file of speeds.

    Raises:
        UserError: it cannot be read, or is another kind of file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        setting, device, threads = found["setting"], found["device"], found["threads"]
        mode, dtype, compiled = (setting[key] for key in ("mode", "dtype", "compiled"))
        speeds = [Speed(**row) for row in found["speeds"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = one_line(error)
        raise UserError(f"{path}: not what `benchmark.py --output FILE` writes without --parts: {why}") from None
    hardware = device.partition(": ")[2]
    if device.startswith("cpu"):
        hardware += f", {found['instruction_set']}" if "instruction_set" in found else ""  # older files do not say
        hardware += f", {threads} thread" + "s" * (threads > 1)
    return Benchmark(mode, f"{hardware}, {dtype}" + ", torch.compile" * compiled, speeds)
