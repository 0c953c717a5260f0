"""The checkpoint file: written atomically, and read without running pickled code.

A checkpoint is one dict of tensors and plain values. Its keys are timm's where timm has one:

    arch, model_kwargs, num_classes, classes, preprocessing    the network and its input
    state_dict, state_dict_ema, weights                        its weights, and which of the two are selected
    config, data, versions, metrics, epoch, world_size         where it comes from
    optimizer, amp_scaler, progress, resumed_from              only in checkpoints to resume from

Each file carries a checksum (checksum.py). Files of other programs, without one, are read as well.
"""

import errno
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import torch
from torch import nn

from tnt_timm import atomic_files
from tnt_timm.checkpoints import checksum, safe_load
from tnt_timm.errors import UserError, one_line
from tnt_timm.models.convert_weights import differences

LAST = "last.pth.tar"
PREVIOUS = "previous.pth.tar"  # the one before LAST
EPOCH_START = "epoch_start.pth.tar"  # where the current epoch began
NOT_THE_FILES_FAULT = (errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ETIMEDOUT)
TO_CONTINUE = (LAST, PREVIOUS, EPOCH_START)  # the newest first
BEST = "model_best.pth.tar"


class DamagedError(UserError):
    """A checkpoint is truncated, or its checksum is wrong."""


def write(path: Path, state: Mapping[str, Any], keep_as: Optional[Path] = None) -> None:
    """Write a checkpoint and read it back. If `keep_as` is given, the old file gets that name.

    Raises:
        UserError: the file cannot be written. The old one is intact.
    """
    atomic_files.replace(path, lambda file: checksum.save(state, file), _check_whole, keep_as)


def _check_whole(path: Path) -> None:
    if not checksum.is_whole(path):
        raise OSError("it was damaged on its way to the disk (wrong checksum when read back)")


def read(path: Path) -> Dict[str, Any]:
    """Return the dict in a checkpoint file, on the CPU. A .safetensors file gives {"state_dict": ...}.

    Raises:
        UserError: missing, truncated, not a checkpoint, a pickle that contains code (which is never run), or a file that
            claims to hold more than it can.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    whole: Optional[bool] = None
    try:
        whole = checksum.is_whole(path)
        if whole is False:
            raise DamagedError(f"{path}: damaged: its checksum is wrong; use another copy")
        state = safe_load.load(path, check_records=whole is None)
    except safe_load.Refused as error:
        raise UserError(f"{path}: refused: {error}") from None
    except UserError:
        raise
    except Exception as error:  # torch has a different exception for each kind of broken file
        with path.open("rb") as file:
            is_pickle = file.read(4).startswith((b"PK\3\4", b"\x80"))  # and not, say, zeros after a crash
        if is_pickle and any(text in str(error) for text in ("weights_only", "Unsupported")):
            raise UserError(f"{path}: refused: it contains more than plain weights; none of its code was run") from None
        reason = one_line(error, 120)
        if whole or getattr(error, "errno", None) in NOT_THE_FILES_FAULT:
            raise UserError(f"{path}: cannot be read: {reason}") from None
        raise DamagedError(f"{path}: not a readable checkpoint (truncated or damaged?): {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: contains a {type(state).__name__} instead of a checkpoint's dict")
    return state


def find(path: Path) -> Path:
    """Return the checkpoint that a path means: the file itself, or a run folder's best checkpoint, else its last one.

    Raises:
        UserError: a folder without checkpoints.
    """
    found = in_folder(path) if path.is_dir() else path
    if found is None:
        raise UserError(f"{path}: no {BEST} in this folder; give a run folder or a checkpoint file")
    return found


def in_folder(path: Path) -> Optional[Path]:
    """Return a run folder's best checkpoint, else its last one, else None."""
    return next((path / name for name in (BEST, LAST) if (path / name).is_file()), None)


def weights_of(state: Mapping[str, Any]) -> Dict[str, torch.Tensor]:
    """Return the selected weights in a checkpoint of this project."""
    return state["state_dict_ema" if state["weights"] == "ema" else "state_dict"]


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], place: str) -> None:
    """Load weights strictly.

    Raises:
        UserError: the weights are another architecture's. Names the first tensors that do not fit.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problems = "; ".join(differences(weights, model.state_dict())) or one_line(error)
        raise UserError(f"{place}: weights of another architecture: {problems}") from None
