"""From the config to the parts of a run: data, model, optimizer, schedule, task, EMA, all by timm's factories."""

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, Optional, Tuple, Union

import torch
from timm.data import Mixup, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import ModelEmaV3
from torch import nn

from tnt_timm.data.datasets import ImageSet, StreamSet, check_no_empty_files, check_same_classes, open_dataset
from tnt_timm.data.loader import EvaluationLoader, TrainingLoader
from tnt_timm.data.transforms import evaluation_transform, training_transform
from tnt_timm.errors import UserError, one_line
from tnt_timm.export.folder import config_text
from tnt_timm.training import checkpointing
from tnt_timm.training.distributed import World
from tnt_timm.training.freezing import freeze
from tnt_timm.training.network import create_model, try_forward
from tnt_timm.training.schema import Compute, Data, Ema, TrainConfig
from tnt_timm.training.tasks import build_task

OFFICIAL_EMA_DECAY = 0.99996
OFFICIAL_LR, OFFICIAL_BATCH = 1e-3, 1024


@dataclass(frozen=True)
class Pace:
    """Durations, resolved once: what the loop counts."""

    batches_per_epoch: int  # micro-batches per process
    updates_per_epoch: int
    global_batch: int  # images per update, over all processes and micro-batches
    epochs: int  # cooldown included
    lr: float  # at the top of the schedule


@dataclass
class Parts:
    """Everything that the trainer puts to work."""

    model: nn.Module  # as created; its state dict is what checkpoints hold
    task: TrainingTask  # the same weights, compiled and wrapped where asked, with their loss and their teacher
    model_kwargs: Dict[str, Any]  # what recreates it: timm.create_model(arch, **model_kwargs)
    ema: Optional[ModelEmaV3]
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    autocast: Callable[[], ContextManager]
    train_loader: TrainingLoader
    eval_loader: EvaluationLoader
    train_set: Union[ImageSet, StreamSet]
    notices: List[str]  # for the log
    frozen: List[nn.Module]  # parts of the model that stay in evaluation mode
    classes: Optional[List[str]]
    preprocessing: Dict[str, Any]
    pace: Pace

    def train_mode(self) -> None:
        """Dropout and the like on, but for what is frozen."""
        self.task.train()
        for module in self.frozen:
            module.training = False


def build(config: TrainConfig, world: World, continuing: bool = False) -> Parts:
    """The parts of a training run; nothing is written to disk.

    Args:
        config: of the run.
        world: this process among all.
        continuing: the weights will come from a checkpoint of the run.

    Raises:
        UserError: data, model or settings that do not fit together.
    """
    if config.data.dataset_download:
        with world.together():  # one process per machine downloads, before the others look
            if world.local_rank == 0:
                open_data(config)
    train_set, eval_set, classes, num_classes = open_data(config)
    if world.is_main:
        check_no_empty_files(eval_set)
    torch.manual_seed(config.run.seed)
    model, model_kwargs = create_model(config, num_classes, continuing, classes)
    preprocessing = data_config(config.data, config.network.img_size, model)
    try_forward(model, preprocessing["input_size"], num_classes)
    frozen = freeze(model, config.network.freeze)
    model.to(world.device)
    if config.network.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):
            raise UserError(f"grad_checkpointing: {config.network.model} does not have it; leave it out") from None

    config_text(model, classes, preprocessing)  # what config.json cannot hold fails here, not at the first best epoch

    pace = pace_of(config, world, len(train_set))
    optimizer = _optimizer(config, model, pace.lr)
    scheduler, pace = lr_schedule(config, optimizer, pace)
    notice = None if continuing else destructive_lr(config, pace)
    ema = None
    if config.ema.model_ema:
        decay = ema_decay(config.ema, pace.updates_per_epoch)
        ema = ModelEmaV3(model, decay=decay, use_warmup=config.ema.model_ema_warmup)

    train_loader = _train_loader(config, world, train_set, preprocessing, num_classes, pace)
    eval_batch = config.data.validation_batch_size or config.data.batch_size
    eval_loader = evaluation_loader(eval_set, preprocessing, eval_batch, config.data.workers, world)
    smoothing = config.augmentation.smoothing
    criterion = SoftTargetCrossEntropy() if config.augmentation.mixes else LabelSmoothingCrossEntropy(smoothing)
    in_precision = autocast(config.compute, world.device)
    return Parts(
        model=model,
        task=build_task(config, world, model, criterion, in_precision, preprocessing),
        model_kwargs=model_kwargs,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.compute.amp and _is_fp16(config.compute)),
        autocast=in_precision,
        train_loader=train_loader,
        eval_loader=eval_loader,
        train_set=train_set,
        notices=[notice] if notice else [],
        frozen=frozen,
        classes=classes,
        preprocessing=preprocessing,
        pace=pace,
    )


def open_data(
    config: TrainConfig,
) -> Tuple[Union[ImageSet, StreamSet], Union[ImageSet, StreamSet], Optional[List[str]], int]:
    """Training set, validation set, class names where known, and the number of classes."""
    data = config.data
    train_set = open_split(data, data.train_split, True, data.train_num_samples, config.run.seed)
    eval_set = open_split(data, data.val_split, False, data.val_num_samples, config.run.seed)
    check_same_classes(train_set.classes, eval_set.classes, data.train_split, data.val_split)
    classes = train_set.classes
    num_classes = config.network.num_classes
    if classes is not None and num_classes is not None and num_classes != len(classes):
        raise UserError(
            f"num_classes: {num_classes}: the data has {len(classes)} classes ({', '.join(classes[:3])}, ...); "
            f"leave the setting out to use them"
        )
    if classes is None and num_classes is None:
        raise UserError(f"num_classes: {data.dataset} does not say how many classes it has; pass --num-classes")
    return train_set, eval_set, classes, num_classes or len(classes)


