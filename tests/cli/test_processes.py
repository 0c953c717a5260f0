"""Several ranks are one run. Also: what a terminal shows of it."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import termios
import time

import pytest
import timm
import torch
from timm.models import save_for_hf

import tnt_timm  # noqa: F401  (registers the models)
from tnt_timm.ops import native_backend

SHORT = ["-b", "4", "--epochs", "2", "--lr", "1e-3", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--workers", "0"]
RICH = ["--mixup", "0.8", "--cutmix", "1.0", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--aug-repeats", "3"]
RICH += ["--drop-path", "0.2", "--model-ema", "--model-ema-decay", "0.9"]
PLAIN = ["--no-aug", "--smoothing", "0", "--opt", "momentum", "--momentum", "0", "--weight-decay", "0"]
PLAIN += ["--sched", "constant"]


def state(folder):
    return torch.load(folder / "last.pth.tar", weights_only=True)


@pytest.fixture
def argv(make_folder, tiny, tmp_path):
    data = make_folder(train=9, val=5)  # 27 and 15 images: nothing divides evenly
    return lambda name, *more: [data, *tiny, *SHORT, *more, "--output", tmp_path / "out", "--experiment", name]


@pytest.fixture
def finish(start):
    """Run a command to its end, without an error."""

    def finish(argv, *args, **options):
        run = start(argv, *args, **options)
        assert run.wait() == 0, run.out + run.err
        return run

    return finish


def test_two_processes_train_and_three_validate_to_every_digit(finish, argv, tmp_path):
    """Also: plain lines, printed by rank 0 only."""
    out = finish(argv("run", *RICH, "--log-interval", "1"), 2).out
    assert "4 per process x 2 processes x 1 accumulation = 8 global batch" in out
    assert out.count("model      tnt_ti") == 1 and "\r" not in out and "\x1b" not in out
    assert re.search(
        r"epoch 1/2  update 1/3  loss \d\.\d{4}  acc [\d.]+ %  left 0:\d\d  \d+ img/s  data wait \d+ %", out
    )
    folder = tmp_path / "out" / "run"
    best = torch.load(folder / "model_best.pth.tar", weights_only=True)["metrics"]

    lines, matrices = [], []
    for processes, threads in ((1, 2), (3, 1)):  # the number of threads changes no digit either
        results = tmp_path / f"{processes}.json"
        command = [folder, "--workers", "0", "--results-file", results]
        command += ["--per-class", "--confusion-matrix", tmp_path / "confusion.csv"]
        run = finish(command, processes, f"import torch; torch.set_num_threads({threads})", program="validate")
        lines.append(re.sub(r"^\[Gloo\].*\n", "", run.out, flags=re.MULTILINE))  # which torch 2.8 prints
        assert json.loads(results.read_text())["loss"] == best["loss"]
        matrices.append((tmp_path / "confusion.csv").read_text())
    assert lines[0] == lines[1] and matrices[0] == matrices[1]
    assert f"top-1 {best['top1']:.3f}" in lines[0] and "(15 images, each counted once)" in lines[0]


def test_two_processes_and_accumulation_make_the_update_of_one(finish, argv, tmp_path):
    """Plain SGD, with no randomness but the order: 1 x 8, 2 x 4 and 1 x 4 x 2 images are the same batches."""
    finish(argv("one", *PLAIN, "--epochs", "1", "-b", "8"))
    finish(argv("two", *PLAIN, "--epochs", "1", "-b", "4"), 2)
    finish(argv("accumulated", *PLAIN, "--epochs", "1", "-b", "4", "--grad-accum-steps", "2"))
    one = state(tmp_path / "out" / "one")
    for other in ("two", "accumulated"):
        weights = state(tmp_path / "out" / other)["state_dict"]
        for name, value in one["state_dict"].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_distil_like_one(finish, argv, tmp_path):
    """Each rank has the whole teacher. Also: the log of the teacher and of adapted weights is printed once."""
    torch.manual_seed(5)
    teacher = timm.create_model("test_resnet", num_classes=3)
    teacher.get_classifier().weight.data.mul_(100)
    save_for_hf(teacher, tmp_path / "teacher")
    torch.manual_seed(6)
    kwargs = dict(depth=2, embed_dim=24, inner_dim=6, num_heads_inner=2, num_heads_outer=3, img_size=48)
    torch.save(timm.create_model("tnt_ti_distilled", **kwargs).state_dict(), tmp_path / "start.pth")

    distilled = [*PLAIN, "--model", "tnt_ti_distilled", "--kd-distill-type", "token"]
    distilled += ["--kd-model-name", f"local-dir:{tmp_path / 'teacher'}", "--pretrained-path", tmp_path / "start.pth"]
    finish(argv("one", *distilled, "-b", "8"))
    out = finish(argv("two", *distilled, "-b", "2", "--grad-accum-steps", "2"), 2).out
    for line in ("teacher    local-dir:", "start.pth: ", "patch_pos (1, 11, 24) -> (1, 6, 24)"):
        assert out.count(line) == 1, out
    one, two = state(tmp_path / "out" / "one"), state(tmp_path / "out" / "two")
    assert one["progress"]["rows"][1]["train_loss"] == pytest.approx(two["progress"]["rows"][1]["train_loss"], rel=1e-5)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "processes, mistake, error",
    [
        (3, ["--num-classes", "7"], "error: num_classes: 7"),
        (2, ["--kd-model-name", "local-dir:nowhere"], "error: kd_model_name: local-dir:nowhere: "),
        (2, ["--lr", "1e30"], "not finite"),
        (2, ["--epochs", "1"], "0.png: damaged validation image"),
    ],
    ids=["classes", "teacher", "not finite", "damaged"],
)
def test_processes_stop_together_at_a_mistake(start, argv, tmp_path, processes, mistake, error):
    """One of them prints it."""
    command = argv("run", *mistake)
    if "damaged" in error:
        next((tmp_path / "data" / "val").rglob("0.png")).write_text("damaged")
    run = start(command, processes)
    assert run.wait() != 0
    assert run.err.count("error: ") == 1 and error in run.err, run.err


@pytest.mark.parametrize(
    "different, error",
    [
        (["--lr", "0.01"], "error: rank 1: lr 0.01 instead of 0.001; start all ranks with the same settings"),
        (["--seed", "7", "--mixup", "0.8"], "rank 1: mixup 0.8 instead of 0.0; rank 1: seed 7 instead of 42; "),
        (["--opt", "sgd", "--drop-path", "0.1"], "rank 1: drop_path 0.1 instead of None; rank 1: opt 'sgd' instead of"),
        (["--epochs", "3"], "rank 1: epochs 3 instead of 2"),
        (["--grad-accum-steps", "2"], "rank 1: grad_accum_steps 2 instead of 1"),
        (["-b", "2"], "rank 1: batch_size 2 instead of 4"),
        (["--experiment", "other"], "rank 1: experiment 'other' instead of 'run'"),
        (["--img-size", "48"], "rank 1: img_size 48 instead of 32"),
        (["--lrr", "1"], "error: rank 1: command line: --lrr: no such setting"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_ranks_that_are_not_told_the_same_end_before_they_start(start, argv, different, error):
    before = f"import os, sys\nOTHER = {different}\n" + OTHER_ARGUMENTS_ON_RANK_1
    run = start(argv("run"), 2, before)
    assert run.wait() == 2
    assert run.err.count("error: ") == 1 and error in run.err and "Traceback" not in run.err, run.err


# The tests start all ranks with the same arguments.
OTHER_ARGUMENTS_ON_RANK_1 = """
from tnt_timm.settings import config
real = config.resolve
if os.environ["RANK"] == "1":
    config.resolve = lambda argv: real([*argv, *OTHER])
