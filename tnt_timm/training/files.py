"""Files that are there whole or not at all: written beside their place, flushed to the disk, then renamed."""

import os
from pathlib import Path
from typing import IO, Callable

from tnt_timm.errors import UserError, one_line


def replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a new file, then put it in the place of `path`.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is still whole.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {one_line(error)}; what was there before is whole") from None


def replace_text(path: Path, text: str) -> None:
    """The same for a text."""
    replace(path, lambda file: file.write(text.encode()))
