"""Find settings that were given but have no effect beside the others."""

from typing import Any, Iterator, Tuple

from tnt_timm.settings.schedule_rules import WITH_MIN_LR
from tnt_timm.settings.schema import DEFAULTS, Distillation, TrainConfig


def without_effect(config: TrainConfig) -> Iterator[Tuple[str, str]]:
    """Yield the settings without effect, each with the reason, such as `without mixup`. Those that are default or off are not."""
    values = {key: value for _, group in config for key, value in group}
    for keys, has_effect, why in _conditions(config):
        if not has_effect:
            yield from ((key, why) for key in keys.split() if values[key] and values[key] != DEFAULTS[key])


def _conditions(config: TrainConfig) -> Iterator[Tuple[str, Any, str]]:
    """Yield settings, whether they have an effect (as a truth value), and why they have none otherwise."""
    s, augmentation, run = config.schedule, config.augmentation, config.run
    sched = f"with sched {s.sched}"
    yield " ".join(Distillation.model_fields), config.distillation.kd_model_name, "without a teacher (kd_model_name)"
    kind = config.data.dataset.lower().partition("/")[0]
    yield "train_num_samples val_num_samples", kind == "wds", "without a wds/ dataset"
    yield "input_key target_key", kind in ("hfds", "wds"), "without a hfds/ or wds/ dataset"
    yield "dataset_download", kind == "torch", "without a torch/ dataset"
    yield "min_lr cooldown_epochs lr_cycle_limit", s.sched in WITH_MIN_LR, sched
    yield "lr_k_decay", s.sched in ("cosine", "poly"), sched
    yield "decay_epochs", s.sched == "step", sched
    yield "decay_milestones", s.sched == "multistep", sched
    yield "decay_rate", s.sched in ("step", "multistep", "poly"), sched
    yield "lr_cycle_mul lr_cycle_decay", s.lr_cycle_limit > 1, "with one cycle (lr_cycle_limit)"
    yield "warmup_lr warmup_prefix", s.warmup_epochs, "without warm-up (warmup_epochs)"
    yield "lr_noise_pct lr_noise_std", s.lr_noise, "without lr_noise"
    yield "lr_base lr_base_size lr_base_scale", s.lr is None, f"because lr is set ({s.lr})"
    yield "mixup_prob mixup_mode mixup_off_epoch", augmentation.mixes, "without mixup or cutmix"
    both = augmentation.mixup and (augmentation.cutmix or augmentation.cutmix_minmax)
    yield "mixup_switch_prob", both, "unless both mixup and cutmix are on"
    yield "color_jitter", not augmentation.aa, "because aa is set"
    yield "augment_on", not augmentation.no_aug, "with no_aug"
    yield "remode recount", augmentation.reprob, "without random erasing (reprob)"
    yield "model_ema_window model_ema_decay model_ema_warmup", config.ema.model_ema, "without model_ema"
    yield "clip_mode", config.optimizer.clip_grad, "without clip_grad"
    yield "amp_dtype", config.compute.amp, "without amp"
    yield "wandb_project wandb_tags", run.log_wandb, "without log_wandb"
