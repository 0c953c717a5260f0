"""Transfer on real images: what a network learnt from some digits, at one size, helps it with the others at a larger one."""

import csv
import re

import pytest
import torch

from tnt_timm.checkpoints import file_format

# The configs of the digits, made to learn faster: few epochs have to do.
FAST = ["--mixup", "0", "--cutmix", "0", "--scale", "0.8", "1", "--drop-path", "0", "--workers", "0"]
FAST += ["--warmup-epochs", "0"]
BUDGET = ["--config", "configs/finetune/digits.yaml", *FAST, "--epochs", "2"]


def final(folder) -> float:
    """Top-1 after the last epoch, of the selected kind of weights."""
    *_, row = csv.DictReader((folder / "summary.csv").open())
    return float(row.get("eval_ema_top1") or row["eval_top1"])


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    """A run on digits 0 to 4 at 32 pixels."""
    root = tmp_path_factory.mktemp("trained")
    argv = ["--config", "configs/digits.yaml", "--dataset", "digits/0-4", *FAST, "--epochs", "8"]
    run = launch(root / "log", [*argv, "--output", root, "--experiment", "run"])
    assert run.wait() == 0, run.err
    return root / "run"


@pytest.fixture
def finetune(start, tmp_path):
    def finetune(name, *argv, processes=1):
        run = start([*BUDGET, *argv, "--output", tmp_path, "--experiment", name], processes)
        assert run.wait() == 0, run.err
        return run.out, tmp_path / name

    return finetune


def test_fine_tuning_beats_training_from_scratch_with_the_same_budget(trained, finetune, run_validate):
    """44 updates at 48 pixels, twice each; benchmarks/transfer.md has longer runs, and a second lr from scratch."""
    assert final(trained) > 90  # it has learnt its own digits
    tuned, scratch = [], []
    for seed in ("1", "2"):
        out, folder = finetune(f"tuned{seed}", "--pretrained-path", trained, "--seed", seed)
        tuned.append(final(folder))
        assert re.search(r"patch_pos \(1, 5, 128\) -> \(1, 10, 128\)", out)  # class token and 2x2 sentences -> 3x3
        assert "its head is for other classes (0, 1, 2, ...), so a new one is trained" in out and "notice" not in out
        assert "digits/5-9: 716 training and 180 validation images, 5 classes" in out
        scratch.append(final(finetune(f"scratch{seed}", "--pretrained-path", "", "--seed", seed)[1]))
    assert sum(tuned) / 2 > sum(scratch) / 2 + 4
    found = run_validate(folder, "--workers", "0", "--per-class").out
    assert "(180 images, each counted once)" in found and "\n5  top-1" in found and "\n9  top-1" in found


def test_a_linear_probe_on_two_processes(trained, finetune):
    """The backbone has the bits that it started with on every process, or they would differ after DDP's broadcast."""
    out, folder = finetune(
        "probe", "--pretrained-path", trained, "--freeze", "backbone", "--lr", "1e-2", "--epochs", "1", processes=2
    )
    assert "(645 trained, the others frozen)" in out and "notice" not in out
    before = file_format.weights_of(file_format.read(trained / "model_best.pth.tar"))
    state = file_format.read(folder / "last.pth.tar")
    for weights in (state["state_dict"], state["state_dict_ema"]):
        same = {name for name, value in weights.items() if torch.equal(value, before[name])}
        assert weights.keys() - same == {"head.weight", "head.bias", "patch_pos"}  # the positions were resampled
    assert torch.equal(state["state_dict"]["patch_pos"], state["state_dict_ema"]["patch_pos"])
    assert final(folder) > 30


def test_the_learning_rate_of_training_gets_a_notice(trained, finetune):
    out, _ = finetune("fast", "--pretrained-path", trained, "--lr", "1.5e-3", "--epochs", "1")
    assert "notice: lr 0.0015 at batch 32 is a rate for training from scratch (about 0.0015 here)" in out


def test_a_head_for_other_classes_is_not_taken_silently(trained, run_train, tmp_path):
    """There are five classes on both sides."""
    argv = [
        "--config",
        "configs/digits.yaml",
        *FAST,
        "--epochs",
        "1",
        "--lr",
        "1e-300",
        "--min-lr",
        "0",
        "--no-model-ema",
    ]
    argv += ["--warmup-lr", "0", "--output", tmp_path]
    for dataset, status in (("digits/5-9", "is kept"), ("digits/0-4", "")):
        out = run_train(
            *argv, "--dataset", dataset, "--initial-checkpoint", trained, "--experiment", dataset.replace("/", "-")
        )
        assert out.status == 0, out.err
        assert ("its head is for other classes (0, 1, 2, ...) and is kept" in out.out) == bool(status)
    assert final(tmp_path / "digits-0-4") > 90 > 60 > final(tmp_path / "digits-5-9")
