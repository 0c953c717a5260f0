"""Write files atomically: into a temporary file, flushed to disk, then renamed. A crash leaves the old file or the new one."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import IO, Callable, Iterator, Optional

from tnt_timm.errors import UserError, one_line


def replace(
    path: Path,
    write: Callable[[IO[bytes]], object],
    check: Optional[Callable[[Path], object]] = None,
    keep_as: Optional[Path] = None,
) -> None:
    """Write a new file, then rename it to `path`.

    Args:
        path: the file to create or replace.
        write: fills the new file.
        check: reads the new file back from disk before the rename. Raises OSError if the file is damaged.
        keep_as: new name of the old file (default: the old file is deleted).

    Raises:
        UserError: the disk is full or the folder cannot be written. The old file is intact.
    """
    with _renamed_to(path, keep_as) as temporary:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if check is not None and hasattr(os, "posix_fadvise"):  # drop the cache, so that `check` reads the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if check is not None:
            check(temporary)


def replace_text(path: Path, text: str) -> None:
    """`replace` for a text, as UTF-8. A name in it whose bytes are not UTF-8 keeps them."""
    try:
        content = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:  # half of a pair of UTF-16, as from a JSON file
        raise UserError(f"{path}: cannot be written: {one_line(error)}; the old file is intact") from None
    replace(path, lambda file: file.write(content))


def link(source: Path, path: Path) -> None:
    """Make `path` a hard link to `source`, or a copy if the file system has no hard links.

    Raises:
        UserError: the folder cannot be written. An old file at `path` is intact.
    """

    def copy(file: IO[bytes]) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file)

    try:
        with _renamed_to(path) as temporary:
            os.link(source, temporary)
    except UserError:
        replace(path, copy)


@contextlib.contextmanager
def _renamed_to(path: Path, keep_as: Optional[Path] = None) -> Iterator[Path]:
    """Yield the path of a temporary file for the caller to create; at the end of the context, rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a kill; after `link`, writing into it would change `source`
        yield temporary
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
        temporary.unlink(missing_ok=True)  # still there if both names were links to one file
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # makes the renames durable
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        raise UserError(f"{path}: cannot be written: {one_line(cause)}; the old file is intact") from None
