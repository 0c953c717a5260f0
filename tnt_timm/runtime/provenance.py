"""Where a run comes from: versions, commit, machine and command."""

import functools
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from tnt_timm.machine import cpu_info

PACKAGES = ("tnt-timm", "torch", "torchvision", "timm", "numpy", "pillow")


@functools.cache  # every checkpoint asks, and the packages' files take 30 ms to read
def versions() -> Dict[str, str]:
    """Of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = str(torch.__version__)  # with the build's CUDA behind it
    return found


def commit(folder: Optional[Path] = None) -> Optional[str]:
    """The commit of a checkout (default: of the command's own), with `-dirty` behind it where files were changed."""
    folder = folder or Path(sys.argv[0] or ".").resolve().parent
    try:
        out = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None


def processor() -> str:
    """The processor's name, where the system tells it."""
    return cpu_info("model name") or platform.processor() or platform.machine()


def describe(device: torch.device, world_size: int) -> Dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "command": sys.argv,
        "commit": commit(),
        "versions": versions(),
        "device": f"{device.type}: {name}",
        "instruction_set": torch.backends.cpu.get_cpu_capability(),  # of PyTorch's own CPU kernels
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "host": platform.node(),
    }
