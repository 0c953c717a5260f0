"""How long threads wait for a core: measured next to a busy process, and reported once."""

import json
import os
import subprocess
import sys

import pytest

from tnt_timm.runtime import cpu_contention
from tnt_timm.runtime.cpu_contention import CpuWait

NEXT_TO_A_BUSY_PROCESS = """
import json, os, subprocess, sys, time, torch
from tnt_timm.runtime.cpu_contention import CpuWait

torch.set_num_threads(1)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # this process and the busy one get the same core
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
wait = CpuWait()
while time.perf_counter() - wait.start < 2:
    pass
busy.kill()
print(json.dumps(wait.share()))
"""
WARNING = "too few free CPU cores"


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this system does not count it")
def test_a_busy_process_on_the_same_core_is_seen():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", NEXT_TO_A_BUSY_PROCESS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) > cpu_contention.NOTABLE


@pytest.fixture
def wait(tmp_path, monkeypatch):
    """A CpuWait of two threads; `wait.advance` lets time and waiting pass, in seconds."""
    clock = [100.0]
    waited_s = {"t1": 5.0, "t2": 0.0}

    def advance(seconds, **more_s):
        clock[0] += seconds
        for thread, s in more_s.items():
            waited_s[thread] = waited_s.get(thread, 0) + s
        for thread, s in waited_s.items():
            (tmp_path / thread).mkdir(exist_ok=True)
            (tmp_path / thread / "schedstat").write_text(f"1 {1e9 * s:.0f} 3\n")

    monkeypatch.setattr(cpu_contention.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cpu_contention.torch, "get_num_threads", lambda: 2)
    advance(0)
    found = CpuWait(tmp_path)
    found.advance = advance
    return found


def test_long_waits_are_reported_once_with_the_remedy(wait):
    wait.advance(10, t1=9, t2=9)
    assert wait.warning(True) is None  # too early to tell
    wait.advance(12, t2=2, t3=2)  # a thread that has started since counts as well
    text = wait.warning(True)
    assert text.startswith(WARNING) and "2 threads waited for one 50 % of the time" in text
    assert "--threads 1" in text and "OMP_WAIT_POLICY=passive" in text
    wait.advance(30, t1=30, t2=30)
    assert wait.warning(True) is None


def test_a_quiet_machine_gives_no_warning_and_each_window_counts_alone(wait):
    wait.advance(21, t1=0.5)
    assert wait.warning(True) is None
    wait.advance(21, t1=20)
    text = wait.warning(False)
    assert text.endswith("waited for one 48 % of the time; stop other processes, or lower --workers")


def test_systems_that_do_not_count_give_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_contention, "WINDOW_S", 0.0)
    assert CpuWait(tmp_path / "missing").warning(True) is None


def test_training_and_validation_print_it(train, run_validate, monkeypatch):
    monkeypatch.setattr(CpuWait, "warning", lambda self, on_cpu: WARNING if on_cpu else None)
    out, folder = train(
        "--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--device", "cpu", "-b", "8", "--lr", "1e-3"
    )
    assert f"warning: {WARNING}" in out.out
    assert f"warning: {WARNING}" in run_validate(folder, "--device", "cpu").out