"""


@pytest.mark.parametrize(
    "change, status, error",
    [
        ("shutil.rmtree(other)", 1, "error: rank 1: data_dir: {other}: no such folder"),
        (
            "os.unlink(sorted(glob.glob(f'{{other}}/train/*/*'))[0])",
            2,
            "error: rank 1: training data, images 26 instead of 27",
        ),
        (
            "os.rename(f'{{other}}/val/ant/0.png', f'{{other}}/val/ant/9.png')",
            2,
            "error: rank 1: validation data, names '",
        ),
        ("os.rename(other, other + 'x'); os.symlink(other + 'x', other)", 0, None),  # another place is no difference
    ],
    ids=["none", "fewer", "renamed", "same"],
)
def test_ranks_see_the_same_data(start, argv, tmp_path, change, status, error):
    command, other = argv("run", "--epochs", "1"), tmp_path / "other"
    shutil.copytree(tmp_path / "data", other)
    before = f"import glob, os, shutil, sys\nother, OTHER = {str(other)!r}, ['--data-dir', {str(other)!r}]\n"
    exec(f"import glob, os, shutil\nother = {str(other)!r}\n" + change.replace("{{", "{").replace("}}", "}"))
    run = start(command, 2, before + OTHER_ARGUMENTS_ON_RANK_1)
    assert run.wait() == status, run.err
    assert error is None or (run.err.count("error: ") == 1 and error.format(other=other) in run.err), run.err


OTHER_CODE = """
import os
from tnt_timm.runtime import provenance
if os.environ["RANK"] == "1":
    versions = provenance.versions()
    provenance.versions = lambda: {**versions, "timm": "0.0"}
"""
OTHER_WEIGHTS = """
import os, torch
from tnt_timm.training import build
real = build.create_model
def other(*args):
    model, kwargs = real(*args)
    with torch.no_grad():
        model.head.weight *= 1.001
    return model, kwargs
if os.environ["RANK"] == "1":
    build.create_model = other
