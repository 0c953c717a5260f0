"""The ImageNet recipe, against the official run's definition."""

import math
from pathlib import Path

import pytest
import torch

from tnt_timm.data.sampling import TrainingSampler
from tnt_timm.runtime.distributed import World
from tnt_timm.settings import config
from tnt_timm.training import schedule

CONFIGS = Path(__file__).parents[2] / "configs"
IMAGENET = 1_281_167
EIGHT = World(rank=0, size=8, device=torch.device("cpu"))


def official_lr(epoch: int) -> float:
    """timm 0.3.2's cosine schedule as the official command sets it up: warm-up is not a prefix, 10 epochs of cooldown."""
    lr, warmup_lr, min_lr, warmup, epochs = 1e-3, 1e-6, 1e-5, 5, 300
    if epoch < warmup:
        return warmup_lr + epoch * (lr - warmup_lr) / warmup
    if epoch < epochs:
        return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))
    return min_lr


@pytest.mark.parametrize("name", ["tnt_ti", "tnt_s", "tnt_b", "tnt_s_se"])
def test_lr_of_all_310_epochs_is_the_official_runs(name):
    settings = config.resolve(["--config", str(CONFIGS / f"{name}.yaml")]).config
    pace = schedule.pace_of(settings, EIGHT, IMAGENET)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=pace.lr)
    scheduler, pace = schedule.lr_schedule(settings, optimizer, pace)
    assert (pace.epochs, pace.updates_per_epoch, pace.global_batch) == (310, 1251, 1024)
    got = []
    for epoch in range(pace.epochs):
        scheduler.step(epoch)
        scheduler.step_update(epoch * pace.updates_per_epoch)
        got.append(optimizer.param_groups[0]["lr"])
    assert got == pytest.approx([official_lr(epoch) for epoch in range(310)], rel=1e-12)
    assert got[:6] == pytest.approx([1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993e-4], rel=1e-4)


def test_lr_base_is_deits_rule():
    def lr(*argv):
        return schedule.pace_of(config.resolve(list(argv)).config, EIGHT, IMAGENET).lr

    assert lr("-b", "128") == pytest.approx(1e-3)  # 5e-4 * 1024 / 512
    assert lr("-b", "64", "--grad-accum-steps", "2") == pytest.approx(1e-3)
    assert lr("-b", "32") == pytest.approx(2.5e-4)
    assert lr("-b", "32", "--lr-base-scale", "sqrt") == pytest.approx(5e-4 * 0.5**0.5)
    assert lr("-b", "32", "--lr", "3e-4") == 3e-4


def test_an_epoch_of_repeated_augmentation_sees_a_third_of_the_images():
    sampler = TrainingSampler(3000, 1000, 3, seed=42, rank=0, world_size=3)
    assert len({key.index for key in sampler}) == 1000
    alone = TrainingSampler(3000, 3000, 3, seed=42, rank=0, world_size=1)
    first = {key.index for key in alone}
    alone.set_epoch(1)
    assert len(first) == 1000 and len(first | {key.index for key in alone}) > 1500


# ------------------------------------------------------------------ fine-tuning

TRAIN_SIZES = dict(imagenet=IMAGENET, cifar10=50_000, cifar100=50_000, pets=3_680, flowers=2_040, inat19=265_240)


@pytest.fixture
def finetuning():
    def read(model: str, data: str):
        path = CONFIGS / "finetune" / f"{model}_{data}.yaml"
        settings = config.resolve(["--config", str(path)]).config
        return path.read_text(), settings, schedule.pace_of(settings, EIGHT, TRAIN_SIZES[data])

    return read


@pytest.mark.parametrize("data", TRAIN_SIZES)
@pytest.mark.parametrize("model", ["tnt_s", "tnt_b"])
def test_fine_tuning_is_the_papers(model, data, finetuning):
    """384 pixels, published weights, the augmentation of training, the paper's epochs and accuracy, DeiT's on ImageNet."""
    text, settings, pace = finetuning(model, data)
    assert settings.network.model == f"{model}_384" and settings.network.pretrained
    trained = config.resolve(["--config", str(CONFIGS / "tnt_s.yaml")]).config
    assert settings.augmentation == trained.augmentation
    epochs, batch, lr = (300, 128, 5e-5)
    if data.startswith("cifar"):
        epochs = 64
    if data == "imagenet":
        epochs, batch, lr = (30, 512, 5e-6)
    assert (pace.epochs, pace.global_batch, pace.lr) == (epochs, batch, lr)
    assert settings.optimizer.weight_decay == (1e-8 if data == "imagenet" else 5e-4)
    paper = dict(imagenet="83.1 83.9", cifar10="98.7 99.1", cifar100="90.1 91.1", flowers="98.8 99.0")
    paper |= dict(pets="94.7 95.0", inat19="81.4 83.2")
    expected = paper[data].split()[model == "tnt_b"]
    assert f"Expected:  {expected} % top-1 (the paper's" in text and "not measured here" in text
    if model == "tnt_s":
        assert f"{pace.epochs} epochs of {pace.updates_per_epoch:,} updates" in text
    assert schedule.destructive_lr(settings, pace) is None


@pytest.mark.parametrize("data", TRAIN_SIZES)
def test_the_ema_forgets_where_fine_tuning_began(data, finetuning):
    """Less than a thousandth of the first weights is left at the end, and it averages over more than a hundred updates."""
    _, settings, pace = finetuning("tnt_s", data)
    decay = schedule.ema_decay(settings.ema, pace.updates_per_epoch)
    assert decay ** (pace.updates_per_epoch * pace.epochs) < 1e-3 and 1 / (1 - decay) > 100
    assert settings.ema.model_ema_warmup


def test_lr_of_fine_tuning_on_imagenet_is_constant_after_deits_warm_up(finetuning):
    _, settings, pace = finetuning("tnt_s", "imagenet")
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=pace.lr)
    scheduler, pace = schedule.lr_schedule(settings, optimizer, pace)
    got = []
    for epoch in range(pace.epochs):
        scheduler.step(epoch)
        got.append(optimizer.param_groups[0]["lr"])
    assert got[0] == pytest.approx(1e-6) and got[5:] == pytest.approx([5e-6] * 25) and len(got) == 30


def test_window_of_the_ema_in_epochs():
    def decay(*argv):
        return schedule.ema_decay(config.resolve(list(argv)).config.ema, 100)

    assert decay() == 0.99996
    assert decay("--model-ema-decay", "0.9") == 0.9
    assert decay("--model-ema-window", "2") == 1 - 1 / 200
    assert decay("--model-ema-window", "0.001") == 0.0  # less than an update: the weights themselves


@pytest.mark.parametrize(
    "argv, warned",
    [
        (["-b", "128", "--lr", "1e-3"], True),  # as many processes as there are: 1,024
        (["-b", "128"], True),
        (["-b", "16", "--lr", "1e-3"], True),
        (["-b", "16"], False),
        (["-b", "128", "--lr", "1e-3", "--freeze", "backbone"], False),
        (["-b", "128", "--lr", "1e-3", "--opt", "sgd"], False),
    ],
)
def test_a_learning_rate_that_would_destroy_pretrained_weights_is_spoken_of(argv, warned):
    def line(*argv):
        settings = config.resolve(list(argv)).config
        return schedule.destructive_lr(settings, schedule.pace_of(settings, EIGHT, IMAGENET))

    assert bool(line("--pretrained", *argv)) == warned
    if "--freeze" not in argv:
        assert line(*argv) is None  # from scratch it is right
