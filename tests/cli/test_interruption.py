"""A run is a function of its config and world size: stopped anywhere and resumed, it ends with the same bits."""

import contextlib
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, List, Tuple

import pytest
import safetensors.torch
import torch

from tnt_timm.checkpoints import file_format

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "processes, interval, workers",
    [(1, 1, (0, 1, 3)), (1, 2, (3, 0, 1)), (2, 1, (1, 0, 2))],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_killed_twice_in_one_epoch(start, argv, ends_straight, tmp_path, processes, interval, workers):
    """SIGKILL to all ranks at once; the number of workers changes each time."""
    ends = []
    for moment, count in zip(("1/2", "1/4" if processes == 1 else "1/3", None), workers):
        run = start(argv("--recovery-interval", interval, "--workers", count), processes)
        if moment is None:
            assert run.wait() == 0, run.err
        else:
            run.until(run.reached(moment))
            run.kill()
        ends.append(run.updates)
    for before, after in itertools.pairwise(ends):
        repeated = len(set(before) & set(after))
        assert repeated <= 2 * interval, ends  # one save is being written, and the next one has not begun
    ends_straight(tmp_path / "run", processes)


# The loss scale of float16 grows after four updates, so that it shrinks, grows and shrinks in six.
GROWING = """
import functools, torch
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, growth_interval=4)
"""


