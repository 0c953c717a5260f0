"""The folder of a run.

config.yaml          the resolved config; `train.py --config` accepts it
run.json             command, commit, versions, machine of the latest start
classes.txt          class names in the order of the targets
summary.csv          one row per epoch
last.pth.tar         the checkpoint to resume from; previous.pth.tar is the one before
epoch_start.pth.tar  where the current epoch began, for a rollback; a link to last.pth.tar until the next save
model_best.pth.tar   the best weights, self-describing
config.json, model.safetensors   the same for timm.create_model('local-dir:...')
*.damaged            checkpoints that were found damaged
wandb.json, wandb/   the rows that W&B has, and its own files
"""

import fcntl
import json
from pathlib import Path
from typing import IO, Any, List, Mapping, Optional

import torch

from tnt_timm import console
from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError, one_line
from tnt_timm.files import replace_text
from tnt_timm.runtime import provenance
from tnt_timm.settings import config
from tnt_timm.settings.schema import TrainConfig


def path_of(settings: TrainConfig) -> Path:
    """Return the folder of a run."""
    return Path(settings.run.output) / settings.run.experiment


def prepare(folder: Path) -> IO:
    """Create the folder, and lock it against other runs. The lock lasts as long as the returned file is open.

    Raises:
        UserError: the folder cannot be written, or another run uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  (stays open)
    except (OSError, ValueError) as error:
        raise UserError(f"output: {folder}: cannot be written: {one_line(error)}; choose another --output") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: the workers would inherit the lock
    except (BlockingIOError, PermissionError):
        raise UserError(f"output: {folder}: another run is using this folder; choose another --experiment") from None
    except OSError:  # a file system without locks
        pass
    return lock


def describe(
    folder: Path, settings: TrainConfig, classes: Optional[List[str]], device: torch.device, world_size: int
) -> None:
    """Write config.yaml, run.json and classes.txt."""
    replace_text(folder / "config.yaml", config.to_yaml(settings))
    replace_text(folder / "run.json", json.dumps(provenance.describe(device, world_size), indent=2) + "\n")
    if classes is not None:
        replace_text(folder / "classes.txt", "\n".join(classes) + "\n")


def write_summary(path: Path, rows: List[Mapping[str, Any]]) -> None:
    """Write summary.csv as a whole, so that it has one header and no partial row."""
    if rows:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [[row.get(column, "") for column in columns] for row in rows]
        replace_text(path, console.table(columns, cells, "csv"))


def candidates(folder: Path, settings: TrainConfig) -> List[Path]:
    """Return the checkpoints that a run may resume from, the newest first: its own, else the one that `resume` names."""
    paths = [folder / name for name in file_format.TO_CONTINUE if (folder / name).is_file()]
    return paths or ([Path(settings.run.resume)] if settings.run.resume else [])
