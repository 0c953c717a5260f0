"""What loader processes lack, before and after: no run may wait for ever, or end without saying why."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from tnt_timm.data import loader_processes
from tnt_timm.data.loader_processes import shortages, size_text, usable_cores, why_it_ended
from tnt_timm.errors import UserError

MIB = 2**20


@pytest.fixture
def room(monkeypatch):
    """room(free) makes /dev/shm look as if it had so many free bytes of 64 MiB."""

    def set_free(free):
        found = os.statvfs_result((4096, 4096, 64 * MIB // 4096, free // 4096, free // 4096, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: found)

    return set_free


def test_nothing_to_say_where_all_is_well(room):
    room(64 * MIB)
    assert shortages(workers=4, processes=2, cores=8, batch_bytes=4 * MIB) == []
    assert shortages(workers=0, processes=8, cores=1, batch_bytes=1000 * MIB) == []
    assert shortages(workers=1, processes=8, cores=2, batch_bytes=MIB) == []  # there is nothing less to ask for


def test_more_loader_processes_than_cores(room):
    room(64 * MIB)
    (line,) = shortages(workers=8, processes=4, cores=8, batch_bytes=MIB // 2)
    assert "8 x 4 processes = 32 loader processes share 8 cores" in line and "--workers 2 " in line


def test_shared_memory_that_is_too_small(room):
    """Docker's 64 MiB, and the recipe's batch of 128 images on 8 GPUs."""
    room(63 * MIB)
    (line,) = shortages(workers=8, processes=8, cores=64, batch_bytes=128 * 3 * 224 * 224)
    for part in ("/dev/shm (64 MiB, 63 MiB free)", "2.3 GiB", "8 processes x 8 workers x 2 batches of 18 MiB"):
        assert part in line
    assert "docker run --shm-size" in line and line.endswith("--workers 0")
    (line,) = shortages(workers=8, processes=1, cores=64, batch_bytes=10 * MIB)
    assert line.endswith("or pass --workers 3")  # 3 x 2 x 10 MiB
    assert "\n" not in line


def test_a_system_without_dev_shm(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_processes, "SHARED_MEMORY", tmp_path / "nowhere")
    assert shortages(workers=2, processes=1, cores=4, batch_bytes=2**50) == []


def test_usable_cores_are_those_that_this_process_was_given():
    assert usable_cores() == os.sched_getaffinity(0)


@pytest.mark.parametrize(("number", "text"), [(12, "12 bytes"), (64 * MIB, "64 MiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes(number, text):
    assert size_text(number) == text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "/dev/shm"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_7_8_0>: No space left"), "/dev/shm"),
        (RuntimeError("unable to mmap 64 bytes from file </torch_7_8_0>: Cannot allocate memory (12)"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "memory ran out"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), "from outside (Terminated)"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "), "Segmentation fault"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "without saying why"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), None),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."), None),
        (RuntimeError("unable to write to file </torch/run/last.pth.tar>: No space left on device"), None),
        (ValueError("DataLoader worker (pid 7) is killed by signal: Killed. "), None),
    ],
)
def test_why_a_loader_process_ended(error, line):
    found = why_it_ended(error)
    if line is None:
        assert found is None
    else:
        assert isinstance(found, UserError) and str(found).startswith("workers: ") and line in str(found)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_broken_connection_is_one_to_a_loader_process_where_a_batch_is_fetched(error):
    assert why_it_ended(error) is None
    assert "without saying why" in str(why_it_ended(error, fetching=True))


def test_the_error_that_knows_most_is_told():
    """torch raises the second of these out of the first."""
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "memory ran out" in str(why_it_ended(error))


# ---- in a loader


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "memory ran out; lower --workers"),
        (signal.SIGBUS, "/dev/shm"),
        (signal.SIGSEGV, "crashed .Segmentation fault."),
    ],
)
def test_a_loader_process_that_is_killed(number, message, training_loader):
    loader = training_loader(transform=lambda image: os.kill(os.getpid(), number), mixing=False, workers=1)
    with pytest.raises(UserError, match=message):
        next(loader.epoch(0))


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_no_room_for_a_batch_is_an_error_and_not_a_wait(
    kind, training_loader, evaluation_loader, digits, plain_transform, monkeypatch
):
    """torch hands tensors over in a thread of the loader process, whose errors go nowhere."""

    def refuse(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)  # loader processes are forked, and so have it too
    if kind == "training":
        batches = training_loader(transform=plain_transform, mixing=False, workers=2).epoch(0)
    else:
        batches = iter(evaluation_loader(digits, workers=2))
    with pytest.raises(UserError, match=r"^workers: /dev/shm .* has no room for the next batch") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


SCRIPT = """
import subprocess
import torch
from tnt_timm.data.digits import Digits
from tnt_timm.data.loader import EvaluationLoader
from torchvision.transforms import Compose, PILToTensor, Resize

torch.set_num_threads(2)  # then torch starts a thread in each loader process before anything else is done there
loader = EvaluationLoader(  # a global, so that its processes are still there when the interpreter ends
    Digits("train"), Compose([Resize(256), PILToTensor()]), batch_size=16, mean=(0,) * 3, std=(1,) * 3,
    device=torch.device("cpu"), workers=2, rank=0, world_size=1,
)
count = 0
for batch in loader:
    subprocess.run(["kill", "-TERM", *(str(process.pid) for process in loader.loader._iterator._workers)])
    count += len(batch.images)
print(count)
"""


@pytest.fixture
def run_script(tmp_path):
    """Runs SCRIPT after a shell command; returns its stdout and its stderr. It has to end by itself."""

    def run(before="true"):
        (tmp_path / "script.py").write_text(SCRIPT)
        command = f"{before} && exec {sys.executable} script.py >out 2>err"
        shell = ["unshare", "-m"] if before != "true" else []
        process = subprocess.Popen([*shell, "sh", "-c", command], cwd=tmp_path, start_new_session=True)
        try:
            process.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return (tmp_path / "out").read_text(), (tmp_path / "err").read_text()

    return run


def test_a_script_that_keeps_its_loader_ends(run_script):
    """And whoever else ends its loader processes does not."""
    assert run_script() == ("1437\n", "")


def test_in_a_dev_shm_of_one_mebibyte(run_script):
    """A batch has three. In a mount namespace of its own, where the system lets the tests make one."""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("this user may not mount")
    out, err = run_script(mount)
    assert out == "" and "UserError: workers: /dev/shm (1 MiB" in err


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_signals_that_are_meant_for_the_loop_end_no_loader_process(name, training_loader):
    loader = training_loader(workers=2, batches_per_epoch=30, mixing=False)
    batches = loader.epoch(0)
    next(batches)
    processes = loader.loader._iterator._workers
    for _ in range(2):
        subprocess.run(["kill", f"-{name}", *(str(process.pid) for process in processes)], check=True)  # from outside
        next(batches)
    assert len(list(batches)) == 27
    assert all(process.is_alive() for process in processes)
    for process in processes:
        process.terminate()  # from the process that they serve
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]


def test_torchs_own_warning_is_left_to_ours(training_loader):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = training_loader(workers=len(usable_cores()) + 1, mixing=False, batches_per_epoch=1)
        assert len(list(loader.epoch(0))) == 1
