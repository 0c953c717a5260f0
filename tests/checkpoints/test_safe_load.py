"""Files that claim more than they hold are refused before memory is taken."""

import gzip
import io
import pickle
import resource
import struct
import tarfile
import zipfile

import pytest
import torch

from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError

HUGE = 1 << 30  # elements


def archive(state, compression=zipfile.ZIP_STORED, change=lambda name, data: data):
    """Return the records of a checkpoint, stored again."""
    saved, again = io.BytesIO(), io.BytesIO()
    torch.save(state, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(again, "w", compression) as target:
        for record in source.infolist():
            target.writestr(record.filename, change(record.filename, source.read(record)))
    return again.getvalue()


def bomb():
    return archive({"w": torch.zeros(1 << 24)}, zipfile.ZIP_DEFLATED)


def claims(number):
    """A storage of 1000 elements that claims to have more."""
    new = b"J" + struct.pack("<i", number)
    return archive({"w": torch.zeros(1000)}, change=lambda _, data: data.replace(b"M\xe8\x03", new))


def expanded():
    return archive({"w": torch.zeros(1).expand(1 << 20, 1 << 20)})


def overlapping():
    """Many directory entries for one record."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        target.writestr("a/data/0", bytes(10_000))
        for number in range(1, 50):
            other = zipfile.ZipInfo(f"a/data/{number}")
            first = target.getinfo("a/data/0")
            other.header_offset, other.file_size, other.compress_size, other.CRC = (
                first.header_offset,
                10_000,
                10_000,
                first.CRC,
            )
            target.filelist.append(other)
            target.NameToInfo[other.filename] = other
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as target:
        for name in ("storages", "tensors", "pickle"):
            target.addfile(tarfile.TarInfo(name))
    return file.getvalue()


@pytest.mark.parametrize(
    "content, name, line",
    [
        (bomb, "w.pth", "refused: its records are compressed"),
        (lambda: claims(HUGE), "w.pth", "not a readable checkpoint"),
        (lambda: claims(1250), "w.pth", "not a readable checkpoint"),  # a little more than there is
        (expanded, "w.pth", "refused: its tensors claim to be larger"),
        (overlapping, "w.pth", "refused: its records claim to be larger"),
        (lambda: b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.", "w.pth", "not a readable"),
        (lambda: struct.pack("<Q", 90 << 20) + b"{}", "w.safetensors", "refused: its header is larger"),
        (lambda: struct.pack("<Q", 1000) + b"{}", "w.safetensors", "not a readable checkpoint"),
        (lambda: gzip.compress(bytes(1 << 26)), "w.pth.gz", "not a readable checkpoint"),
        (tar, "w.tar", "not a readable checkpoint"),
    ],
    ids="bomb claims claims-a-little expanded overlapping bytearray header short-header gz tar".split(),
)
def test_a_file_that_claims_more_than_it_holds(tmp_path, content, name, line):
    path = tmp_path / name
    path.write_bytes(content())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        file_format.read(path)
    assert line in str(error.value) and str(path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_tensors_are_copies_that_share_memory_as_before(tmp_path):
    weight = torch.arange(6.0)
    state = {"a": weight, "b": weight[2:].view(2, 2), "list": [weight, (weight.half(),)], "n": None}
    state["self"] = state
    torch.save(state, tmp_path / "w.pth")
    read = file_format.read(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(bytes(10_000))  # a mapped file would change the tensors
    assert torch.equal(read["a"], weight) and torch.equal(read["b"], weight[2:].view(2, 2))
    assert read["list"][0].data_ptr() == read["a"].data_ptr() and read["list"][1][0].dtype is torch.half
    read["a"][2] = 7
    assert read["b"][0, 0] == 7 and read["self"] is read


def test_the_legacy_format_is_read(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(file_format.read(tmp_path / "w.pth")["w"], torch.ones(3))
