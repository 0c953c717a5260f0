"""keeper.py without SLURM: scripts of the same names stand in for the daemons."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, sys.argv[1], sys.argv[2], str(os.getpid())], start_new_session=True)
time.sleep(300)
"""


def wait_until(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def parent(tmp_path):
    """A process that has started a keeper, whose n0 has started a process and left it. Gives the process, and that one's id."""
    for name in ("bin", "cluster"):
        (tmp_path / name).mkdir()
    pid_file = tmp_path / "pid"
    scripts = {
        "munged": f"touch {tmp_path}/cluster/munge.socket; exec sleep 300",
        "slurmctld": "exec sleep 300",
        "slurmd": f"[ $3 = n1 ] && exit 3; (setsid sleep 300 & echo $! > {pid_file}); exec sleep 300",
    }
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    command = [sys.executable, "-c", PARENT, Path(__file__).with_name("keeper.py"), tmp_path / "cluster"]
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with (tmp_path / "keeper.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, start_new_session=True)
    try:
        wait_until(lambda: "n1" in (tmp_path / "keeper.log").read_text() and pid_file.exists() and pid_file.read_text())
        yield process, int(pid_file.read_text())
    finally:
        process.kill()
        process.wait()


def test_when_the_tests_are_killed_nothing_of_the_cluster_is_left(parent, tmp_path):
    process, orphan = parent
    os.killpg(process.pid, signal.SIGKILL)
    wait_until(lambda: not (tmp_path / "cluster").exists())
    assert not Path(f"/proc/{orphan}").exists()


def test_a_daemon_that_ends_is_named_and_the_others_stay(parent, tmp_path):
    _, orphan = parent
    assert (tmp_path / "keeper.log").read_text() == "n1 ended with status 3\n"
    assert (tmp_path / "cluster").exists() and Path(f"/proc/{orphan}").exists()
