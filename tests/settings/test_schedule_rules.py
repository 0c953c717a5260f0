"""Schedules that cannot be meant are refused; settings without effect are named."""

import pytest

from tnt_timm.errors import ConfigError
from tnt_timm.settings import config


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            "--epochs 3",
            "command line: epochs: 3: not longer than the default warm-up of 5 epochs, so lr would not be reached",
        ),
        ("--epochs 5 --cooldown-epochs 0", "epochs: 5: not longer than the default warm-up"),
        ("--epochs 3 --warmup-epochs 0", "command line: epochs: 3: shorter than the default cooldown of 10 epochs"),
        ("--epochs 3 --warmup-epochs 3", "command line: warmup_epochs: 3: lr would not be reached in 3 epochs"),
        ("--config tnt_s --epochs 3", "tnt_s.yaml: warmup_epochs: 5: lr would not be reached in 3 epochs"),
        ("--sched step --epochs 50", "command line: sched: step, decay_epochs: 90: lr would never decay in 50 epochs"),
        ("--sched step --epochs 50 --decay-epochs 50", "command line: decay_epochs: 50: lr would never decay"),
        ("--sched step --decay-rate 2", "decay_rate: 2: lr would rise"),
        ("--sched multistep --decay-rate 10", "decay_rate: 10: lr would rise"),
        (
            "--sched multistep --epochs 50",
            "command line: sched: multistep, decay_milestones: [90, 180, 270]: lr would never",
        ),
        (
            "--sched multistep --decay-milestones 60 30",
            "decay_milestones: [60, 30]: expected epochs from 1 on, in increasing",
        ),
        ("--sched multistep --decay-milestones 30 30", "in increasing order"),
        ("--sched multistep --decay-milestones 0 30", "from 1 on"),
        ("--lr-noise 0.9 0.4", "lr_noise: [0.9, 0.4]: expected two fractions"),
        ("--lr-noise 0.4 9", "lr_noise: [0.4, 9]: expected two fractions"),
        ("--lr-noise 0.5 0.5", "lr_noise: [0.5, 0.5]"),
        ("--lr-noise 0 1 --lr-noise-pct 0", "lr_noise_pct: 0: expected a fraction"),  # timm would draw for ever
        ("--lr-noise 0 1 --lr-noise-pct 1.5", "lr_noise_pct: 1.5"),  # lr below 0
        ("--lr-noise 0 1 --lr-noise-std 1e9", "lr_noise_std: 1e+09: almost all noise"),
    ],
)
def test_refused(argv, said):
    with pytest.raises(ConfigError) as caught:
        config.resolve(argv.split())
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        "--epochs 1 --warmup-epochs 0 --cooldown-epochs 0",
        "--epochs 3 --warmup-epochs 2 --cooldown-epochs 10",  # both are given
        "--epochs 3 --warmup-epochs 5 --warmup-prefix --cooldown-epochs 0",
        "--epochs 6 --sched constant",  # has no cooldown
        "--sched step --epochs 90 --decay-epochs 30",
        "--sched multistep --decay-milestones 30 400 --epochs 90",
        "--sched poly --decay-rate 2",  # a power
        "--lr-noise 0.4 0.9 --lr-noise-pct 0.5",
    ],
)
def test_accepted(argv):
    config.resolve(argv.split())


@pytest.mark.parametrize(
    "argv, keys",
    [
        ("--sched step --min-lr 1e-6 --lr-k-decay 2 --cooldown-epochs 3", "min_lr cooldown_epochs lr_k_decay"),
        ("--decay-epochs 30 --decay-rate 0.5 --decay-milestones 3", "decay_epochs decay_milestones decay_rate"),
        ("--lr-cycle-mul 2 --lr-cycle-decay 0.5", "lr_cycle_mul lr_cycle_decay"),
        ("--lr-cycle-mul 2 --lr-cycle-limit 2", ""),
        ("--warmup-epochs 0 --warmup-lr 1e-5 --warmup-prefix", "warmup_lr warmup_prefix"),
        ("--lr 1e-3 --lr-base 1e-3 --lr-base-size 256", "lr_base lr_base_size"),
        ("--lr-noise-pct 0.3", "lr_noise_pct"),
        ("--model-ema-decay 0.9 --model-ema-warmup", "model_ema_decay model_ema_warmup"),
        ("--model-ema-decay 0.9 --model-ema-warmup --model-ema", ""),
        ("--mixup-prob 0.5 --mixup-off-epoch 9", "mixup_prob mixup_off_epoch"),
        ("--mixup 1 --mixup-switch-prob 0.1 --mixup-off-epoch 9", "mixup_switch_prob"),
        ("--remode const --recount 2", "remode recount"),
        ("--aa rand-m9 --color-jitter 0.2", "color_jitter"),
        ("--clip-mode agc --amp-dtype bfloat16 --wandb-tags a", "clip_mode amp_dtype wandb_tags"),
        ("--kd-temperature 2", "kd_temperature"),
        ("", ""),
        ("--config tnt_s", ""),
        ("--config digits", ""),
        ("--config finetune/tnt_s_imagenet", ""),
    ],
)
def test_settings_without_effect_are_named(argv, keys):
    notices = config.resolve(argv.split()).notices
    assert [notice.split()[2] for notice in notices] == keys.split(), notices
    assert all("has no effect" in notice for notice in notices)
