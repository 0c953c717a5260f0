"""Every changed bit and every truncation of a checkpoint is detected, and other programs can read the file."""

from pathlib import Path

import pytest
import timm
import torch

from tnt_timm.checkpoints import checksum, file_format
from tnt_timm.checkpoints.file_format import DamagedError

STATE = {"state_dict": {"a": torch.arange(3.0), "b": -torch.arange(3.0)}, "epoch": 3}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    file_format.write(tmp_path / "last.pth.tar", STATE)
    return tmp_path / "last.pth.tar"


def assert_same(state) -> None:
    assert state.keys() == STATE.keys() and state["epoch"] == 3
    assert all(torch.equal(state["state_dict"][name], STATE["state_dict"][name]) for name in "ab")


def test_every_bit_of_the_file(checkpoint):
    """One flipped bit is detected anywhere: in records, their names, the directory, padding and the checksum itself."""
    whole = checkpoint.read_bytes()
    assert len(whole) < 5000 and whole.count(b"PK\1\2") == 8
    with checkpoint.open("r+b", buffering=0) as file:
        for place, byte in enumerate(whole):
            for bit in range(8):
                file.seek(place)
                file.write(bytes([byte ^ 1 << bit]))
                with pytest.raises(DamagedError):
                    file_format.read(checkpoint)
            file.seek(place)
            file.write(bytes([byte]))
    assert_same(file_format.read(checkpoint))


def test_cut_anywhere(checkpoint):
    """At every byte of the checksum and of the records that end the archive."""
    whole = checkpoint.read_bytes()
    for length in (*range(0, len(whole), 64), *range(len(whole) - 120, len(whole))):
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            file_format.read(checkpoint)


def test_blocks_that_a_crash_leaves(checkpoint):
    whole = checkpoint.read_bytes()
    for start in range(0, len(whole), 64):
        for end in (start + 64, start + 512, len(whole)):
            block = whole[start:end]
            for other in {bytes(len(block)), b"\xff" * len(block), whole[: len(block)]} - {block}:
                checkpoint.write_bytes(whole[:start] + other + whole[end:])
                with pytest.raises(DamagedError):
                    file_format.read(checkpoint)


def test_torch_and_timm_read_a_file_with_a_checksum(checkpoint):
    assert checksum.is_whole(checkpoint)
    for mmap in (False, True):
        assert_same(torch.load(checkpoint, weights_only=True, mmap=mmap))
    assert timm.models.load_state_dict(checkpoint).keys() == {"a", "b"}


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_other_programs_have_no_checksum_and_are_read(tmp_path, legacy):
    """So is one of our own that torch.save has written again."""
    torch.save(STATE, tmp_path / "other.pth", _use_new_zipfile_serialization=not legacy)
    assert checksum.is_whole(tmp_path / "other.pth") is None
    assert_same(file_format.read(tmp_path / "other.pth"))
