"""Load a file of weights that may come from anyone: it runs no code, and takes no more memory than the file has bytes.

torch.load(weights_only=True) runs no code, but believes the sizes that a file claims. torch.save stores records as they are, so
an honest file is at least as large as its content. Everything else is refused before memory is taken.
"""

import argparse
import struct
import zipfile
from pathlib import Path
from typing import Any, Dict, Set, Tuple

import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHIVE = b"PK\3\4"  # how torch.load tells an archive from older formats
LARGEST_HEADER = 16 << 20  # bytes of a .safetensors header: more than 100,000 tensors


class Refused(ValueError):
    """A file claims to be larger than it is, or holds something else than weights."""


def load(path: Path, check_records: bool) -> Any:
    """Return the content of a checkpoint, with its tensors on the CPU. A .safetensors file gives {"state_dict": ...}.

    `check_records` reads an archive once more and compares its records with their own checksums.

    Raises:
        Refused: the file claims more than it can hold.
        Exception: whatever torch and safetensors raise for files that are damaged, or contain pickled code.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix == ".safetensors":
        if len(head) == 8 and struct.unpack("<Q", head)[0] > LARGEST_HEADER:
            raise Refused(f"its header is larger than {LARGEST_HEADER >> 20} MiB")
        return {"state_dict": load_file(path)}
    is_archive = head.startswith(ARCHIVE)
    if is_archive:
        _check_archive(path, size, check_records)
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm, DeiT and the official TNT store `args` so
        # Mapped into memory, a storage cannot reach beyond the end of the file
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    return _Copy(size).copy(state)


def _check_archive(path: Path, size: int, check_records: bool) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("its records are compressed, which torch.save never does; save it again with torch.save")
        if sum(max(record.file_size, record.compress_size) for record in records) > size:
            raise Refused("its records claim to be larger than the file")
        if check_records and archive.testzip() is not None:
            raise zipfile.BadZipFile("damaged: the checksum of a record is wrong")


class _Copy:
    """Copy tensors out of a mapped file, which others may change. Tensors that share memory still do.

    Args:
        size: of the file in bytes; the storages may not have more in all.
    """

    def __init__(self, size: int):
        self.size = self.left = size
        self.storages: Dict[Tuple[int, int], torch.UntypedStorage] = {}
        self.seen: Set[int] = set()  # containers, which may contain themselves

    def copy(self, value: Any) -> Any:
        """Return a value with its tensors copied; dicts, lists and namespaces are changed in place."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, tuple):
            return tuple(map(self.copy, value)) if type(value) is tuple else value
        if id(value) in self.seen:
            return value
        self.seen.add(id(value))
        if isinstance(value, argparse.Namespace):
            self.copy(vars(value))
        elif isinstance(value, dict):
            value.update({key: self.copy(item) for key, item in value.items()})
        elif isinstance(value, list):
            value[:] = map(self.copy, value)
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_quantized
        if not plain or value.device.type != "cpu":
            raise Refused(f"it holds a tensor of another kind than weights ({value.layout}, {value.device})")
        storage = value.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in self.storages:
            self.left -= storage.nbytes()
        if self.left < 0 or value.nbytes > self.size:
            raise Refused("its tensors claim to be larger than the file")
        if key not in self.storages:
            self.storages[key] = storage.clone()
        return torch.empty(0, dtype=value.dtype).set_(
            self.storages[key], value.storage_offset(), value.shape, value.stride()
        )
