"""What must be the same on all ranks before they compute together."""

import functools
import zlib
from pathlib import Path
from typing import Any, Dict, Mapping

import torch

from tnt_timm.runtime import provenance

REMEDY = "start all ranks with the same settings, code, packages and data"
PACKAGE = Path(__file__).parents[1]
# Settings that each machine may have its own of: speed and patience, and paths. What the paths hold must be the same, and is
# compared by itself: data, weights and checkpoints. Rank 0 alone writes.
OF_A_MACHINE = set(
    """threads workers hang_minutes log_interval device data_dir output class_map pretrained_path initial_checkpoint resume
    path checkpoint results_file confusion_matrix per_class""".split()
)


def facts_of_rank(settings: Mapping[str, Any], device: torch.device) -> Dict[str, Any]:
    """Return what must be the same on every rank, by name: settings, type of device, versions, code."""
    facts = {key: value for key, value in settings.items() if key not in OF_A_MACHINE}
    if settings.get("dataset", "").startswith("wds/"):
        facts["workers"] = settings["workers"]  # they divide a stream
    versions = {f"version of {name}": version for name, version in provenance.versions().items()}
    return {**facts, "device": device.type, **versions, "code of tnt_timm": _code()}


def facts_of_data(**identities: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the identities of splits as facts: facts_of_data(training={"images": 25}) -> {"training data, images": 25}."""
    return {f"{split} data, {key}": value for split, each in identities.items() for key, value in each.items()}


@functools.cache
def _code() -> str:
    """Return a checksum of this package's source files. (A commit does not tell what was changed since.)"""
    checksum = 0
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        checksum = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(PACKAGE)).encode(), checksum))
    return f"{checksum:08x}"
