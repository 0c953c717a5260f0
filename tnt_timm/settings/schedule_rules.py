"""Refuse schedules that cannot be meant, as far as the settings alone tell; training/schedule.py checks the learning rates."""

from typing import Any

WITH_MIN_LR = ("cosine", "tanh", "poly")  # schedules that end at min_lr, with cycles and cooldown
MOST_DRAWS = 1000  # timm draws noise again until it is below lr_noise_pct


def check_schedule(s: Any) -> None:
    """Raise ValueError if a `schema.Schedule` would not do what it says."""
    _check_length(s)
    _check_decay(s)
    _check_noise(s)


def _check_length(s: Any) -> None:
    warmup = 0 if s.warmup_prefix else s.warmup_epochs
    if warmup and warmup >= s.epochs:
        if "warmup_epochs" not in s.model_fields_set:
            raise ValueError(
                f"epochs: {s.epochs}: not longer than the default warm-up of {warmup} epochs, so lr would not be reached; "
                f"set warmup_epochs and cooldown_epochs, to 0 for none"
            )
        raise ValueError(f"warmup_epochs: {warmup}: lr would not be reached in {s.epochs} epochs; lower warmup_epochs")
    if s.sched in WITH_MIN_LR and "cooldown_epochs" not in s.model_fields_set and s.cooldown_epochs > s.epochs:
        raise ValueError(
            f"epochs: {s.epochs}: shorter than the default cooldown of {s.cooldown_epochs} epochs at min_lr, which are added; "
            f"set cooldown_epochs, to 0 for none"
        )


def _check_decay(s: Any) -> None:
    never = f"lr would never decay in {s.epochs} epochs"
    if s.sched == "step" and s.decay_epochs >= s.epochs:
        key = "decay_epochs" if "decay_epochs" in s.model_fields_set else "sched: step, decay_epochs"
        raise ValueError(f"{key}: {s.decay_epochs:g}: {never}; lower decay_epochs, or use sched constant")
    if s.sched == "multistep":
        key, milestones = "decay_milestones", s.decay_milestones
        key = key if key in s.model_fields_set else f"sched: multistep, {key}"
        if milestones != sorted(set(milestones)) or any(epoch < 1 for epoch in milestones):
            raise ValueError(f"{key}: {milestones}: expected epochs from 1 on, in increasing order")
        if not milestones or milestones[0] > s.epochs:
            raise ValueError(f"{key}: {milestones}: {never}; lower decay_milestones, or use sched constant")
    if s.sched in ("step", "multistep") and s.decay_rate > 1:
        raise ValueError(f"decay_rate: {s.decay_rate:g}: lr would rise at each decay; expected at most 1")


def _check_noise(s: Any) -> None:
    if s.lr_noise is None:
        return
    low, high = s.lr_noise
    if not 0 <= low < high <= 1:
        raise ValueError(f"lr_noise: [{low:g}, {high:g}]: expected two fractions of the schedule, the lower one first")
    if not 0 < s.lr_noise_pct < 1:
        raise ValueError(f"lr_noise_pct: {s.lr_noise_pct:g}: expected a fraction of lr, above 0 and below 1")
    if s.lr_noise_std > MOST_DRAWS * s.lr_noise_pct:
        raise ValueError(
            f"lr_noise_std: {s.lr_noise_std:g}: almost all noise would exceed lr_noise_pct ({s.lr_noise_pct:g}); lower it"
        )
