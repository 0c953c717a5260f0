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

import contextlib
import datetime
import fcntl
import json
import os
import socket
import stat
from pathlib import Path
from typing import IO, Any, List, Mapping, Optional

import torch

from tnt_timm import console
from tnt_timm.atomic_files import replace_text
from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError, one_line
from tnt_timm.runtime import provenance
from tnt_timm.settings import config
from tnt_timm.settings.schema import TrainConfig

LOCK = ".lock"
CHECKPOINTS = (*file_format.TO_CONTINUE, file_format.BEST)
TEXTS = "config.yaml run.json classes.txt summary.csv config.json model.safetensors wandb.json".split()


def path_of(settings: TrainConfig) -> Path:
    """Return the folder of a run."""
    return Path(settings.run.output) / settings.run.experiment


def prepare(folder: Path) -> IO:
    """Create the folder, and lock it against other runs. The lock lasts as long as the returned file is open.

    Raises:
        UserError: the folder cannot be written, something in it is in the way, or another run uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_nothing_is_in_the_way(folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.fdopen(os.open(folder / LOCK, flags, 0o666), "r+", encoding="utf-8", errors="replace")
    except FileExistsError:
        raise UserError(
            f"output: {folder}: a file or a dead link, where the run's folder belongs; "
            f"move it away, or choose another --experiment"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"output: {folder}: cannot be written: {one_line(error)}; choose another --output") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: the workers would inherit the lock
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"output: {folder}: another run is using this folder{_holder(lock)}; "
            f"wait for its end, or choose another --experiment"
        ) from None
    except OSError:  # a file system without locks
        pass
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a text
        lock.truncate(0)
        lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
        lock.flush()
    return lock


def _holder(lock: IO) -> str:
    """Return who holds the lock, as its file says, or nothing if that is a process that has ended."""
    try:
        found = json.loads(lock.read())
        if found["host"] == socket.gethostname():
            with contextlib.suppress(PermissionError):  # another user's process
                os.kill(found["pid"], 0)
        return f" (process {found['pid']} on {found['host']}, since {found['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _check_nothing_is_in_the_way(folder: Path) -> None:
    """Raise UserError if the run could not replace one of its files, or would replace something that is not a run's file."""
    replaced = [*TEXTS, *CHECKPOINTS]
    for name in [LOCK, *replaced, *(f"{name}.tmp" for name in replaced), *(f"{name}.damaged" for name in CHECKPOINTS)]:
        problem = _in_the_way(folder / name)
        if problem:
            raise UserError(
                f"output: {folder / name}: {problem}, where the run writes a file; "
                f"move it away, or choose another --experiment"
            )


def _in_the_way(path: Path) -> str:
    """Return why a file cannot be replaced, or nothing if it can. A link to a file can: only the link is replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else ""
    if stat.S_ISDIR(mode):
        return "a folder"
    if not stat.S_ISREG(mode):
        return "a device, pipe or socket"
    if path.name == LOCK:  # this one is opened, not replaced
        return "a link" if path.is_symlink() else "" if mode & 0o222 else "a read-only file"
    return ""


def describe(
    folder: Path, settings: TrainConfig, classes: Optional[List[str]], device: torch.device, world_size: int
) -> None:
    """Write config.yaml, run.json and classes.txt."""
    replace_text(folder / "config.yaml", config.to_yaml(settings))
    replace_text(folder / "run.json", json.dumps(provenance.describe(device, world_size), indent=2) + "\n")
    if classes is not None:
        replace_text(folder / "classes.txt", "\n".join(map(console.printable, classes)) + "\n")


def write_summary(path: Path, rows: List[Mapping[str, Any]]) -> None:
    """Write summary.csv as a whole, so that it has one header and no partial row."""
    if rows:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [[row.get(column, "") for column in columns] for row in rows]
        replace_text(path, console.table(columns, cells, "csv"))


def candidates(folder: Path, settings: TrainConfig) -> List[Path]:
    """Return the checkpoints that a run may resume from, the newest first: its own, else the one that `resume` names.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        if folder.is_dir():
            os.listdir(folder)
        paths = [folder / name for name in file_format.TO_CONTINUE if (folder / name).is_file()]
    except OSError as error:
        raise UserError(f"output: {folder}: cannot be read: {one_line(error)}; choose another --output") from None
    return paths or ([resume_path(settings)] if settings.run.resume else [])


def resume_path(settings: TrainConfig) -> Path:
    """Return the checkpoint that `resume` names: a file, or the last one of a run folder."""
    path = Path(settings.run.resume)
    return path / file_format.LAST if path.is_dir() else path
