"""Files that are there whole or not at all: written beside their place, flushed to the disk, then renamed."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import IO, Callable, Optional

from tnt_timm.errors import UserError, one_line


def replace(
    path: Path,
    write: Callable[[IO[bytes]], object],
    check: Optional[Callable[[Path], object]] = None,
    keep_as: Optional[Path] = None,
) -> None:
    """Let `write` fill a new file, then put it in the place of `path`.

    Args:
        path: of the file.
        write: fills it.
        check: reads the new file back from the disk, before it takes its place, and raises when it is not whole.
        keep_as: where the old file goes; without it, the old file is no more.

    Raises:
        UserError: the disk is full or the folder cannot be written; the old file is still whole.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.unlink(missing_ok=True)  # where `link` was killed, it is another name of a whole file
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if check is not None and hasattr(os, "posix_fadvise"):  # read it back from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if check is not None:
            check(beside)
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(beside, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        raise UserError(f"{path}: cannot be written: {one_line(cause)}; what was there before is whole") from None


def link(source: Path, path: Path) -> None:
    """Let `path` be another name of the file `source`, or a copy of it where the file system has no such links.

    Raises:
        UserError: the folder cannot be written; what had that name before is still whole.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            with open(source, "rb") as old, open(beside, "wb") as new:
                shutil.copyfileobj(old, new)
                new.flush()
                os.fsync(new.fileno())
        os.replace(beside, path)
        beside.unlink(missing_ok=True)  # which a rename leaves where both are names of one file already
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {one_line(error)}; what was there before is whole") from None


def _flush_folder(folder: Path) -> None:
    """Its renames themselves."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """The same for a text."""
    replace(path, lambda file: file.write(text.encode()))
