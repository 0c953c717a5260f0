"""Stage 1: describe the machine, and measure its memory bandwidth and matrix throughput."""

import statistics
import subprocess
from typing import Any, Callable, Dict

import torch
from stage import Stage

from tnt_timm.costs.throughput import copy_rate, matmul_rate
from tnt_timm.runtime import provenance


def main() -> None:
    stage = Stage("machine", lambda parser: parser.add_argument("--commit", default=""))
    stage.attempt("machine", lambda: describe(stage.device, stage.options.commit))
    stage.attempt("copy", lambda: {"bytes_per_s": median(copy_rate(stage.device))})
    dtype = "float32" if stage.dry else "bfloat16"
    stage.attempt("matrix product", lambda: {"flops": median(matmul_rate(stage.device, dtype)), "dtype": dtype})


def describe(device: str, commit: str) -> Dict[str, Any]:
    found = provenance.describe(torch.device(device), 1)
    figures: Dict[str, Any] = {key: found[key] for key in ("device", "commit", "versions")}
    figures["commit"] = commit or figures["commit"] or "unknown"
    figures["versions"]["triton"] = triton_version()
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        figures |= {
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gb": round(gpu.total_memory / 1e9),
            "multiprocessors": gpu.multi_processor_count,
            "driver": driver(),
        }
    return figures


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def median(rate: Callable[[], float], repeats: int = 10) -> float:
    """Return the median after two warm-up calls."""
    return statistics.median([rate() for _ in range(repeats + 2)][2:])


if __name__ == "__main__":
    main()
