"""How long threads wait for a core: measured beside a busy process, and said once."""

import json
import os
import subprocess
import sys

import pytest

from tnt_timm.runtime import cpu_wait
from tnt_timm.runtime.cpu_wait import CpuWait

BESIDE_A_BUSY_PROCESS = """
import json, os, subprocess, sys, time, torch
from tnt_timm.runtime.cpu_wait import CpuWait

torch.set_num_threads(1)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # this process and the busy one get the same core
busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
wait = CpuWait()
while time.perf_counter() - wait.start < 2:
    pass
busy.kill()
print(json.dumps(wait.share()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this system does not count it")
def test_a_busy_process_on_the_same_core_is_seen():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", BESIDE_A_BUSY_PROCESS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) > cpu_wait.NOTABLE


@pytest.fixture
def wait(tmp_path, monkeypatch):
    """A CpuWait of two threads, and a function that lets time and waiting pass."""
    clock = [100.0]
    waited = {"1": 5_000_000_000, "2": 0}

    def write():
        for thread, ns in waited.items():
            (tmp_path / thread).mkdir(exist_ok=True)
            (tmp_path / thread / "schedstat").write_text(f"1 {ns} 3\n")

    def pass_time(seconds, **more_s):
        clock[0] += seconds
        for thread, s in more_s.items():
            waited[thread[1:]] = waited.get(thread[1:], 0) + int(1e9 * s)
        write()

    monkeypatch.setattr(cpu_wait.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cpu_wait.torch, "get_num_threads", lambda: 2)
    write()
    found = CpuWait(tmp_path)
    found.pass_time = pass_time
    return found


def test_threads_that_wait_long_are_said_once_with_the_remedy(wait):
    wait.pass_time(10, t1=9, t2=9)
    assert wait.warning(True) is None  # too early to tell
    wait.pass_time(12, t2=2, t3=2)  # a thread that has begun since counts as well
    said = wait.warning(True)
    assert "2 threads waited for one 50 % of the time" in said
    assert "--threads 1" in said and "OMP_WAIT_POLICY=passive" in said
    wait.pass_time(30, t1=30, t2=30)
    assert wait.warning(True) is None


def test_a_quiet_machine_is_not_worth_a_word_and_each_window_counts_alone(wait):
    wait.pass_time(21, t1=0.5)
    assert wait.warning(True) is None
    wait.pass_time(21, t1=20)
    said = wait.warning(False)
    assert said.endswith("waited for one 48 % of the time; stop other processes, or lower --workers")


def test_systems_that_do_not_count_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_wait, "WINDOW_S", 0.0)
    assert CpuWait(tmp_path / "missing").warning(True) is None


def test_a_run_says_it(train, monkeypatch):
    monkeypatch.setattr(CpuWait, "warning", lambda self, on_cpu: "too few free CPU cores" if on_cpu else None)
    out, _ = train("--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--device", "cpu", "-b", "8")
    assert "warning: too few free CPU cores" in out.out


def test_validation_says_it_as_well(train, run_validate, monkeypatch):
    _, folder = train("--epochs", "1", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--device", "cpu", "-b", "8")
    monkeypatch.setattr(CpuWait, "warning", lambda self, on_cpu: "too few free CPU cores" if on_cpu else None)
    assert "warning: too few free CPU cores" in run_validate(folder, "--device", "cpu").out
