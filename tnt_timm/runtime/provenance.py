"""Record where results come from: versions, commit, machine and command."""

import contextlib
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


@functools.cache  # every checkpoint records them, and reading the packages' metadata takes 30 ms
def versions() -> Dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version(), **dict.fromkeys(PACKAGES, "not installed")}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    found["torch"] = str(torch.__version__)  # includes the CUDA version of the build
    return found


def commit(folder: Optional[Path] = None) -> Optional[str]:
    """Return a checkout's commit (default: the checkout of the running command), with `-dirty` if files were changed."""
    folder = folder or Path(sys.argv[0] or ".").resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


def processor() -> str:
    """Return the CPU model, as the operating system reports it."""
    return cpu_info("model name") or platform.processor() or platform.machine()


def describe(device: torch.device, world_size: int) -> Dict[str, Any]:
    """Return the content of run.json."""
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
