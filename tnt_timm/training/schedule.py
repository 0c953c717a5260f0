"""Durations and learning rate of a run: what the config gives in epochs and per batch, resolved to updates."""

import dataclasses
import math
from typing import List, Optional, Tuple

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from tnt_timm.checkpoints import file_format
from tnt_timm.checkpoints.open_model import weights_file
from tnt_timm.checkpoints.progress import Pace
from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schedule_rules import WITH_MIN_LR
from tnt_timm.settings.schema import Ema, TrainConfig

OFFICIAL_EMA_DECAY = 0.99996
OFFICIAL_LR, OFFICIAL_BATCH = 1e-3, 1024
ADAPTIVE = ("ada", "lamb")  # optimizers whose learning rate scales with the root of the batch size, by timm's rule


def pace_of(config: TrainConfig, world: World, train_size: int) -> Pace:
    """Return the durations of a run, without cooldown epochs.

    Raises:
        UserError: an update needs more images than there are.
    """
    micro_batches = config.optimizer.grad_accum_steps
    global_batch = config.data.batch_size * world.size * micro_batches
    updates = train_size // global_batch
    if updates == 0:
        raise UserError(
            f"batch_size: {config.data.batch_size} per process x {world.size} processes x {micro_batches} accumulation "
            f"= {global_batch}, more than the {train_size} training images; lower batch_size"
        )
    schedule = config.schedule
    by_root = schedule.lr_base_scale == "sqrt" or (not schedule.lr_base_scale and _is_one_of(ADAPTIVE, config))
    scale = (global_batch / schedule.lr_base_size) ** (0.5 if by_root else 1)
    return Pace(
        updates * micro_batches, updates, global_batch, schedule.epochs, schedule.lr or schedule.lr_base * scale
    )


def lr_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, pace: Pace) -> Tuple[Scheduler, Pace]:
    """Return the schedule that sets the optimizer's learning rate, and the pace with all epochs of the schedule."""
    s = config.schedule
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=s.sched,
        num_epochs=s.epochs,
        decay_epochs=s.decay_epochs,
        decay_milestones=s.decay_milestones,
        decay_rate=s.decay_rate,
        cooldown_epochs=s.cooldown_epochs,
        min_lr=s.min_lr,
        warmup_lr=s.warmup_lr,
        warmup_epochs=s.warmup_epochs,
        warmup_prefix=s.warmup_prefix,
        noise=s.lr_noise,
        noise_pct=s.lr_noise_pct,
        noise_std=s.lr_noise_std,
        noise_seed=config.run.seed,
        cycle_mul=s.lr_cycle_mul,
        cycle_decay=s.lr_cycle_decay,
        cycle_limit=s.lr_cycle_limit,
        k_decay=s.lr_k_decay,
        step_on_epochs=not s.sched_on_updates,
        updates_per_epoch=pace.updates_per_epoch,
    )
    return scheduler, dataclasses.replace(pace, epochs=epochs)


def check_rates(config: TrainConfig, pace: Pace) -> None:
    """Check the learning rates of a run, whose `lr` may follow from the batch.

    Raises:
        ConfigError: the rate would rise to min_lr or fall from warmup_lr, or timm cannot compute it.
    """
    s, rate = config.schedule, f"lr {pace.lr:g}"
    if s.lr is None:
        rate += f" (lr_base {s.lr_base:g} at batch {pace.global_batch})"
    if s.sched in WITH_MIN_LR and s.min_lr > pace.lr:
        raise ConfigError(f"min_lr: {s.min_lr:g}: above {rate}, so the rate would rise; set min_lr to 0, or raise lr")
    if s.warmup_epochs and s.warmup_lr > pace.lr:
        raise ConfigError(
            f"warmup_lr: {s.warmup_lr:g}: above {rate}, so the rate would fall during warm-up; lower warmup_lr, or raise lr"
        )
    try:
        rates = _rates(config, pace)
    except (ValueError, ArithmeticError) as error:  # shrinking cycles end, and timm has no rate for what follows
        raise ConfigError(
            f"sched: {s.sched}: timm cannot compute the rate of each epoch: {one_line(error)}; "
            f"change lr_cycle_mul ({s.lr_cycle_mul:g}) or cooldown_epochs ({s.cooldown_epochs})"
        ) from None
    if not all(0 <= value < math.inf for value in rates):
        raise ConfigError(f"sched: {s.sched}: some epochs would have a rate below 0 or not finite; change the schedule")


