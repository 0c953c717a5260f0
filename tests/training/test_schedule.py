"""Learning rates that cannot be meant are refused before anything is written; short runs are told what they leave out."""

import pytest

from tnt_timm.errors import ConfigError
from tnt_timm.runtime.distributed import World
from tnt_timm.settings import config
from tnt_timm.training import schedule


@pytest.fixture
def rates():
    """Check a command line's schedule for 800 images on one process -> the settings, and their pace."""

    def rates(argv):
        settings = config.resolve(argv.split()).config
        pace = schedule.pace_of(settings, World(0, 1, "cpu", 0), 800)
        schedule.check_rates(settings, pace)
        return settings, schedule.lr_schedule(settings, schedule.torch.optim.SGD([schedule.torch.zeros(1)]), pace)[1]

    return rates


@pytest.mark.parametrize(
    "argv, said",
    [
        ("--lr 5e-6", "min_lr: 1e-05: above lr 5e-06, so the rate would rise; set min_lr to 0, or raise lr"),
        ("-b 8", "min_lr: 1e-05: above lr 7.8125e-06 (lr_base 0.0005 at batch 8), so the rate would rise"),
        ("--lr 1e-3 --min-lr 1e-2 --sched poly", "min_lr: 0.01: above lr 0.001"),
        ("--lr 1e-7 --min-lr 0", "warmup_lr: 1e-06: above lr 1e-07, so the rate would fall"),
        ("--lr 1e-3 --warmup-lr 1 --sched constant", "warmup_lr: 1: above lr 0.001"),
        (
            "--lr 1e-3 --epochs 10 --lr-cycle-mul 0.5 --cooldown-epochs 12",
            "change lr_cycle_mul (0.5) or cooldown_epochs",
        ),
    ],
)
def test_refused(rates, argv, said):
    with pytest.raises(ConfigError) as caught:
        rates(argv)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        "--lr 1e-5",  # constant
        "--lr 5e-6 --min-lr 0",
        "--lr 5e-6 --sched constant",  # has no min_lr
        "--lr 1e-9 --min-lr 0 --warmup-epochs 0",
        "--lr 1e-3 --lr-noise 0.2 0.9",
        "--lr 1e-3 --epochs 10 --lr-cycle-mul 0.5 --lr-cycle-limit 2 --cooldown-epochs 0 --sched-on-updates",
    ],
)
def test_accepted(rates, argv):
    rates(argv)


@pytest.mark.parametrize(
    "argv, said",
    [
        ("--epochs 6 --cooldown-epochs 0", "lr 0.001 is not reached, only 0.0008: warm-up takes 5 of 6 epochs"),
        ("--epochs 60", ""),
        (
            "--sched multistep --decay-milestones 30 90 --epochs 60",
            "decay_milestones: [90]: after the last of 60 epochs",
        ),
        ("--mixup 1 --mixup-off-epoch 400", "mixup_off_epoch: 400: after the last of 310 epochs, so mixing stays on"),
        ("--mixup 1 --mixup-off-epoch 305", ""),
        ("--model-ema", "model_ema: the average is over about 25,000 updates, but the run has only 1,860"),
        ("--model-ema --model-ema-warmup", ""),
        ("--model-ema --model-ema-window 4", ""),
    ],
)
def test_notices(rates, argv, said):
    found = schedule.notices(*rates(f"--lr 1e-3 {argv}"))
    assert len(found) == bool(said) and said in "".join(found)
