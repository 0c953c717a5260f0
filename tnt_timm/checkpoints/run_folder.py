"""The folder of a run: what lies in it, whether it can be written, and which checkpoint the run goes on from.

config.yaml          the resolved config; `train.py --config` takes it back
run.json             command, commit, versions, machine of the latest start
classes.txt          class names in the order of the targets
summary.csv          one row per epoch
last.pth.tar         to continue from; previous.pth.tar is the one before it
epoch_start.pth.tar  where the current epoch began, to go back to; until the next save another name of last.pth.tar
model_best.pth.tar   the selected weights, self-describing
config.json, model.safetensors   the same for timm.create_model('local-dir:...')
*.damaged            a checkpoint that was found damaged, put aside
wandb.json, wandb/   which rows W&B has, and its own files
tensorboard/         event files, one per start of the run
"""

import csv
import fcntl
import io
import json
from pathlib import Path
from typing import IO, Any, Dict, List, Mapping, Optional, Tuple

import torch

from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError, one_line
from tnt_timm.files import replace_text
from tnt_timm.runtime import provenance
from tnt_timm.settings import config
from tnt_timm.settings.schema import TrainConfig


def path_of(settings: TrainConfig) -> Path:
    return Path(settings.run.output) / settings.run.experiment


def prepare(folder: Path) -> IO:
    """Make the folder, prove that it can be written, and keep other runs out for as long as the result is held.

    Raises:
        UserError: it cannot be written, or another run is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  (the lock lasts as long as the file is open)
    except (OSError, ValueError) as error:
        raise UserError(f"output: {folder}: cannot be written: {one_line(error)}; choose another --output") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which loader processes would go on holding
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"output: {folder}: another run is at work in this folder; choose another --experiment"
        ) from None
    except OSError:  # a file system without locks
        pass
    return lock


def describe(
    folder: Path, settings: TrainConfig, classes: Optional[List[str]], device: torch.device, world_size: int
) -> None:
    """Write what the run is into its folder."""
    replace_text(folder / "config.yaml", config.to_yaml(settings))
    replace_text(folder / "run.json", json.dumps(provenance.describe(device, world_size), indent=2) + "\n")
    if classes is not None:
        replace_text(folder / "classes.txt", "\n".join(classes) + "\n")


def write_summary(path: Path, rows: List[Mapping[str, Any]]) -> None:
    """summary.csv, whole: one header ever, and never half a row."""
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_text(path, text.getvalue())


def candidates(folder: Path, settings: TrainConfig) -> List[Path]:
    """The checkpoints that the run may go on from, the newest first; none for a fresh start."""
    paths = [folder / name for name in file_format.TO_CONTINUE if (folder / name).is_file()]
    return paths or ([Path(settings.run.resume)] if settings.run.resume else [])


def to_continue(
    folder: Path, settings: TrainConfig
) -> Tuple[Optional[Path], Dict[str, Any], List[Tuple[Path, UserError]]]:
    """The checkpoint that the run goes on from: its own newest whole one, else the one that `resume` names, else none.

    Returns:
        Its path, what it holds, and the newer ones that cannot be read, with the reason.

    Raises:
        UserError: none can be read, or one holds no training state.
    """
    damaged: List[Tuple[Path, UserError]] = []
    for path in candidates(folder, settings):
        try:
            return path, _training_state(path), damaged
        except file_format.DamagedError as error:
            damaged.append((path, error))
    if damaged:
        raise damaged[0][1]
    return None, {}, []


def size(folder: Path) -> int:
    """Bytes of the files in a run's folder; one that has two names counts once."""
    files = [path.stat() for path in folder.iterdir() if path.is_file()]
    return sum({file.st_ino: file.st_size for file in files}.values())


def _training_state(path: Path) -> Dict[str, Any]:
    state = file_format.read(path)
    wanted = dict(progress=dict, optimizer=dict, amp_scaler=dict, state_dict=dict, config=dict, world_size=int)
    if any(not isinstance(state.get(key), kind) for key, kind in wanted.items()) or "epoch" not in state["progress"]:
        raise UserError(
            f"{path}: holds weights but no training state; to start from its weights pass --initial-checkpoint"
        )
    return state
