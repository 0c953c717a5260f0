"""The run folder: what is in the way of a run's files, and who holds its lock."""

import fcntl
import json
import os
import re
import socket
import subprocess
import sys

import pytest

from tnt_timm.checkpoints import run_folder
from tnt_timm.errors import UserError

FILES = """.lock config.yaml run.json classes.txt summary.csv config.json model.safetensors wandb.json last.pth.tar
    previous.pth.tar epoch_start.pth.tar model_best.pth.tar last.pth.tar.tmp model_best.pth.tar.damaged config.yaml.tmp""".split()


def read_only(path) -> None:
    path.write_text("protected")
    path.chmod(0o444)


IN_THE_WAY = {
    "a folder": lambda path: path.mkdir(),
    "a device, pipe or socket": os.mkfifo,
    "a link to nowhere, which does not exist": lambda path: path.symlink_to("nowhere"),
    "a read-only file": read_only,
}


@pytest.mark.parametrize("what", IN_THE_WAY)
@pytest.mark.parametrize("name", FILES)
def test_what_is_in_the_way_of_a_file_is_an_error(tmp_path, name, what):
    if what == "a read-only file" and name != ".lock":
        pytest.skip("it can be replaced")
    IN_THE_WAY[what](tmp_path / name)
    with pytest.raises(UserError, match=re.escape(f"output: {tmp_path / name}: {what}, where the run writes a file; ")):
        run_folder.prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {name}


def test_a_link_to_a_file_is_replaced_but_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("all my work")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.csv").symlink_to(precious)
    run_folder.prepare(folder).close()
    run_folder.write_summary(folder / "summary.csv", [{"epoch": "0"}])
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="a link, where the run writes a file"):
        run_folder.prepare(folder)
    assert precious.read_text() == "all my work" and (folder / "summary.csv").read_text() == "epoch\n0\n"


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: path.symlink_to("nowhere")])
def test_a_file_where_the_folder_belongs(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(UserError, match="a file or a dead link, where the run's folder belongs"):
        run_folder.prepare(tmp_path / "run")


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "r+")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


@pytest.mark.parametrize("written_by", ["the holder", "another machine's", "an ended process", "nobody"])
def test_the_lock_says_who_holds_it(tmp_path, written_by):
    host, pid = socket.gethostname(), 2**22 + 1  # above the largest pid of Linux
    (tmp_path / ".lock").write_text("")
    hold = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        host = "node7" if written_by == "another machine's" else host
        pid = other.pid if written_by == "the holder" else pid
        text = json.dumps({"host": host, "pid": pid, "since": "2026-01-31 10:00"}) if written_by != "nobody" else ""
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(UserError) as error:
            run_folder.prepare(tmp_path)
        other.kill()
    known = written_by in ("the holder", "another machine's")
    holder = f" (process {pid} on {host}, since 2026-01-31 10:00)" * known
    assert f"output: {tmp_path}: another run is using this folder{holder}; wait for its end" in str(error.value)


def test_the_lock_file_is_written_anew(tmp_path):
    (tmp_path / ".lock").write_text("x" * 1000)
    lock = run_folder.prepare(tmp_path)
    found = json.loads((tmp_path / ".lock").read_text())
    assert found["pid"] == os.getpid() and found["host"] == socket.gethostname() and found["since"].startswith("20")
    lock.close()
    fcntl.lockf((tmp_path / ".lock").open("r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_in_the_way_is_an_error_before_training(train, tmp_path):
    blocker = tmp_path / "out" / "run" / "last.pth.tar" / "mine"
    blocker.mkdir(parents=True)
    out, _ = train(*"--epochs 1 --lr 1e-3 --warmup-epochs 0 --cooldown-epochs 0 -b 8 --workers 0".split(), status=1)
    assert f"{blocker.parent}: a folder, where the run writes a file" in out.error and blocker.is_dir()
    assert {path.name for path in blocker.parents[1].iterdir()} == {"last.pth.tar"}