CUDA = ("--device", "cuda", "--deterministic")
ON_DEVICE = ("--augment-on", "device", "--aa", "rand-m9-mstd0.5-inc1")
WITH_BATCH_NORM = ("--model", "pyramid_tnt_ti", "--model-kwargs", "depths=[1,1,1,1]", "embed_dim=8", "inner_dim=3")
IN_EACH_WAY = [
    pytest.param(WITH_BATCH_NORM, id="batch norm"),
    pytest.param(("--amp",), id="fp16"),
    pytest.param((*ON_DEVICE, "--workers", "2"), id="augmentation on device"),
    pytest.param((*CUDA, *ON_DEVICE), id="cuda, augmentation on device", marks=pytest.mark.cuda),
    pytest.param(CUDA, id="cuda", marks=pytest.mark.cuda),
    pytest.param((*CUDA, "--amp"), id="cuda fp16", marks=pytest.mark.cuda),
    pytest.param((*CUDA, "--amp", "--amp-dtype", "bfloat16"), id="cuda bf16", marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("settings", IN_EACH_WAY)
def test_killed_in_mid_epoch_however_it_computes(start, argv, assert_same_bits, tmp_path, settings):
    settings = (
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "-b",
        "4",
        "--grad-accum-steps",
        "1",
        "--recovery-interval",
        "1",
        *settings,
    )
    assert start(argv(*settings, "--experiment", "straight"), before=GROWING).wait() == 0
    run = start(argv(*settings), before=GROWING)
    run.until(run.reached("1/4"))
    run.kill()
    # a kill between two renames leaves previous.pth.tar only
    names = (tmp_path / "run" / name for name in ("last.pth.tar", "previous.pth.tar"))
    middle = file_format.read(next(path for path in names if path.exists()))
    assert 0 < middle["progress"]["update"] < 6 and middle["progress"]["epoch"] == 0
    run = start(argv(*settings), before=GROWING)
    assert run.wait() == 0 and run.updates[0] != "1/1", run.err
    assert_same_bits(tmp_path / "straight", tmp_path / "run")
    if "--amp" in settings and "bfloat16" not in settings:
        scaler = file_format.read(tmp_path / "run" / "last.pth.tar")["amp_scaler"]
        assert (scaler["scale"], scaler["_growth_tracker"]) != (2.0**16, 0)  # as at the start


@pytest.mark.parametrize("network", [(), WITH_BATCH_NORM], ids=["TNT", "batch norm"])
def test_three_ranks_add_their_gradients_in_the_same_order_after_a_kill(start, argv, ends_straight, tmp_path, network):
    """The sum of three numbers depends on the order, and DDP adds in another order in its first step than later.

    Each rank has its own statistics of batch norms, and those of rank 0 count.
    """
    short = ("--grad-accum-steps", "1", "--epochs", "1", "--warmup-epochs", "0", *network)
    run = start(argv(*short, "--recovery-interval", 1), 3)
    run.until(run.reached("1/3"))
    run.kill()
    run = start(argv(*short), 3)
    assert run.wait() == 0 and run.updates != ["1/1", "1/2", "1/3", "1/4"], run.err
    ends_straight(tmp_path / "run", 3, *short)


def moments(folder: Path, out: str) -> Tuple[object, ...]:
    """Return a value that changes whenever a run prints something or touches a file."""
    files = []
    for path in sorted(folder.glob("*")):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            files.append((path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return (out, *files)


def assert_files_are_intact(folder: Path) -> None:
    """Check after a kill every file that is not a temporary one."""
    for path in folder.glob("*.pth.tar"):
        file_format.read(path)
    for path in folder.glob("*.safetensors"):
        safetensors.torch.load_file(path)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    summary = folder / "summary.csv"
    assert not summary.exists() or summary.read_text().endswith("\n")


# Rank 0 prints where a save and an evaluation begin and end. Both are slow enough to be hit by a kill.
SAYS_WHERE = """
import os, time
from tnt_timm.checkpoints import file_format
from tnt_timm.training import trainer

def printing(what, work):
    def wrapper(*args, **kwargs):
        os.write(1, f"{what} begins\\n".encode())
        result = work(*args, **kwargs)
        os.write(1, f"{what} ends\\n".encode())
        return result
    return wrapper

def slow(work, seconds):
    return lambda *args: (time.sleep(seconds), work(*args))[1]

os.fsync, trainer.Reporter.evaluated = slow(os.fsync, 0.01), slow(trainer.Reporter.evaluated, 0.005)
file_format.write = printing("save", file_format.write)
if os.environ.get("RANK", "0") == "0":
    trainer.evaluate = printing("evaluation", trainer.evaluate)
"""


def is_in(run, what: str) -> bool:
    return run.out.count(f"{what} begins") > run.out.count(f"{what} ends")


def random_moment(rng: random.Random, kind: str, run, folder: Path) -> Callable[[], bool]:
    """Return a condition: in a save or an evaluation, after a number of events, or after some time."""
    if kind in ("save", "evaluation"):
        number = rng.randrange(1, {"save": 6, "evaluation": 3}[kind])
        return lambda: is_in(run, kind) and run.out.count(f"{kind} begins") >= number
    if kind == "time":
        late = time.monotonic() + rng.expovariate(2)
        return lambda: time.monotonic() > late
    number, seen = rng.randrange(1, 40), set()

    def after_some_events() -> bool:
        seen.add(moments(folder, run.out))
        return len(seen) > number

    return after_some_events


@pytest.mark.parametrize("processes, kills", [(1, 14), (2, 6)])
def test_killed_at_random_moments(start, argv, ends_straight, tmp_path, processes, kills):
    """In start-up, steps, saves and evaluations. Some kills are certain to hit a save, and some an evaluation."""
    rng, number, hit = random.Random(processes), 0, {"save": 0, "evaluation": 0}
    while kills:
        name, number = f"run{number}", number + 1
        folder = tmp_path / name
        while True:
            options = ("--recovery-interval", rng.choice([1, 2]), "--workers", rng.choice([0, 1, 3]))
            run = start(argv("--experiment", name, *options), processes, before=SAYS_WHERE)
            kind = ("events", "save", "evaluation", "time")[kills % 4]
            has_come = random_moment(rng, kind, run, folder)
            while None in run.statuses() and not has_come():
                time.sleep(0.001)
            if None not in run.statuses():
                break
            run.kill()
            kills -= 1
            for what in hit:
                hit[what] += is_in(run, what)
            assert_files_are_intact(folder)
            if not kills:
                run = start(argv("--experiment", name), processes)
                break
        assert run.wait() == 0, run.err
        ends_straight(folder, processes)
    assert min(hit.values()) > 0, hit


def lines(text: str) -> List[str]:
    return [line for line in text.splitlines() if line]


def assert_stopped(run, number: int, rest: str = "progress is saved; run the same command to resume") -> None:
    """Check exit status and message."""
    assert run.wait() == (130 if number == signal.SIGINT else 75)
    assert lines(run.err) == [f"stopped by {signal.Signals(number).name}: {rest}"]


def test_a_signal_saves_inside_the_epoch_and_not_one_step_is_lost(start, argv, ends_straight, tmp_path):
    """Sent to the whole process group: the workers serve the loop until it has saved."""
    done: List[str] = []
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
    for number, moment in zip(signals, ("1/2", "1/4", "1/6", "2/2", "2/4")):
        run = start(argv("--recovery-minutes", 0, "--workers", 2))
        run.until(run.reached(moment))
        run.send(number)
        assert_stopped(run, number)
        done += run.updates
    run = start(argv("--recovery-minutes", 0))
    assert run.wait() == 0
    assert done + run.updates == [f"{epoch}/{update}" for epoch in (1, 2) for update in range(1, 7)]
    ends_straight(tmp_path / "run")


def test_a_signal_to_one_rank_stops_all_at_the_same_step(start, argv, ends_straight, tmp_path):
    statuses, six_updates = [], ("--grad-accum-steps", "1")
    for rank, number, moment in ((1, signal.SIGUSR1, "1/1"), (0, signal.SIGTERM, "1/3"), (1, signal.SIGINT, "2/1")):
        run = start(argv("--recovery-minutes", 0, *six_updates), 2)
        run.until(run.reached(moment))
        run.send(number, rank)
        statuses.append(run.end(30))
        assert len(lines(run.err)) == 1 and "stopped by" in run.err
    assert statuses == [[75, 75], [75, 75], [75, 130]]
    run = start(argv(*six_updates), 2)
    assert run.wait() == 0 and run.updates[0] in ("2/2", "2/3"), run.out
    ends_straight(tmp_path / "run", 2, *six_updates)


COUNT_DDP = """
import gc, os, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
end = dist.destroy_process_group
def counting():
    os.write(1, f"DDP models: {sum(isinstance(x, DistributedDataParallel) for x in gc.get_objects())}\\n".encode())
    end()
dist.destroy_process_group = counting
"""


FAIL_IN_A_CHAIN = """
from tnt_timm.training.run import TrainingRun
def run_epoch(self):
    raise RuntimeError("this does not have a deterministic implementation")
TrainingRun.run_epoch = run_epoch
"""


def test_ddp_is_gone_before_the_ranks_disconnect(start, argv):
    """Otherwise its reducer destroys the process group, and may wait for a gloo thread that waits for the GIL."""
    short = ("--epochs", "1", "--warmup-epochs", "0", "--recovery-minutes", 0)
    run = start(argv(*short), 2, before=COUNT_DDP)
    run.until(run.reached("1/1"))
    run.send(signal.SIGTERM, 0)
    assert run.end(30) == [75, 75]
    again = start(argv(*short), 2, before=COUNT_DDP)
    assert again.wait() == 0
    fails = start(argv(*short, "--experiment", "fails"), 2, before=COUNT_DDP + FAIL_IN_A_CHAIN)
    assert fails.wait() != 0 and "deterministic: " in fails.err
    for out in (run.out, again.out, fails.out):
        assert re.findall(r"DDP models: (\d+)", out) == ["0", "0"]


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]
    return bool(int(caught, 16) & 1 << number - 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_during_the_seconds_of_imports_has_its_exit_status_too(number):
    """The command as a user types it. When its last handler is set, it has not imported PyTorch."""
    with subprocess.Popen([sys.executable, "train.py"], cwd=REPO, stderr=subprocess.PIPE, text=True) as run:
        while not catches(run.pid, signal.SIGUSR2):
            time.sleep(0.001)
        assert "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text()
        run.send_signal(number)
        assert run.wait(30) == (130 if number == signal.SIGINT else 75)
        line = f"stopped by {number.name}: progress is saved; run the same command to resume"
        assert lines(run.stderr.read()) == [line]


# Make a run stand still somewhere, and print that it does.
STAND = """
import time
def stand(where, name, number=1):
    real = getattr(where, name)
    calls = []
    def standing(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            print("standing still", flush=True)
            while True:
                time.sleep(0.01)  # one long sleep could delay a signal that comes just before it
        return real(*args, **kwargs)
    setattr(where, name, standing)
from tnt_timm.commands import train
from tnt_timm.training import losses, trainer
"""
FIRST_STEP = STAND + "stand(losses.FloatLogits, 'forward')"
LATER_STEP = STAND + "stand(losses.FloatLogits, 'forward', 8)"  # the fourth of two micro-batches each
EVALUATION = STAND + "stand(trainer.Reporter, 'evaluated')"
START = STAND + "stand(train, 'build')"


@pytest.mark.parametrize("before", [START, FIRST_STEP, EVALUATION], ids=["start", "first step", "evaluation"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_where_nothing_is_lost_ends_the_run_immediately(start, argv, ends_straight, tmp_path, before, number):
    """The first step may compile for minutes, and an evaluation may take as long."""
    run = start(argv("--recovery-minutes", 0), before=before)
    run.until(run.says("standing still"))
    sent = time.monotonic()
    run.send(number)
    assert_stopped(run, number)
    assert time.monotonic() - sent < 5
    done = run.updates
    run = start(argv("--recovery-minutes", 0))
    assert run.wait() == 0 and len(done + run.updates) == 12
    ends_straight(tmp_path / "run")


# Print when inductor compiles the network, which takes half a minute or more, in processes of its own.
COMPILES = """
from torch._inductor.graph import GraphLowering
compile_to_module = GraphLowering.compile_to_module

def saying(self):
    print("compiling", flush=True)
    return compile_to_module(self)

GraphLowering.compile_to_module = saying
"""


def test_a_signal_while_inductor_compiles_ends_the_run_immediately(start, argv, tmp_path, monkeypatch):
    """With the real inductor. The run is not resumed, which would take minutes."""
    cold = f"import os; os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path / 'cache')!r}"
    run = start(argv("--recovery-minutes", 0, "--torchcompile"), before=cold + COMPILES)
    run.until(run.says("compiling"))
    time.sleep(1)
    sent = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.wait() == 75 and time.monotonic() - sent < 10
    assert lines(run.err)[-1] == "stopped by SIGTERM: progress is saved; run the same command to resume"
    assert file_format.read(tmp_path / "run" / file_format.LAST)["progress"]["updates"] == 0 and not run.updates


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_while_ranks_connect_ends_them_immediately(start, argv, port, number, status):
    """The other rank never comes."""
    before = f"""if True:
        import os
        from tnt_timm.runtime import meeting
        os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
        real = meeting._wait_for
        meeting._wait_for = lambda *args: (print("waiting", flush=True), real(*args))[1]"""
    run = start(argv(), before=before)
    run.until(run.says("waiting"))
    time.sleep(0.1)
    sent = time.monotonic()
    run.send(number)
    assert run.wait() == status and time.monotonic() - sent < 5


def test_a_second_ctrl_c_ends_the_run_immediately(start, argv, ends_straight, tmp_path):
    """The first one waits for the end of the step. The message says what is saved, here two of three updates."""
    run = start(argv("--recovery-interval", 2), before=LATER_STEP)
    run.until(run.says("standing still"))
    run.send(signal.SIGINT)
    time.sleep(0.2)
    assert run.statuses() == [None]
    run.send(signal.SIGINT)
    assert run.end(5) == [130]
    assert run.updates == ["1/1", "1/2", "1/3"]
    lost = "work after update 2 of epoch 1 is lost; run the same command to resume from there"
    assert_stopped(run, signal.SIGINT, lost)
    run = start(argv())
    assert run.wait() == 0 and run.updates[0] == "1/3"
    ends_straight(tmp_path / "run")


# The output folder is a file system of 3 MB, which is full from the end of one update until the end of another.
# Its content is copied out at the end.
FULL_DISK = """
import atexit, ctypes, os, shutil, sys
from tnt_timm.checkpoints import file_format
from tnt_timm.training.trainer import Trainer
uid, gid = os.getuid(), os.getgid()
libc = ctypes.CDLL(None)
if libc.unshare(0x10000000 | 0x00020000) != 0:  # a user and a mount namespace of its own
    sys.exit(77)
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {{uid}} 1"), ("gid_map", f"0 {{gid}} 1")):
    with open(f"/proc/self/{{name}}", "w") as file:
        file.write(text)
if libc.mount(b"none", b"{disk}", b"tmpfs", 0, b"size=3m") != 0:
    sys.exit(77)
atexit.register(shutil.copytree, "{disk}/run", "{kept}")
real = Trainer.train_step

def train_step(self, batches, meter):
    result = real(self, batches, meter)
    done = self.progress.updates
    if done == {full_after}:
        self.saver.writer.wait()
        try:
            with open("{disk}/filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
        except OSError:
            print("full")
    if {full_after} < done <= {free_after}:
        progress = file_format.read(self.saver.folder / "last.pth.tar")["progress"]
        print(f"at {{done}}, the disk has {{progress['updates']}}", flush=True)
    if done == {free_after}:
        os.unlink("{disk}/filler")
    return result

Trainer.train_step = train_step
"""


def test_a_disk_that_is_full_for_one_save_does_not_end_the_run(start, argv, ends_straight, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    before = FULL_DISK.format(disk=disk, kept=kept, full_after=4, free_after=5)
    run = start(argv("--output", disk, "--recovery-interval", 1), before=before)
    (status,) = run.end(60)
    if status == 77:
        pytest.skip("no mount namespaces here")
    assert status == 0 and run.updates == [f"{epoch}/{update}" for epoch in (1, 2) for update in range(1, 7)]
    (warning,) = [line for line in run.out.splitlines() if line.startswith("warning: ")]
    assert "cannot be written: [Errno 28] No space left on device" in warning and "training continues" in warning
    assert re.findall(r"at (\d+), the disk has (\d+)", run.out) == [("5", "3")]
    ends_straight(kept)


def test_a_disk_that_stays_full_ends_the_run_and_its_state_is_elsewhere(start, argv, ends_straight, tmp_path):
    disk, kept, elsewhere = tmp_path / "disk", tmp_path / "run", tmp_path / "elsewhere"
    disk.mkdir(), elsewhere.mkdir()
    before = FULL_DISK.format(disk=disk, kept=kept, full_after=4, free_after=99)
    before += f"import tempfile; tempfile.tempdir = {str(elsewhere)!r}"
    settings = ("--output", disk, "--recovery-interval", 1)
    run = start(argv(*settings), before=before)
    (status,) = run.end(60)
    if status == 77:
        pytest.skip("no mount namespaces here")
    assert status == 1 and run.updates == [f"1/{update}" for update in range(1, 6)]
    (error,) = lines(run.err)
    assert "No space left on device; the old file is intact; the run stops" in error
    rescued = Path(error.split()[-1])
    assert rescued.is_relative_to(elsewhere)
    shutil.copytree(kept, disk / "run")
    run = start(argv(*settings, "--resume", rescued))
    run.until(run.reached("2/2"))
    run.kill()
    assert run.updates[0] == "1/6"
    run = start(argv(*settings, "--resume", rescued))
    assert run.wait() == 0 and run.updates[0].startswith("2/"), run.out
    ends_straight(disk / "run")


# After three checkpoints, rank 0 can write none into the run folder.
NO_MORE_SAVES = """
import tempfile
from tnt_timm.checkpoints import file_format
from tnt_timm.errors import UserError
tempfile.tempdir = "{elsewhere}"
real, writes = file_format.write, []

def write(path, *rest, **more):
    writes.append(path)
    if len(writes) > 3 and path.parent.name == "run":
        raise UserError(f"{{path}}: cannot be written: the disk is full")
    return real(path, *rest, **more)

file_format.write = write
"""


def test_all_ranks_stop_when_rank_0_cannot_save(start, argv, ends_straight, tmp_path):
    settings = ("--recovery-interval", 1)
    run = start(argv(*settings), 2, before=NO_MORE_SAVES.format(elsewhere=tmp_path))
    assert run.end(60) == [1, 1]
    (error,) = lines(run.err)
    run = start(argv(*settings, "--resume", error.split()[-1]), 2)
    assert run.wait() == 0 and run.updates[0] != "1/1", run.err
    ends_straight(tmp_path / "run", 2)


# Nothing here is drawn per rank, so that one rank and several see the same.
PER_SAMPLE = ("--mixup", "0", "--cutmix", "0", "--reprob", "0", "--drop", "0", "--drop-path", "0", "--opt", "momentum")


def test_the_number_of_ranks_may_change_when_a_run_resumes(start, argv, straight, tmp_path):
    """From one to two inside the first epoch, and back after it: the same images in the same updates of eight."""
    run = start(argv(*PER_SAMPLE, "-b", 4, "--recovery-minutes", 0))
    run.until(run.reached("1/1"))
    run.send(signal.SIGTERM)
    assert run.wait() == 75
    run = start(argv(*PER_SAMPLE, "-b", 2, "--recovery-minutes", 0), 2)
    run.until(run.says("epoch 1/2  train loss"))
    run.kill()
    assert run.updates[0] in ("1/2", "1/3")
    assert "processes: 1 -> 2" in run.out and "batch_size: 4 -> 2" in run.out
    run = start(argv(*PER_SAMPLE, "-b", 4))
    assert run.wait() == 0 and run.updates == ["2/1", "2/2", "2/3"] and "processes: 2 -> 1" in run.out
    one, other = (
        file_format.read(folder / "last.pth.tar") for folder in (straight(1, *PER_SAMPLE, "-b", 4), tmp_path / "run")
    )
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-4, atol=1e-6)
    for row, same in zip(one["progress"]["rows"], other["progress"]["rows"], strict=True):
        assert row == pytest.approx(same, rel=1e-4)


# On rank 1 the loss is not finite, for two updates and later for all. Both ranks print the sum of their weights.
DISAGREE = """
from tnt_timm.training import trainer
trainer.MAX_SKIPPED = 5
agree, finish_epoch = trainer.Trainer.agree, trainer.Trainer.finish_epoch

def disagree(self, loss, norm):
    bad = self.progress.updates in (1, 2) or self.progress.updates >= 7 and self.progress.rollbacks == 0
    return agree(self, loss * float("nan") if bad and self.world.rank == 1 else loss, norm)

def finish(self, *args):
    row = finish_epoch(self, *args)
    weights = sum(value.double().abs().sum().item() for value in self.parts.model.state_dict().values())
    done, back = self.progress.updates, self.progress.rollbacks
    print(f"weights {weights!r} after {done} updates, {back} rollbacks\\n", end="", flush=True)
    return row

trainer.Trainer.agree, trainer.Trainer.finish_epoch = disagree, finish
"""


def test_ranks_agree_on_skipped_updates_and_on_rolling_back(start, argv):
    run = start(argv("--grad-accum-steps", 1, "--recovery-interval", 4), 2, DISAGREE)
    assert run.wait() == 0, run.err
    assert re.findall(r"^warning: .* update (\d), .*; the update was skipped$", run.out, re.M) == [
        "2",
        "2",
    ]  # of each epoch
    rolled_back = r"^warning: .* at epoch (\d), update (\d), .*; rolling back to the start of the epoch \((\d)"
    assert re.findall(rolled_back, run.out, re.M) == [("2", "4", "1")]
    weights = re.findall(r"^weights (\S+) after (\d+) updates, (\d) rollbacks$", run.out, re.M)
    assert len(weights) == 4 and len(set(weights)) == 2
    assert {found[1:] for found in weights} == {("6", "0"), ("12", "1")}