def notices(config: TrainConfig, pace: Pace) -> List[str]:
    """Return notices about what a schedule announces but a run of its length does not do."""
    s, found = config.schedule, []
    peak = max(_rates(config, pace))
    if peak < 0.9 * pace.lr:
        remedy = "lower warmup_epochs" + ("" if s.sched_on_updates else ", or set sched_on_updates")
        warm_up = f"warm-up takes {s.warmup_epochs} of {s.epochs} epochs"
        found.append(f"lr {pace.lr:g} is not reached, only {peak:.3g}: {warm_up}; {remedy}")
    late = [epoch for epoch in s.decay_milestones if epoch > s.epochs]
    if late and s.sched == "multistep":
        found.append(f"decay_milestones: {late}: after the last of {s.epochs} epochs, so without effect")
    off = config.augmentation.mixup_off_epoch
    if config.augmentation.mixes and off >= pace.epochs:
        found.append(f"mixup_off_epoch: {off}: after the last of {pace.epochs} epochs, so mixing stays on")
    updates = pace.epochs * pace.updates_per_epoch
    memory = 1 / (1 - ema_decay(config.ema, pace.updates_per_epoch))
    if config.ema.model_ema and not config.ema.model_ema_warmup and memory > updates:
        found.append(
            f"model_ema: the average is over about {memory:,.0f} updates, but the run has only {updates:,}, so it stays near "
            f"the start; set model_ema_window, or model_ema_warmup"
        )
    return found


def _rates(config: TrainConfig, pace: Pace) -> List[float]:
    """Return the largest learning rate of the parameter groups at the start and the end of each epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=pace.lr)
    scheduler, pace = lr_schedule(config, optimizer, pace)
    rates = []
    for epoch in range(pace.epochs):
        for update in (0, pace.updates_per_epoch - 1):
            scheduler.step(epoch)
            scheduler.step_update(epoch * pace.updates_per_epoch + update)
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def ema_decay(settings: Ema, updates_per_epoch: int) -> float:
    """Return the EMA decay per update. A decay of 1 - 1/n averages over about n updates."""
    if settings.model_ema_window is not None:
        return 1 - 1 / max(settings.model_ema_window * updates_per_epoch, 1)
    return OFFICIAL_EMA_DECAY if settings.model_ema_decay is None else settings.model_ema_decay


def destructive_lr(config: TrainConfig, pace: Pace) -> Optional[str]:
    """Return a notice if a run starts from trained weights at a learning rate for training from scratch.

    The limit is the learning rate of the run that made the weights, if their file records it. Else it is the official 1e-3 at
    batch 1,024, scaled by the square root of the batch size: the tolerant rule, so that only a rate far too high is reported.
    """
    network = config.network
    file = network.pretrained_path or network.initial_checkpoint
    from_trained = file or network.pretrained
    if not from_trained or network.freeze == "backbone" or not _is_one_of((*ADAPTIVE, "lion"), config):
        return None
    recorded = file_format.read(weights_file(file)).get("config") if file else None
    lr = recorded.get("lr") if isinstance(recorded, dict) else None
    from_scratch = lr if isinstance(lr, float) else OFFICIAL_LR * (pace.global_batch / OFFICIAL_BATCH) ** 0.5
    if pace.lr < 0.999 * from_scratch:
        return None
    return (
        f"lr {pace.lr:g} at batch {pace.global_batch} is a rate for training from scratch (about {from_scratch:.2g} here) and "
        f"can destroy the weights that this run starts from; configs/finetune uses lr 5e-5 for ImageNet weights"
    )


def _is_one_of(families: Tuple[str, ...], config: TrainConfig) -> bool:
    return any(family in config.optimizer.opt.lower() for family in families)
