"""The loop, on real runs: what a step does to the weights, what it refuses, and what continues."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tnt_timm.checkpoints import file_format
from tnt_timm.checkpoints.restorer import Restorer
from tnt_timm.errors import UserError
from tnt_timm.training import trainer as trainer_module
from tnt_timm.training.reporting import EpochMeter, Reporter
from tnt_timm.training.trainer import Trainer

PLAIN = """--no-aug --smoothing 0 --opt momentum --momentum 0 --weight-decay 0 --workers 0
    -b 8 --sched constant --warmup-epochs 0 --lr 0.1 --cooldown-epochs 0""".split()
RICH = ["--mixup", "0.8", "--cutmix", "1.0", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25", "--aug-repeats", "3"]
RICH += ["--drop-path", "0.2", "--drop", "0.1", "--model-ema", "--model-ema-decay", "0.9", "--model-ema-warmup"]
RICH += ["-b", "4", "--lr", "1e-3", "--warmup-epochs", "1", "--cooldown-epochs", "0"]


def last(folder: Path) -> dict:
    return file_format.read(folder / file_format.LAST)


def rows(folder: Path) -> list:
    return list(csv.DictReader((folder / "summary.csv").open()))


def test_what_a_run_leaves_behind(train):
    out, folder = train("--epochs", "2", *RICH)
    names = {"config.yaml", "run.json", "classes.txt", "summary.csv", "last.pth.tar", "previous.pth.tar", ".lock"}
    names |= {"epoch_start.pth.tar"}
    assert {path.name for path in folder.iterdir()} == names | {
        "model_best.pth.tar",
        "config.json",
        "model.safetensors",
    }
    assert (folder / "classes.txt").read_text() == "ant\nbee\ncat\n"
    table = rows(folder)
    columns = "epoch train_loss eval_loss eval_top1 eval_top5 eval_ema_loss eval_ema_top1 eval_ema_top5 lr"
    assert list(table[0]) == columns.split() and [row["epoch"] for row in table] == ["0", "1"]
    start = json.loads((folder / "run.json").read_text())
    assert start["versions"]["torch"] == torch.__version__ and start["processes"] == 1
    assert "4 per process x 1 process x 1 accumulation = 4 global batch, lr 0.001" in out.out
    assert "24 training and 12 validation images, 3 classes" in out.out
    best = file_format.read(folder / "model_best.pth.tar")
    assert best["weights"] == "ema" and best["classes"] == ["ant", "bee", "cat"] and "optimizer" not in best
    assert best["metrics"]["top1"] == max(float(row["eval_ema_top1"]) for row in table)


def test_the_resolved_config_in_the_folder_is_the_same_run(train, run_train):
    _, folder = train("--epochs", "1", *PLAIN)
    again = run_train("--config", folder / "config.yaml")
    assert again.status == 0 and "already finished: 1 epochs" in again.out


@pytest.mark.parametrize("accumulation, batch", [(1, 24), (2, 12), (3, 8)])
def test_an_update_is_plain_sgd_on_the_global_batch(train, accumulation, batch):
    """One epoch of one update, computed here with nothing but autograd, however the batch is cut into micro-batches."""
    import timm

    from tnt_timm.data.datasets import open_dataset
    from tnt_timm.data.transforms import training_transform

    settings = ["--epochs", "1", *PLAIN, "-b", str(batch), "--grad-accum-steps", str(accumulation), "--seed", "3"]
    _, folder = train(*settings)
    state = last(folder)
    assert state["progress"]["updates"] == 1

    torch.manual_seed(3)
    model = timm.create_model(state["arch"], **state["model_kwargs"])
    images = open_dataset("", state["config"]["data_dir"], "train", True)
    transform = training_transform((3, 32, 32), (0.5,) * 3, (0.5,) * 3, no_aug=True)
    pairs = [images.load(i) for i in range(24)]
    x = torch.stack([transform(image) for image, _ in pairs]).float().div(127.5).sub(1)
    torch.nn.functional.cross_entropy(model(x), torch.tensor([target for _, target in pairs])).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(
            state["state_dict"][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_ema_follows_its_definition(train):
    """Decay 0.9 without warm-up from the start of training on: after one update 0.9 * start + 0.1 * weights."""
    import timm

    _, folder = train("--epochs", "1", *PLAIN, "-b", "24", "--model-ema", "--model-ema-decay", "0.9")
    state = last(folder)
    torch.manual_seed(42)
    start = timm.create_model(state["arch"], **state["model_kwargs"]).state_dict()
    for name, value in state["state_dict_ema"].items():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * state["state_dict"][name], rtol=1e-5, atol=1e-7)


def test_two_starts_of_one_config_are_the_same_run(train, assert_same_bits):
    folders = [train("--epochs", "2", *RICH, "--workers", str(workers), name=f"w{workers}")[1] for workers in (0, 1)]
    assert_same_bits(*folders)
    _, other = train("--epochs", "2", *RICH, "--workers", "0", "--seed", "1", name="other")
    assert rows(other) != rows(folders[0])


def test_a_run_that_crashed_goes_on_as_if_nothing_had_been(train, assert_same_bits, monkeypatch):
    """In a step, in evaluation, before the second epoch's end is saved, and after the last one's: by whatever error."""

    def crash(method: str, when) -> None:
        def crashing(self, *args, **kwargs):
            if when(self.progress):
                raise ZeroDivisionError
            return real(self, *args, **kwargs)

        real = getattr(Trainer, method)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(Trainer, method, crashing)
            train(*settings, name="broken")

    settings = ["--epochs", "3", *RICH, "--workers", "0", "--recovery-interval", "2"]
    _, straight = train(*settings, name="straight")
    crash("train_step", lambda progress: progress.updates == 3)
    crash("evaluate_epoch", lambda progress: progress.epoch == 1)
    crash("save", lambda progress: progress.epoch == 2 and progress.trained is None)
    crash("finish_epoch", lambda progress: progress.epoch == 2)
    out, broken = train(*settings, name="broken")
    assert "2 of 3 epochs are done" in out.out
    assert_same_bits(straight, broken)


def test_a_finished_run_is_not_trained_again(train):
    _, folder = train("--epochs", "1", *PLAIN)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    out, _ = train("--epochs", "1", *PLAIN)
    assert "already finished: 1 epochs, best top1" in out.out
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before


@pytest.fixture
def poison(monkeypatch):
    """Makes the images of a step NaN where `when` says so of its Progress."""

    def poison(when) -> None:
        def next_batch(self, *args):
            batch = real(self, *args)
            return batch._replace(images=batch.images * float("nan")) if when(self.progress) else batch

        real = Trainer.next_batch
        monkeypatch.setattr(Trainer, "next_batch", next_batch)

    return poison


def assert_finite(folder: Path) -> None:
    """Every checkpoint of a run, with its averaged weights and its optimizer."""
    names = {path.name for path in folder.glob("*.tar")}
    assert {"last.pth.tar", "previous.pth.tar"} <= names
    for name in names:
        state = file_format.read(folder / name)
        moments = [*state.get("optimizer", {}).get("state", {}).values()]
        for values in (state["state_dict"], state.get("state_dict_ema", {}), *moments):
            assert all(value.isfinite().all() for value in values.values()), name


def test_a_few_steps_that_are_not_finite_are_left_out(train, poison, monkeypatch):
    """Weights, averaged weights and the optimizer do not see them; the first of a row is told."""

    def train_step(self, *args):
        def now():
            values = [*self.parts.model.state_dict().values(), *self.parts.ema.module.state_dict().values()]
            return [value.clone() for value in values]

        before = now()
        result = real(self, *args)
        changed.append(not all(map(torch.equal, before, now())))
        return result

    real, changed = Trainer.train_step, []
    monkeypatch.setattr(Trainer, "train_step", train_step)
    poison(lambda progress: progress.updates in (1, 2, 7))
    out, folder = train("--epochs", "2", *RICH, "--workers", "0", "--warmup-epochs", "0")
    assert changed == [number not in (1, 2, 7) for number in range(12)]
    told = r"^warning: loss or gradient is not finite \(loss nan, .*\) at epoch (\d), update (\d), .*; the update was skipped"
    assert re.findall(told, out.out, re.M) == [("1", "2"), ("2", "2")] and out.out.count("warning: ") == 2
    assert {int(state["step"]) for state in last(folder)["optimizer"]["state"].values()} == {9}
    assert last(folder)["progress"]["left_out"] == [2, 3, 8] and last(folder)["progress"]["rollbacks"] == 0
    assert_finite(folder)
    assert [0 < float(row["train_loss"]) < 10 for row in rows(folder)] == [True, True]


def test_bad_steps_do_not_enter_the_training_loss(train, poison, monkeypatch):
    losses = []

    def end_update(self, finite):
        losses.append(self.update_sums[0].item() / self.update_images)
        real(self, finite)

    real = EpochMeter.end_update
    monkeypatch.setattr(EpochMeter, "end_update", end_update)
    poison(lambda progress: progress.updates == 1)
    out, folder = train("--epochs", "1", *PLAIN, "--grad-accum-steps", "1", "--log-interval", "1")
    assert len(losses) == 3 and math.isnan(losses[1])
    assert float(rows(folder)[0]["train_loss"]) == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-6)
    assert "nan  acc" not in out.out


def test_bad_steps_that_alternate_with_good_ones_are_counted_as_well(train, poison, monkeypatch):
    """Across epochs and a restart; those that are long ago are not."""
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 3)
    monkeypatch.setattr(trainer_module, "WINDOW", 6)
    poison(lambda progress: progress.rollbacks == 0 and progress.updates % 2 == 1)
    train("--epochs", "1", *PLAIN)
    out, folder = train("--epochs", "2", *PLAIN)  # the second, fourth and sixth of six
    assert (
        "at epoch 2, update 3, lr 0.1, like 3 of the last 6 updates; rolling back to the start of the epoch (1 of at most 3"
        in out.out
    )
    monkeypatch.setattr(trainer_module, "WINDOW", 4)
    out, folder = train("--epochs", "2", *PLAIN, name="fewer")
    assert out.out.count("the update was skipped") == 3 and "rolling back" not in out.out


def test_a_run_of_bad_steps_goes_back_and_on_with_other_random_numbers(train, poison, assert_same_bits, monkeypatch):
    """Two in a row here, in the second epoch, to whose beginning the run goes back.

    What comes is a function of the config again: whatever was saved when, and wherever the run was interrupted.
    """
    seen = {}

    def next_batch(self, *args):
        batch = real(self, *args)
        seen[self.progress.updates, self.progress.rollbacks] = batch.images
        return batch

    real = Trainer.next_batch
    monkeypatch.setattr(Trainer, "next_batch", next_batch)
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 2)
    poison(lambda progress: progress.rollbacks == 0 and 8 <= progress.updates)
    settings = ["--epochs", "2", *RICH]

    def replace(source, target):
        if Path(target).name == "epoch_start.pth.tar":
            starts.append(target)
            if len(starts) == 2:  # a kill would leave the first epoch's beginning there
                shutil.copytree(Path(target).parent, Path(target).parent.with_name("killed"))
        real_replace(source, target)

    starts, real_replace = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        out, folder = train(*settings, "--recovery-interval", "2", "--workers", "0")
    assert "like 2 of the last 100 updates; rolling back to the start of the epoch (1 of at most 3)" in out.out
    assert out.out.count("rolling back") == 1
    assert f"resuming from {folder}/last.pth.tar: 1 of 2 epochs are done\n" in out.out
    assert last(folder)["progress"]["rollbacks"] == 1 and last(folder)["progress"]["updates"] == 12
    assert_finite(folder)
    assert [key for key in seen if key[1] == 1] == [(updates, 1) for updates in range(6, 12)]
    assert not torch.equal(seen[8, 0], seen[8, 1])

    _, again = train(*settings, "--recovery-interval", "1", "--workers", "2", name="again")
    assert_same_bits(folder, again)
    _, killed = train(*settings, "--workers", "0", name="killed")
    assert_same_bits(folder, killed)

    def train_step(self, *args):
        if (self.progress.updates, self.progress.rollbacks) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self, *args)

    real_step = Trainer.train_step
    for moment in ((8, 0), (9, 1)):  # amid the bad steps, and after going back
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", train_step)
            _, stopped = train(*settings, "--workers", "0", name=f"stopped{moment[1]}", status=75)
        train(*settings, "--workers", "0", name=stopped.name)
        assert_same_bits(folder, stopped)

    def crash(self):
        if isinstance(self, Restorer) and self.folder.name == "roll_back":
            real_roll_back(self)
        raise ZeroDivisionError

    real_roll_back = Restorer.roll_back
    for place, broken in ((Restorer, "roll_back"), (Reporter, "count_damage")):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(place, broken, crash)
            train(*settings, "--workers", "0", name=broken)
        _, crashed = train(*settings, "--workers", "0", name=broken)
        assert_same_bits(folder, crashed)


def test_a_damaged_beginning_of_the_epoch_takes_nobodys_place(train, poison, monkeypatch):
    def roll_back(self):
        start = self.folder / "epoch_start.pth.tar"
        data = bytearray(start.read_bytes())
        data[len(data) // 2] ^= 1
        start.unlink()  # at first it is another name of the last one
        start.write_bytes(data)
        real(self)

    real = Restorer.roll_back
    monkeypatch.setattr(Restorer, "roll_back", roll_back)
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 2)
    poison(lambda progress: progress.updates >= 8)
    out, folder = train("--epochs", "2", *RICH, "--workers", "0", "--recovery-interval", "1", status=1)
    assert f"{folder}/epoch_start.pth.tar: damaged, so the run cannot roll back" in out.error
    assert last(folder)["progress"]["updates"] in (8, 9)


def test_a_full_disk_and_bad_steps_do_not_end_the_run(train, poison, monkeypatch, assert_same_bits):
    """The save inside the epoch fails; the run goes back to the beginning of the epoch all the same."""

    def write(path, state, **options):
        progress = state.get("progress")
        if full and progress and progress["update"] and progress["epoch"] == 1 and not progress["rollbacks"]:
            raise UserError(f"{path}: cannot be written: No space left on device")
        real(path, state, **options)

    real = file_format.write
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 2)
    poison(lambda progress: progress.rollbacks == 0 and progress.updates >= 8)
    settings = ["--epochs", "2", *RICH, "--workers", "0", "--recovery-interval", "2"]
    full = False
    _, folder = train(*settings)
    monkeypatch.setattr(file_format, "write", write)
    full = True
    out, cramped = train(*settings, name="cramped")
    assert (
        "No space left on device; training continues" in out.out
        and "rolling back to the start of the epoch (1 of" in out.out
    )
    assert_same_bits(folder, cramped)


def test_a_start_that_is_not_finite_is_one_line(train, tiny, tmp_path):
    _, folder = train("--epochs", "1", *PLAIN, name="good")
    state = last(folder)
    state["state_dict"]["head.weight"][0, 0] = float("nan")
    file_format.write(tmp_path / "bad.pth.tar", state)
    out, _ = train("--epochs", "1", *PLAIN, "--initial-checkpoint", tmp_path / "bad.pth.tar", status=1)
    assert "the starting weights are not finite" in out.error


def test_bad_steps_without_end_are_one_error_and_leave_good_checkpoints(train, poison, monkeypatch):
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 2)
    poison(lambda progress: progress.updates >= 8)
    out, folder = train("--epochs", "3", *RICH, "--workers", "0", "--recovery-interval", "1", status=1)
    assert re.findall(r"rolling back to the start of the epoch \((\d) of at most 3\)", out.out) == ["1", "2", "3"]
    assert "like 2 of the last 100 updates; the run rolled back to the start of an epoch 3 times" in out.error
    assert "at epoch 2, update 4, " in out.error and "--lr" in out.error
    assert_finite(folder)


@pytest.mark.parametrize("amp", [[], ["--amp", "--amp-dtype", "bfloat16"]], ids=["fp32", "bf16"])
def test_weights_that_blow_up_are_not_kept(train, amp):
    """With lr 1e30 a finite gradient makes weights that are not worth a checkpoint; what was saved before stays."""
    good = ["--epochs", "1", *PLAIN, "-b", "24", *amp]
    _, folder = train(*good)
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    out, folder = train("--epochs", "2", *good[2:], "--lr", "1e30", status=1)
    assert "the weights are not finite after update 2; the run rolled back" in out.error and "--clip-grad" in out.error
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == before
    out, _ = train("--epochs", "2", *good[2:])
    assert "1 of 2 epochs are done" in out.out and "done: best" in out.out
    assert_finite(folder)


def test_weights_that_only_evaluation_finds_bad_are_not_gone_on_from(train, monkeypatch):
    """Their checkpoint was written before: where the epoch began is the last good one, and the one to go on from."""

    def evaluate(*args):
        found = real(*args)
        return {name: dataclasses.replace(accuracy, loss=float("nan")) for name, accuracy in found.items()}

    real = trainer_module.evaluate
    _, folder = train("--epochs", "1", *PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "evaluate", evaluate)
        out, _ = train("--epochs", "2", *PLAIN, status=1)
    assert re.findall(r"rolling back to the start of the epoch \((\d) of at most 3\)", out.out) == ["1", "2", "3"]
    assert "the raw weights' validation loss is not finite (nan) after epoch 2; the run rolled back" in out.error
    out, _ = train("--epochs", "2", *PLAIN, "--lr", "0.05")
    assert "1 of 2 epochs are done" in out.out and "done: best" in out.out


def test_statistics_that_are_not_finite_are_not_kept(train, poison):
    """Left out or not, a bad step has gone through batch norm, whose running mean is not a weight."""
    poison(lambda progress: progress.rollbacks == 0 and progress.updates == 4)
    settings = ["--epochs", "2", *RICH, "--workers", "0", "--recovery-interval", "1", "--model", "test_resnet"]
    out, folder = train(*settings, "--model-kwargs", "in_chans=3", "--drop", "0", "--drop-path", "0")
    assert (
        "the weights are not finite after update 5; rolling back to the start of the epoch (1 of at most 3)" in out.out
    )
    assert_finite(folder)


def test_fp16_overflow_is_skipped_and_rescaled_but_not_for_ever(train, monkeypatch):
    out, folder = train("--epochs", "2", *PLAIN, "-b", "8", "--lr", "1e-3", "--amp")  # CPU fp16
    assert "float16 where autocast allows, else float32 on cpu" in out.out
    scaler = last(folder)["amp_scaler"]
    assert scaler["scale"] > 0 and last(folder)["progress"]["updates"] == 6

    monkeypatch.setattr(trainer_module, "get_total_norm", lambda grads: torch.tensor(float("inf")))
    monkeypatch.setattr(trainer_module, "MAX_SKIPPED", 2)
    out, _ = train("--epochs", "2", *PLAIN, "-b", "8", "--lr", "1e-3", "--amp", name="stuck", status=1)
    assert (
        "gradient is not finite" in out.error
        and "update 2" in out.error
        and "like 2 of the last 100 updates" in out.error
    )


def test_deterministic_algorithms_are_asked_for_and_change_nothing_on_a_cpu(train, assert_same_bits, monkeypatch):
    """On CUDA tests/cli/test_interruption.py shows what they are for."""

    def train_step(self, *args):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic))
        return real(self, *args)

    real, seen = Trainer.train_step, []
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(os, "environ", {**os.environ})
    settings = ["--epochs", "1", *RICH, "--warmup-epochs", "0", "--workers", "0", "-b", "12"]
    out, deterministic = train(*settings, "--deterministic", name="deterministic")
    assert "precision  float32, deterministic algorithms on cpu" in out.out
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    out, plain = train(*settings, name="plain")
    assert "precision  float32 on cpu" in out.out and seen == [(True, True)] * 2 + [(False, False)] * 2
    assert_same_bits(plain, deterministic)


def test_an_operation_that_is_not_deterministic_is_one_line(train, monkeypatch):
    def train_step(self, *args):  # as torch says it on CUDA
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set\n'torch...'")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    out, _ = train("--epochs", "1", *PLAIN, "--deterministic", status=1)
    assert "error: deterministic: cumsum_cuda_kernel does not have" in out.error and "--no-deterministic" in out.error
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_every_switch_of_the_loop_runs_together(train, run_validate):
    switches = ["--amp", "--amp-dtype", "bfloat16", "--clip-grad", "1", "--clip-mode", "agc", "--layer-decay", "0.8"]
    switches += ["--grad-checkpointing", "--torchcompile", "aot_eager", "--sched-on-updates", "--mixup-off-epoch", "1"]
    switches += ["--grad-accum-steps", "2", "--workers", "0"]
    _, folder = train("--epochs", "2", *RICH, *switches)
    assert not [name for name in last(folder)["state_dict"] if "_orig_mod" in name or name.startswith("module.")]
    best = file_format.read(folder / "model_best.pth.tar")["metrics"]
    out = run_validate(folder)
    assert f"top-1 {best['top1']:.3f}  top-5 {best['top5']:.3f}  loss {best['loss']:.6f}" in out.out


def test_mixing_can_be_switched_off_late(train, monkeypatch):
    from timm.data import Mixup

    seen = []
    real = Mixup.__call__
    monkeypatch.setattr(Mixup, "__call__", lambda self, x, y: (seen.append(self.mixup_enabled), real(self, x, y))[1])
    train("--epochs", "3", *RICH, "--mixup-off-epoch", "2", "--workers", "0")
    assert seen == [True] * 12 + [False] * 6


def test_lr_of_each_epoch_is_logged_as_used(train):
    _, folder = train("--epochs", "4", "--lr", "1e-3", "--warmup-epochs", "2", "--warmup-lr", "1e-4", "--min-lr", "1e-5",
                      "--cooldown-epochs", "1", "-b", "24", "--workers", "0")  # fmt: skip
    got = [float(row["lr"]) for row in rows(folder)]
    assert got == pytest.approx([1e-4, 5.5e-4, 5.05e-4, 1e-5 + 0.99e-3 * (1 - 0.5**0.5) / 2, 1e-5])


def test_eval_metric_loss_selects_the_smallest(train):
    _, folder = train("--epochs", "3", *PLAIN, "--eval-metric", "loss")
    best = file_format.read(folder / "model_best.pth.tar")["metrics"]["loss"]
    assert best == min(float(row["eval_loss"]) for row in rows(folder))


def test_the_official_command_line_trains(run_train, make_folder, official, tmp_path):
    """As published, then made small enough for a test by flags behind it."""
    smaller = [
        "--warmup-epochs",
        "0",
        "--epochs",
        "1",
        "--cooldown-epochs",
        "0",
        "-b",
        "4",
        "-j",
        "0",
        "--img-size",
        "32",
        "--output",
        tmp_path,
    ]
    out = run_train(make_folder(), *official, *smaller, "--model-kwargs", "depth=1")
    assert out.status == 0, out.err
    assert "model      tnt_s_patch16_224" in out.out and "float16" in out.out and "EMA 0.99996" in out.out
    assert len(rows(tmp_path / "tnt_s_patch16_224")) == 1


def test_a_run_is_not_continued_on_other_classes(train, tmp_path):
    train("--epochs", "1", *PLAIN)
    for split in ("train", "val"):
        (tmp_path / "data" / split / "ant").rename(tmp_path / "data" / split / "zebra")
    out, _ = train("--epochs", "2", *PLAIN, status=1)
    assert "ant" in out.error and "zebra" in out.error


def test_one_run_at_a_time_in_a_folder(train, tmp_path):
    hold = f"from tnt_timm.checkpoints import run_folder; from pathlib import Path; f = Path({str(tmp_path / 'out/run')!r});"
    hold += "lock = run_folder.prepare(f); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        out, _ = train("--epochs", "1", *PLAIN, status=1)
        assert "another run is using this folder" in out.error
        other.kill()
    train("--epochs", "1", *PLAIN)


def test_clip_mode_agc_leaves_the_head_alone(train, monkeypatch):
    clipped = []
    real = trainer_module.dispatch_clip_grad
    monkeypatch.setattr(
        trainer_module, "dispatch_clip_grad", lambda p, *rest: (clipped.append(len(p := list(p))), real(p, *rest))[1]
    )
    train("--epochs", "1", *PLAIN, "-b", "24", "--clip-grad", "0.1", "--clip-mode", "agc")
    train("--epochs", "1", *PLAIN, "-b", "24", "--clip-grad", "0.1", name="norm")
    assert clipped[0] == clipped[1] - 2  # the head's weight and bias


def test_threads_are_set_and_recorded(train, run_validate):
    usual = torch.get_num_threads()
    _, folder = train("--epochs", "1", *PLAIN, "--threads", "2")
    assert torch.get_num_threads() == 2 and json.loads((folder / "run.json").read_text())["threads"] == 2
    run_validate(folder, "--threads", "3")
    assert torch.get_num_threads() == 3
    assert run_validate(folder).status == 0
    assert torch.get_num_threads() == 2  # as the checkpoint says
    train("--epochs", "1", *PLAIN, name="other")
    assert torch.get_num_threads() == usual  # one model's setting is not the next one's
