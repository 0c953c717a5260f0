"""Checkpoints: written so that a crash leaves the old one or the new one, read without running pickled code.

A checkpoint is one dict of tensors and plain values. Keys, timm's names where timm has one:

    arch, model_kwargs, num_classes, classes, preprocessing    what the network is and what it eats
    state_dict, state_dict_ema, weights                        its weights, and which of the two were selected
    config, versions, metrics, epoch, world_size               where it comes from
    optimizer, amp_scaler, progress                            only in the one to continue from

The file carries a checksum of itself (checksum.py); those of others, without one, are read as well.
"""

import argparse
import zipfile
from pathlib import Path
from typing import IO, Any, Dict, Mapping, Optional

import torch
from torch import nn

from tnt_timm import files
from tnt_timm.checkpoints import checksum
from tnt_timm.errors import UserError, one_line
from tnt_timm.models.convert_weights import differences

LAST = "last.pth.tar"
PREVIOUS = "previous.pth.tar"  # the one before it
EPOCH_START = "epoch_start.pth.tar"  # the one from which the current epoch began
TO_CONTINUE = (LAST, PREVIOUS, EPOCH_START)  # the newest first
BEST = "model_best.pth.tar"


class DamagedError(UserError):
    """A checkpoint that is truncated, or whose checksums do not fit."""


def write(path: Path, state: Mapping[str, Any], keep_as: Optional[Path] = None) -> None:
    """Write a checkpoint and read it back; the one before goes to `keep_as`.

    Raises:
        UserError: it cannot be written; the old one is still whole.
    """

    def save(file: IO[bytes]) -> None:
        checksum.write_sealed(file, lambda file: torch.save(dict(state), file))

    files.replace(path, save, _check_whole, keep_as)


def _check_whole(path: Path) -> None:
    if not checksum.is_whole(path):
        raise OSError("read back, it is damaged: its checksum is wrong")


def read(path: Path) -> Dict[str, Any]:
    """The dict in a checkpoint file, on the CPU; .safetensors files give {"state_dict": ...}.

    Raises:
        UserError: missing, truncated, no checkpoint, or a pickle that carries code (which is never run).
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"state_dict": load_file(path)}
        whole = checksum.is_whole(path)
        if whole is False:
            raise DamagedError(f"{path}: damaged: its checksum is wrong; use another copy")
        if whole is None and zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise DamagedError(f"{path}: damaged: the checksum of {damaged} is wrong; use another copy")
        with torch.serialization.safe_globals([argparse.Namespace]):  # how timm, DeiT and the official TNT keep `args`
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch has a different exception for each kind of broken file
        text = str(error)
        with path.open("rb") as file:
            is_pickle = file.read(4).startswith((b"PK\3\4", b"\x80"))  # else, say, the zeros that a lost machine leaves
        if is_pickle and ("weights_only" in text or "Unsupported" in text):
            raise UserError(f"{path}: not plain weights: refused, and nothing of it was run as code") from None
        raise DamagedError(
            f"{path}: not a readable checkpoint (truncated or damaged?): {one_line(error, 120)}"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def find(path: Path) -> Path:
    """The checkpoint that a path means: the file itself, or of a run folder the selected weights, else the last ones.

    Raises:
        UserError: a folder without checkpoints.
    """
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: no {BEST} in this folder; give a run folder or a checkpoint file")


def weights_of(state: Mapping[str, Any], which: str = "", place: str = "") -> Dict[str, torch.Tensor]:
    """The weights in a checkpoint of ours, of timm's, or a bare state dict, without wrappers' prefixes.

    Args:
        state: the checkpoint.
        which: "ema", "raw", or "" for those that were selected (EMA where there are any).
        place: what to call the checkpoint in an error.

    Raises:
        UserError: averaged weights are asked for and there are none.
    """
    which = which or state.get("weights") or ("ema" if state.get("state_dict_ema") is not None else "raw")
    keys = ("state_dict_ema", "model_ema") if which == "ema" else ("state_dict", "model")
    if which == "ema" and not any(isinstance(state.get(key), dict) for key in keys):
        raise UserError(f"{place}: holds no averaged weights (EMA); leave --use-ema out")
    weights = next((state[key] for key in keys if isinstance(state.get(key), dict)), state)
    return {_without_wrappers(name): value for name, value in weights.items()}


def _without_wrappers(name: str) -> str:
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], place: str) -> None:
    """Load weights strictly.

    Raises:
        UserError: naming the first tensors that do not fit, when the weights are another architecture's.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        problems = "; ".join(differences(weights, model.state_dict())) or one_line(error)
        raise UserError(f"{place}: weights of another architecture: {problems}") from None
