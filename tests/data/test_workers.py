"""What workers lack, before and after: no run may wait forever, or end without an explanation."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from tnt_timm.data import workers as workers_module
from tnt_timm.data.workers import loading_remedy, shortages, size_text, usable_cores, worker_failure
from tnt_timm.errors import UserError

MIB = 2**20


@pytest.fixture
def free_memory(monkeypatch):
    """free_memory(number) makes /dev/shm look as if it had so many free bytes of 64 MiB."""

    def set_free(free):
        found = os.statvfs_result((4096, 4096, 64 * MIB // 4096, free // 4096, free // 4096, 0, 0, 0, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda path: found)

    return set_free


# The recipe: batches of 128 images on 8 GPUs; Docker gives 64 MiB
RECIPE = dict(workers=8, ranks=8, cores=64, batch_bytes=128 * 3 * 224 * 224)
RECIPE_PARTS = ("/dev/shm (64 MiB, 63 MiB free)", "2.3 GiB", "8 ranks x 8 workers x 2 batches of 18 MiB")


@pytest.mark.parametrize(
    ("machine", "parts"),
    [
        (dict(workers=4, ranks=2, cores=8, batch_bytes=3 * MIB), None),
        (dict(workers=0, ranks=8, cores=1, batch_bytes=1000 * MIB), None),
        (dict(workers=1, ranks=8, cores=2, batch_bytes=MIB), None),  # there is nothing less to ask for
        (
            dict(workers=8, ranks=4, cores=8, batch_bytes=MIB // 2),
            ("8 x 4 ranks = 32 workers share 8 cores", "--workers 2 "),
        ),
        (RECIPE, (*RECIPE_PARTS, "docker run --shm-size", "--workers 0")),
        (dict(workers=8, ranks=1, cores=64, batch_bytes=10 * MIB), ("or pass --workers 3",)),  # 3 x 2 x 10 MiB
    ],
)
def test_shortages(machine, parts, free_memory):
    free_memory(63 * MIB)
    found = shortages(**machine)
    assert len(found) == (parts is not None)
    for part in parts or ():
        assert part in found[0] and "\n" not in found[0]


@pytest.mark.parametrize(
    ("machine", "remedy"),
    [
        (dict(workers=8, ranks=8, cores=128, moves=True), "try --augment-on device or --workers 16, one per core"),
        (dict(workers=0, ranks=1, cores=4, moves=False), "try --workers 4, one per core"),
        (dict(workers=16, ranks=8, cores=128, moves=True), "try --augment-on device"),
        (dict(workers=16, ranks=8, cores=128, moves=False), "more CPU cores would help"),
        (dict(workers=1, ranks=8, cores=2, moves=False), "more CPU cores would help"),
        (dict(workers=8, ranks=1, cores=16, moves=False, shards=8), "try more shards, because each worker needs one"),
        (dict(workers=8, ranks=1, cores=16, moves=False, shards=20), "try --workers 16, one per core"),
    ],
)
def test_remedies_for_a_gpu_that_waits(machine, remedy, free_memory):
    free_memory(63 * MIB)
    assert loading_remedy(**machine, batch_bytes=1000) == remedy


def test_more_workers_may_need_more_shared_memory(free_memory):
    free_memory(63 * MIB)
    found = loading_remedy(workers=1, ranks=1, cores=8, batch_bytes=8 * MIB, moves=False)
    assert found == "try --workers 8, one per core, with more shared memory"


def test_a_system_without_dev_shm(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "SHARED_MEMORY", tmp_path / "nowhere")
    assert shortages(workers=2, ranks=1, cores=4, batch_bytes=2**50) == []


def test_usable_cores_are_those_of_this_process():
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
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "),
            "another program ended a worker (Ter",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "), "Segmentation fault"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "without an error message"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), None),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."), None),
        (RuntimeError("unable to write to file </torch/run/last.pth.tar>: No space left on device"), None),
        (ValueError("DataLoader worker (pid 7) is killed by signal: Killed. "), None),
    ],
)
def test_why_a_worker_died(error, line):
    found = worker_failure(error)
    if line is None:
        assert found is None
    else:
        assert isinstance(found, UserError) and str(found).startswith("workers: ") and line in str(found)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_while_fetching_a_batch_a_broken_connection_is_one_to_a_worker(error):
    assert worker_failure(error) is None
    assert "without an error message" in str(worker_failure(error, fetching=True))


def test_the_most_informative_error_counts():
    """torch raises the second of these from the first."""
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "memory ran out" in str(worker_failure(error))


# ---- in a loader


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "memory ran out; lower --workers"),
        (signal.SIGBUS, "/dev/shm"),
        (signal.SIGSEGV, "crashed .Segmentation fault."),
    ],
)
def test_a_killed_worker(number, message, training_loader):
    loader = training_loader(transform=lambda image: os.kill(os.getpid(), number), mixing=False, workers=1)
    with pytest.raises(UserError, match=message):
        next(loader.epoch(0))


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_full_shared_memory_is_an_error_and_no_deadlock(
    kind, training_loader, evaluation_loader, digits, plain_transform, monkeypatch
):
    """torch shares tensors in a thread of the worker, whose errors are lost."""

    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)  # workers are forked, and so have it too
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

torch.set_num_threads(2)  # then torch starts a thread in each worker before anything else runs there
loader = EvaluationLoader(  # a global, so that its workers still exist when the interpreter exits
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


def test_a_script_that_keeps_its_loader_exits(run_script):
    """And a SIGTERM from another process does not end its workers."""
    assert run_script() == ("1437\n", "")


def test_in_a_dev_shm_of_one_mebibyte(run_script):
    """A batch has three. In a mount namespace of its own, if the system lets the tests make one."""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    unshare = ["unshare", "-m", "sh", "-c", mount]
    if not shutil.which("unshare") or subprocess.run(unshare, capture_output=True).returncode:
        pytest.skip("this user may not mount")
    out, err = run_script(mount)
    assert out == "" and "UserError: workers: /dev/shm (1 MiB" in err


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_workers_ignore_signals_for_the_loop(name, training_loader):
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
        process.terminate()  # from the parent
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]


def test_torchs_own_warning_is_silenced(training_loader):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = training_loader(workers=len(usable_cores()) + 1, mixing=False, batches_per_epoch=1)
        assert len(list(loader.epoch(0))) == 1
