"""The ImageNet recipe, against the official run's definition."""

import math
from pathlib import Path

import pytest
import torch

from tnt_timm.data.sampling import TrainingSampler
from tnt_timm.training import build, config
from tnt_timm.training.distributed import World

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
    pace = build._pace(settings, EIGHT, IMAGENET)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=pace.lr)
    scheduler, pace = build._scheduler(settings, optimizer, pace)
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
        return build._pace(config.resolve(list(argv)).config, EIGHT, IMAGENET).lr

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
