"""The commands as a shell starts them: torchrun with several processes, terminals, signals, W&B's offline file."""

import csv
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import tnt_timm  # noqa: F401  (registers the models)

REPO = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SHORT = ["-b", "4", "--epochs", "2", "--lr", "1e-3", "--warmup-epochs", "0", "--cooldown-epochs", "0"]
RICH = ["--mixup", "0.8", "--cutmix", "1.0", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--aug-repeats", "3"]
RICH += ["--drop-path", "0.2", "--model-ema", "--model-ema-decay", "0.9"]


def shell(*command, check=True, **env):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **env},
        timeout=300,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def train(processes, *argv, **kwargs):
    return shell(*TORCHRUN, f"--nproc_per_node={processes}", "train.py", *argv, **kwargs)


def state(folder):
    return torch.load(folder / "last.pth.tar", weights_only=True)


@pytest.fixture
def run(make_folder, tiny, tmp_path):
    data = make_folder(train=9, val=5)  # 27 and 15 images: nothing divides evenly

    def argv(name, *more):
        return [data, *tiny, *SHORT, *more, "--output", tmp_path / "out", "--experiment", name]

    argv.folder = tmp_path / "out"
    return argv


def test_two_processes_train_and_three_validate_to_every_digit(run, tmp_path):
    """Also: plain lines, printed by one process only; no worker; an interrupted run continues bit by bit."""
    out = train(2, *run("straight", *RICH, "--workers", "0", "--log-interval", "1")).stdout
    assert "4 per process x 2 processes x 1 accumulation = 8 global batch" in out
    assert out.count("model      tnt_ti") == 1 and "\r" not in out and "\x1b" not in out
    assert re.search(
        r"epoch 1/2  update 1/3  loss \d\.\d{4}  acc [\d.]+ %  left 0:\d\d  \d+ img/s  data wait \d+ %", out
    )
    folder = run.folder / "straight"
    best = torch.load(folder / "model_best.pth.tar", weights_only=True)["metrics"]

    lines = []
    for processes in (1, 3):
        results = tmp_path / f"{processes}.json"
        command = [*TORCHRUN, f"--nproc_per_node={processes}", "validate.py", folder, "--results-file", results]
        lines.append(shell(*command, OMP_NUM_THREADS="2" if processes == 1 else "1"))  # nor do threads change a digit
        assert json.loads(results.read_text())["loss"] == best["loss"]
    assert lines[0].stdout == lines[1].stdout
    assert f"top-1 {best['top1']:.3f}" in lines[0].stdout and "(15 images, each counted once)" in lines[0].stdout

    train(2, *run("extended", *RICH, "--workers", "0"))
    extended = run("extended", *RICH, "--workers", "1")
    train(2, *extended)
    one, two = state(folder), state(run.folder / "extended")
    assert all(torch.equal(one["state_dict"][name], two["state_dict"][name]) for name in one["state_dict"])


def test_two_processes_and_accumulation_make_the_update_of_one(run):
    """Plain SGD, no randomness but the order: 1 x 8, 2 x 4 and 1 x 4 x 2 images see the same batches."""
    plain = ["--no-aug", "--smoothing", "0", "--opt", "momentum", "--momentum", "0", "--weight-decay", "0"]
    plain += ["--sched", "constant", "--workers", "0", "--epochs", "1"]
    train(1, *run("one", *plain, "-b", "8"))
    train(2, *run("two", *plain, "-b", "4"))
    shell(sys.executable, "train.py", *run("accumulated", *plain, "-b", "4", "--grad-accum-steps", "2"))
    one = state(run.folder / "one")
    for other in ("two", "accumulated"):
        weights = state(run.folder / other)["state_dict"]
        for name, value in one["state_dict"].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_distil_like_one(run, tmp_path):
    """Each has the whole teacher; also: the head and the log of adapted weights are said once."""
    torch.manual_seed(5)
    teacher = timm.create_model("test_resnet", num_classes=3)
    teacher.get_classifier().weight.data.mul_(100)
    save_for_hf(teacher, tmp_path / "teacher")
    torch.manual_seed(6)
    kwargs = dict(depth=2, embed_dim=24, inner_dim=6, num_heads_inner=2, num_heads_outer=3, img_size=48)
    torch.save(timm.create_model("tnt_ti_distilled", **kwargs).state_dict(), tmp_path / "start.pth")

    plain = ["--no-aug", "--smoothing", "0", "--opt", "momentum", "--momentum", "0", "--weight-decay", "0"]
    plain += ["--sched", "constant", "--workers", "0", "--model", "tnt_ti_distilled", "--kd-distill-type", "token"]
    plain += ["--kd-model-name", f"local-dir:{tmp_path / 'teacher'}", "--pretrained-path", tmp_path / "start.pth"]
    train(1, *run("one", *plain, "-b", "8"))
    out = train(2, *run("two", *plain, "-b", "2", "--grad-accum-steps", "2")).stdout
    for line in ("teacher    local-dir:", "start.pth: ", "patch_pos (1, 11, 24) -> (1, 6, 24)"):
        assert out.count(line) == 1, out
    one, two = state(run.folder / "one"), state(run.folder / "two")
    assert one["progress"]["rows"][1]["train_loss"] == pytest.approx(two["progress"]["rows"][1]["train_loss"], rel=1e-5)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-5, atol=1e-7)