"""


@pytest.mark.parametrize(
    "before, error",
    [
        (OTHER_CODE, "error: rank 1: version of timm '0.0' instead of '"),
        (OTHER_WEIGHTS, "error: rank 1: other weights than rank 0 (head.weight and 0 more)"),
    ],
    ids=["version", "weights"],
)
def test_ranks_have_the_same_packages_and_weights(start, argv, before, error):
    run = start(argv("run"), 2, before)
    assert run.wait() == 2
    assert run.err.count("error: ") == 1 and error in run.err, run.err


@pytest.mark.parametrize("other", [["--amp"], ["--no-use-ema"]])
def test_ranks_validate_the_same(start, finish, argv, tmp_path, other):
    finish(argv("run", "--epochs", "1"))
    before = f"""
import os
from tnt_timm.settings import config
real = config.read_with
if os.environ["RANK"] == "1":
    config.read_with = lambda settings, argv, *more: real(settings, [*argv, *{other}], *more)
"""
    run = start([tmp_path / "out" / "run", "--workers", "0"], 2, before, program="validate")
    assert run.wait() == 2 and "error: rank 1: " in run.err and " instead of " in run.err, run.err


def test_a_closed_terminal_stops_a_run_which_saves(start, argv, tmp_path):
    """Its output has nowhere to go then, and that is no error."""
    here, there = pty.openpty()
    terminal = f"import sys; sys.stdout = sys.stderr = open({os.ttyname(there)!r}, 'w')"
    run = start(argv("run", "--log-interval", "1", "--epochs", "50", "--workers", "2"), before=terminal)
    while b"epoch 2/50" not in os.read(here, 65536):
        pass
    os.close(there)
    os.close(here)
    run.send(signal.SIGHUP)
    assert run.wait() == 75
    assert 1 <= state(tmp_path / "out" / "run")["progress"]["epoch"] < 49


def test_a_terminal_shows_a_live_bar(start, argv):
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    terminal = f"import sys; sys.stdout = sys.stderr = open({os.ttyname(there)!r}, 'w')"
    run = start(argv("run", "--log-interval", "1"), before=terminal)
    chunks, deadline = [], time.monotonic() + 60
    while run.statuses() == [None] or select.select([here], [], [], 0)[0]:
        assert time.monotonic() < deadline
        if select.select([here], [], [], 0.05)[0]:
            chunks.append(os.read(here, 65536))
    text = b"".join(chunks).decode()
    os.close(here)
    os.close(there)
    assert run.wait() == 0, text
    assert re.search(
        r"\repoch 1/2 \S* +\d/6  loss \d\.\d{4}  acc [\d.]+ %  left 0:\d\d  \d+ img/s  data wait \d+ %", text
    )
    assert "epoch 2/2  train loss" in text


# Each rank prints at its end how many buckets of gradients it has exchanged.
COUNT_SYNCS = """
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from tnt_timm.commands import train
from tnt_timm.training.run import TrainingRun

class Counting(TrainingRun):
    def train(self):
        syncs = []
        network = self.parts.task.trainable_module
        network.register_comm_hook(None, lambda state, bucket: (syncs.append(1), allreduce_hook(None, bucket))[1])
        super().train()
        print(f"syncs {len(syncs)}\\n", end="", flush=True)

train.TrainingRun = Counting
"""


def test_gradients_are_synchronised_once_per_update(finish, argv):
    """27 images, 2 processes x 4: 3 updates of one micro-batch, or 1 of three; one bucket of gradients each."""
    for accumulation, updates in ((1, 3), (3, 1)):
        command = argv(f"accum{accumulation}", "--epochs", "1", "--grad-accum-steps", accumulation)
        out = finish(command, 2, COUNT_SYNCS).out
        buckets = {int(count) for count in re.findall(r"syncs (\d+)", out)}
        passes = updates + 1  # one more before the first step fixes the order of sums
        assert len(buckets) == 1 and passes <= buckets.pop() <= 2 * passes, out  # DDP cuts one or two buckets


NATIVE = ["--model-kwargs", "depth=1", "embed_dim=12", "inner_dim=4", "num_heads_inner=2", "num_heads_outer=3"]
NO_COMPILER = "import os; os.environ.update(CXX='/nowhere/g++', XDG_CACHE_HOME='/nowhere')"
NO_COMPILER_ON_RANK_1 = f"import os\nif os.environ['RANK'] == '1':\n    {NO_COMPILER}"


@pytest.mark.skipif(native_backend.library(4, 2, 16).functions is None, reason="needs the native backend")
def test_all_ranks_use_the_same_backend(finish, argv, tmp_path):
    """A run must not depend on which of its machines has a compiler, or a GPU on which the kernels work."""
    said = "warning: inner transformer backend: reference (rank 1: native does not support this machine: its compiler failed"
    out = finish(argv("one", *NATIVE, "--epochs", "1"), 2, NO_COMPILER_ON_RANK_1).out
    assert out.count("inner transformer backend") == out.count(said) == 1
    finish(argv("two", *NATIVE, "--epochs", "1"), 2, NO_COMPILER)
    one, two = (state(tmp_path / "out" / name)["state_dict"] for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    folder = tmp_path / "out" / "one"
    assert said in finish([folder, "--workers", "0"], 2, NO_COMPILER_ON_RANK_1, program="validate").out
