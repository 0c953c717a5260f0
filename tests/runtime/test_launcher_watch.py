"""A rank notices that torchrun has died, also through a shell between them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tnt_timm.runtime import launcher_watch
from tnt_timm.runtime.launch import Launch
from tnt_timm.runtime.launcher_watch import Link, find_link, watching_launcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_without_torchrun_nothing_is_watched(monkeypatch):
    """A run in the background outlives its shell, with nohup or without."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert find_link() is None


def test_the_link_to_torchrun_leads_through_a_shell(monkeypatch):
    marked = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
    with subprocess.Popen(["bash", "-c", "sleep 60 & echo $!; wait"], env=marked, stdout=subprocess.PIPE) as shell:
        rank = int(shell.stdout.readline())
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: rank)
            patch.setattr(os, "getppid", lambda: shell.pid)
            link = find_link()
        assert link == Link(os.getpid(), shell.pid) and not link.is_broken()
        shell.kill()
        os.kill(rank, signal.SIGKILL)
    assert link.is_broken()


@pytest.mark.parametrize("dies", [True, False])
def test_a_rank_gets_sigterm_when_torchrun_dies(monkeypatch, dies):
    monkeypatch.setattr(launcher_watch, "CHECK_S", 0.05)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    read, write = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:  # the rank
            signal.signal(signal.SIGTERM, lambda *_: os.write(write, b"SIGTERM\n"))
            with watching_launcher(Launch(1, 2, 1)):
                os.write(write, b"ready\n")
                time.sleep(1 if not dies else 2)
            os.write(write, b"end\n")
            os._exit(0)
        time.sleep(60)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        assert said.readline() == "ready\n"
        if dies:
            os.kill(launcher, signal.SIGKILL)
        assert said.readline() == ("SIGTERM\n" if dies else "end\n")
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