def test_three_processes_stop_together_at_a_mistake(run, make_folder):
    done = train(3, *run("bad", "--num-classes", "7", "--workers", "0"), check=False)
    assert done.returncode != 0 and done.stderr.count("error: num_classes: 7") == 1
    done = train(2, *run("taught", "--kd-model-name", "local-dir:nowhere", "--workers", "0"), check=False)
    assert done.returncode != 0 and done.stderr.count("error: kd_model_name: local-dir:nowhere: ") == 1
    done = train(2, *run("nan", "--lr", "1e30", "--workers", "0"), check=False)
    assert done.returncode != 0 and done.stderr.count("error: ") >= 1 and "not finite" in done.stderr
    first = next((run.folder.parent / "data" / "val").rglob("*.png"))
    first.write_text("damaged")
    done = train(2, *run("damaged", "--workers", "0"), check=False)
    assert done.returncode != 0 and f"{first}: damaged validation image" in done.stderr


def test_killed_and_started_again_ends_with_the_same_bits(run):
    """SIGKILL once the first epoch is saved; loader workers on, another number of them afterwards."""
    shell(sys.executable, "train.py", *run("straight", *RICH, "--epochs", "6", "--workers", "1"))
    command = [sys.executable, "train.py", *run("killed", *RICH, "--epochs", "6", "--workers", "2")]
    process = subprocess.Popen([str(part) for part in command], cwd=REPO, stdout=subprocess.DEVNULL,
                               env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})  # fmt: skip
    last = run.folder / "killed" / "last.pth.tar"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(last.parent)["epoch"] < 6
    out = shell(sys.executable, "train.py", *run("killed", *RICH, "--epochs", "6", "--workers", "0")).stdout
    assert "continuing from" in out
    one, two = state(run.folder / "straight"), state(run.folder / "killed")
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])
    assert (run.folder / "straight" / "summary.csv").read_text() == (run.folder / "killed" / "summary.csv").read_text()


def test_a_terminal_shows_a_live_bar(run):
    command = [sys.executable, "train.py", *run("live", "--workers", "0", "--log-interval", "1")]
    chunks = []

    def read(fd):
        data = os.read(fd, 65536)
        chunks.append(data)
        return data

    pid, fd = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        os.chdir(REPO)
        os.environ.update(PYTHONPATH=str(REPO), OMP_NUM_THREADS="1")
        os.execv(command[0], [str(part) for part in command])
    try:
        while read(fd):
            pass
    except OSError:  # the end of a terminal
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = b"".join(chunks).decode()
    assert re.search(
        r"\repoch 1/2 \S* +\d/6  loss \d\.\d{4}  acc [\d.]+ %  left 0:\d\d  \d+ img/s  data wait \d+ %", text
    )
    assert "epoch 2/2  train loss" in text


def wandb_records(path: Path):
    """The records of a W&B run file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        record = (record if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)


def test_wandb_offline_holds_the_same_numbers(run):
    shell(sys.executable, "train.py", *run("logged", "--workers", "0", "--log-wandb"), WANDB_MODE="offline")
    folder = run.folder / "logged"
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(file))
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    table = list(csv.DictReader((folder / "summary.csv").open()))
    assert len(rows) == len(table) == 2
    for logged, row in zip(rows, table):
        for key, value in row.items():
            assert logged[key] == pytest.approx(float(value)), key
    assert any(
        item.key == "lr" for r in records if r.WhichOneof("record_type") == "run" for item in r.run.config.update
    )


COUNT_SYNCS = """
import sys
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from tnt_timm.training import commands, trainer

syncs = []

class Counting(trainer.Trainer):
    def __init__(self, *args):
        super().__init__(*args)
        network = self.parts.task.trainable_module
        network.register_comm_hook(None, lambda state, bucket: (syncs.append(1), allreduce_hook(None, bucket))[1])

commands.Trainer = Counting
status = commands.train(sys.argv[1:])
print(f"syncs {len(syncs)}\\n", end="", flush=True)
sys.exit(status)
"""


def test_gradients_are_synchronised_once_per_update(run, tmp_path):
    """27 images, 2 processes x 4: 3 updates of one micro-batch, or 1 of three; one bucket of gradients each."""
    (tmp_path / "count.py").write_text(COUNT_SYNCS)
    for accumulation, updates in (("1", 3), ("3", 1)):
        argv = run(f"accum{accumulation}", "--workers", "0", "--epochs", "1", "--grad-accum-steps", accumulation)
        out = shell(*TORCHRUN, "--nproc_per_node=2", tmp_path / "count.py", *argv).stdout
        buckets = {int(count) for count in re.findall(r"syncs (\d+)", out)}
        assert len(buckets) == 1 and updates <= buckets.pop() <= 2 * updates, out  # DDP cuts one or two buckets