def open_split(
    data: Data, split: str, is_training: bool, num_samples: Optional[int] = None, seed: int = 0
) -> Union[ImageSet, StreamSet]:
    return open_dataset(
        data.dataset,
        data.data_dir,
        split,
        is_training,
        download=data.dataset_download,
        class_map=data.class_map,
        input_key=data.input_key,
        target_key=data.target_key,
        num_samples=num_samples,
        batch_size=data.batch_size,
        seed=seed,
    )


def data_config(data: Data, img_size: Optional[int], model: nn.Module) -> Dict[str, Any]:
    """Input size, normalisation, resize and crop: the model's own, where the config does not say."""
    wanted = dict(
        img_size=img_size, crop_pct=data.crop_pct, mean=data.mean, std=data.std, interpolation=data.interpolation
    )
    return resolve_data_config(wanted, model=model)


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
    recorded = checkpointing.read(checkpointing.find(Path(file))).get("config") if file else None
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


def _optimizer(config: TrainConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    settings = config.optimizer
    more = dict(settings.opt_kwargs)
    if settings.opt_eps is not None:
        more["eps"] = settings.opt_eps
    if settings.opt_betas is not None:
        more["betas"] = tuple(settings.opt_betas)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=settings.opt,
            lr=lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            layer_decay=settings.layer_decay,
            **more,
        )
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"opt: {settings.opt}: {one_line(error)}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"opt: {settings.opt}: needs second derivatives, which this loop does not compute")
    return optimizer


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


def _train_loader(
    config: TrainConfig,
    world: World,
    train_set: Union[ImageSet, StreamSet],
    preprocessing: Dict[str, Any],
    num_classes: int,
    pace: Pace,
) -> TrainingLoader:
    augmentation = config.augmentation
    if isinstance(train_set, StreamSet) and augmentation.aug_repeats > 1:
        raise UserError(f"aug_repeats: {augmentation.aug_repeats}: a stream (wds/) cannot repeat images; set it to 0")
    mixup = erasing = None
    if augmentation.mixes:
        mixup = Mixup(
            mixup_alpha=augmentation.mixup,
            cutmix_alpha=augmentation.cutmix,
            cutmix_minmax=augmentation.cutmix_minmax,
            prob=augmentation.mixup_prob,
            switch_prob=augmentation.mixup_switch_prob,
            mode=augmentation.mixup_mode,
            label_smoothing=augmentation.smoothing,
            num_classes=num_classes,
        )
    if augmentation.reprob > 0 and not augmentation.no_aug:
        erasing = RandomErasing(
            augmentation.reprob, mode=augmentation.remode, max_count=augmentation.recount, device=world.device
        )
    try:
        transform = training_transform(
            preprocessing["input_size"],
            preprocessing["mean"],
            preprocessing["std"],
            interpolation=augmentation.train_interpolation,
            no_aug=augmentation.no_aug,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter,
            auto_augment_policy=augmentation.aa,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"aa: {augmentation.aa!r}: no such augmentation policy: {one_line(error)}") from None
    return TrainingLoader(
        train_set,
        transform,
        batch_size=config.data.batch_size,
        batches_per_epoch=pace.batches_per_epoch,
        repeats=augmentation.aug_repeats,
        mixup=mixup,
        erasing=erasing,
        seed=config.run.seed,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        device=world.device,
        workers=config.data.workers,
        rank=world.rank,
        world_size=world.size,
    )


def evaluation_loader(
    images: Union[ImageSet, StreamSet], preprocessing: Dict[str, Any], batch_size: int, workers: int, world: World
) -> EvaluationLoader:
    return EvaluationLoader(
        images,
        evaluation_transform(preprocessing),
        batch_size=batch_size,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        device=world.device,
        workers=workers,
        rank=world.rank,
        world_size=world.size,
    )


def _is_fp16(compute: Compute) -> bool:
    return compute.amp_dtype == "float16"


def autocast(compute: Compute, device: torch.device) -> Callable[[], ContextManager]:
    """Makes the precision context of a forward pass."""
    if not compute.amp:
        return contextlib.nullcontext
    dtype = torch.float16 if _is_fp16(compute) else torch.bfloat16
    return lambda: torch.autocast(device.type, dtype=dtype)


@functools.cache
def _default_threads() -> int:
    """PyTorch's number of CPU threads before a config set another."""
    return torch.get_num_threads()


def set_up_torch(compute: Compute, device: torch.device) -> None:
    """Set CPU threads, the precision of float32 products on CUDA, and determinism. Call it before the first computation.

    PyTorch's defaults differ between linears (exact) and convolutions (TF32).
    """
    default = _default_threads()
    torch.set_num_threads(compute.threads or default)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if compute.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = compute.tf32
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False  # which picks by the clock
    torch.backends.cudnn.deterministic = compute.deterministic
    torch.use_deterministic_algorithms(compute.deterministic)
