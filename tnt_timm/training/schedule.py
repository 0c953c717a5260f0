"""Durations and learning rate of a run: what the config says in epochs and per batch, resolved to updates."""

from pathlib import Path
from typing import Optional, Tuple

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from tnt_timm.checkpoints import file_format
from tnt_timm.checkpoints.progress import Pace
from tnt_timm.errors import UserError
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schema import Ema, TrainConfig

OFFICIAL_EMA_DECAY = 0.99996
OFFICIAL_LR, OFFICIAL_BATCH = 1e-3, 1024


def pace_of(config: TrainConfig, world: World, train_size: int) -> Pace:
    """Durations of a run, but for the cooldown.

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
    ratio = global_batch / schedule.lr_base_size
    lr = schedule.lr or schedule.lr_base * (ratio**0.5 if _scales_by_root(config) else ratio)
    return Pace(updates * micro_batches, updates, global_batch, schedule.epochs, lr)


def ema_decay(settings: Ema, updates_per_epoch: int) -> float:
    """Per update. An average with decay 1 - 1/n is over about n updates (its time constant)."""
    if settings.model_ema_window is None:
        return OFFICIAL_EMA_DECAY if settings.model_ema_decay is None else settings.model_ema_decay
    return 1 - 1 / max(settings.model_ema_window * updates_per_epoch, 1)


def destructive_lr(config: TrainConfig, pace: Pace) -> Optional[str]:
    """A line for the log where a run starts from trained weights at a learning rate that is meant for random ones.

    That is the lr of the run which the weights come from, where their file says it; else the official 1e-3 at batch 1,024,
    taken to other batches by the square root: the tolerant rule, so that only what is far too high is spoken of.
    """
    network = config.network
    file = network.pretrained_path or network.initial_checkpoint
    adam = any(family in config.optimizer.opt.lower() for family in ("ada", "lamb", "lion"))
    if not (file or network.pretrained) or network.freeze == "backbone" or not adam:
        return None
    recorded = file_format.read(file_format.find(Path(file))).get("config") if file else None
    of_training = (recorded or {}).get("lr") or OFFICIAL_LR * (pace.global_batch / OFFICIAL_BATCH) ** 0.5
    if pace.lr < 0.999 * of_training:
        return None
    return (
        f"lr {pace.lr:g} at batch {pace.global_batch} is one for training from scratch (about {of_training:.2g} here) and tends "
        f"to destroy the weights that this run starts from; configs/finetune has lr 5e-5 for ImageNet's"
    )


def _scales_by_root(config: TrainConfig) -> bool:
    if config.schedule.lr_base_scale:
        return config.schedule.lr_base_scale == "sqrt"
    return any(family in config.optimizer.opt.lower() for family in ("ada", "lamb"))  # timm's rule


def lr_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, pace: Pace) -> Tuple[Scheduler, Pace]:
    """The schedule that sets the optimizer's lr, and the pace with all its epochs."""
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
    return scheduler, Pace(pace.batches_per_epoch, pace.updates_per_epoch, pace.global_batch, epochs, pace.lr)
