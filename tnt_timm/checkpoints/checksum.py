"""A checksum of a whole checkpoint file, to detect every changed bit and every truncation.

torch.save writes a zip archive, whose own checksums cover the records, but not their names or the directory at its end: a
flipped bit there can exchange two weights. So the CRC-32 of the whole archive is stored as the zip comment, which readers of
zip archives (torch.load and timm among them) ignore:

    archive ... PK\\5\\6 ... | length of the comment, 2 bytes (was 0) | tnt-timm CRC-32 <8 hexadecimal digits>

CRC-32 detects every single-bit error, every burst of up to 32 bits, and all but one in four billion other errors. It does
not protect against tampering. It is the fastest checksum in Python: 7.0 GB/s on one core of an AMD EPYC, against 1.4 for
BLAKE2b and 2.0 for SHA-256 (0.7 without SHA instructions).
"""

import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any, Mapping, Optional

import torch

MARK = b"tnt-timm CRC-32 "
COMMENT_SIZE = len(MARK) + 8
TRAILER_SIZE = 2 + COMMENT_SIZE
NO_COMMENT = struct.pack("<H", 0)  # the last bytes of an archive that torch.save wrote
END_RECORD, END_SIZE = b"PK\5\6", 22  # the last record of an archive without a comment
CHUNK = 1 << 20


class _Checksummed:
    """A file opened for writing, and the checksum of what is written."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.checksum = 0
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)


def save(state: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write a state into an empty file with torch.save, and add the checksum."""
    checksummed = _Checksummed(file)
    torch.save(dict(state), checksummed)
    file.seek(-len(NO_COMMENT), os.SEEK_END)
    file.write(_trailer(checksummed.checksum))


def is_whole(path: Path) -> Optional[bool]:
    """Return whether a file matches its checksum; None if it was written without one, by other programs."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TRAILER_SIZE - END_SIZE))
        tail = file.read()
        plain_archive = tail[-END_SIZE:].startswith(END_RECORD) and tail.endswith(NO_COMMENT)
        if MARK not in tail and (END_RECORD not in tail or plain_archive):
            return None
        file.seek(0)
        checksum, left = 0, size - TRAILER_SIZE
        while left > 0 and (chunk := file.read(min(left, CHUNK))):
            checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
        return tail[-TRAILER_SIZE:] == _trailer(zlib.crc32(NO_COMMENT, checksum))


def _trailer(checksum: int) -> bytes:
    return struct.pack("<H", COMMENT_SIZE) + MARK + b"%08x" % checksum
