"""`--resume FILE` in a run folder that has checkpoints of its own: FILE is obeyed or refused, never ignored.

The folder's own checkpoint is the one to continue from if it is that file, or if its run was resumed from that file: the same
command continues the run after an interruption. Each checkpoint therefore records where its run was resumed from. A file that
was saved elsewhere, because the folder was full, continues the folder's run.
"""

import os
from pathlib import Path
from typing import Any, Dict, Mapping

from tnt_timm.checkpoints import checksum, file_format
from tnt_timm.errors import ConfigError

RESUMED_FROM = "resumed_from"  # key of a checkpoint: `origin_of` the file that `resume` named
RESCUED_FROM = "rescued_from"  # key of a checkpoint that could not be saved in this folder


def origin_of(path: Path) -> Dict[str, str]:
    """Return what identifies a checkpoint file: its path, and its size and checksum."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - checksum.TRAILER_SIZE))
        return {"path": str(path.resolve()), "content": f"{size} {file.read().hex()}"}


def has_changed(named: Path, saved: Mapping[str, Any]) -> bool:
    """Return whether the file from which a run was resumed is another one by now."""
    origin = saved.get(RESUMED_FROM) or {}
    return named.is_file() and origin.get("path") == str(named.resolve()) and origin != origin_of(named)


def replaces(named: Path, own: Path, saved: Mapping[str, Any]) -> bool:
    """Return whether a run continues from the file that `resume` names instead of its folder's own checkpoint.

    Args:
        named: that file.
        own: the newest intact checkpoint in the run folder.
        saved: its content.

    Raises:
        UserError: the file cannot be read, belongs to another run, or is older than the folder's own checkpoint.
    """
    if RESUMED_FROM not in saved:  # of an older version
        return False
    path, origin = str(named.resolve()), saved.get(RESUMED_FROM) or {}
    if path in (str(own.resolve()), origin.get("path")):
        return False
    state = file_format.read(named)
    if origin_of(named)["content"] in (origin_of(own)["content"], origin.get("content")):
        return False
    of_this_run = state.get(RESCUED_FROM) == str(own.parent.resolve())
    if of_this_run and state["progress"]["updates"] > saved["progress"]["updates"]:
        return True
    if of_this_run or named.resolve().parent == own.parent.resolve():
        reason = f"is older than {own.name}, from which this run continues"
    else:
        reason = f"is not the file from which the run in {own.parent} started"
    raise ConfigError(
        f"resume: {named}: {reason}; leave --resume out to continue that run, "
        f"or choose another --experiment to start from {named.name}"
    )
