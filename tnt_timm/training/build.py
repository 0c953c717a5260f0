"""Build the parts of a run from its config: data, model, optimizer, schedule, task, EMA, with timm's factories."""

import contextlib
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import ModelEmaV3
from torch import nn

from tnt_timm import ops
from tnt_timm.checkpoints.model_from_settings import create_model, try_forward
from tnt_timm.checkpoints.saver import TrainState
from tnt_timm.data.datasets import ImageSet, StreamSet, check_no_empty_files, check_same_classes, expect_classes
from tnt_timm.data.decoding import decode, decode_fast
from tnt_timm.data.device_augment import DeviceAugment
from tnt_timm.data.identity import identity_of
from tnt_timm.data.loader import EvaluationLoader, TrainingLoader
from tnt_timm.data.slices import check_disjoint
from tnt_timm.data.transforms import Transform, split_training_transform, training_transform
from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.evaluation.data_from_settings import data_config, evaluation_loader, open_split
from tnt_timm.export.folder import config_text
from tnt_timm.runtime.distributed import World
from tnt_timm.runtime.precision import autocast
from tnt_timm.runtime.same_start import REMEDY, facts_of_data
from tnt_timm.settings.schema import Augmentation, Ema, TrainConfig
from tnt_timm.training.freezing import freeze
from tnt_timm.training.losses import build_task
from tnt_timm.training.schedule import check_rates, destructive_lr, ema_decay, lr_schedule, notices, pace_of


@dataclass
class Parts(TrainState):
    """Everything that the trainer uses."""

    task: TrainingTask  # the model, compiled and wrapped for DDP if asked, with its loss and its teacher
    scheduler: Scheduler
    autocast: Callable[[], ContextManager]
    train_loader: TrainingLoader
    eval_loader: EvaluationLoader
    train_set: Union[ImageSet, StreamSet]
    notices: List[str]  # for the log
    frozen: List[nn.Module]  # modules that stay in evaluation mode

    def train_mode(self) -> None:
        """Put all but the frozen modules into training mode."""
        self.task.train()
        for module in self.frozen:
            module.training = False


def build(config: TrainConfig, world: World, continuing: bool = False) -> Parts:
    """Build the parts of a training run. Nothing is written to disk.

    Args:
        config: settings of the run.
        world: this rank among all.
        continuing: the weights will come from a checkpoint of the run.

    Raises:
        UserError: data, model or settings do not fit together.
    """
    if config.data.dataset_download:
        with world.together():  # one process per machine downloads before the others look
            if world.local_rank == 0:
                open_data(config)
    with world.together():  # what only one rank lacks, it can say before the ranks connect their models
        train_set, eval_set, classes, num_classes = open_data(config)
        data = {"train": identity_of(train_set), "validation": identity_of(eval_set)}
        pace = pace_of(config, world, len(train_set))
        check_rates(config, pace)  # before the slow part
        if world.is_main:
            check_no_empty_files(eval_set)
        model, model_kwargs, preprocessing, frozen = _model(config, num_classes, continuing, classes)
        model.to(world.device)
    if world.size > 1:
        world.agree(facts_of_data(training=data["train"], validation=data["validation"]), REMEDY)
        world.check_same_weights(model)
    if config.network.grad_checkpointing:
        _checkpoint_gradients(model, config.network.model)

    optimizer = _optimizer(config, model, pace.lr)
    scheduler, pace = lr_schedule(config, optimizer, pace)
    lines = [*notices(config, pace), *filter(None, [None if continuing else destructive_lr(config, pace)])]
    in_precision = autocast(config.compute, world.device)
    eval_batch = config.data.validation_batch_size or config.data.batch_size
    eval_loader = evaluation_loader(eval_set, preprocessing, eval_batch, config.data.workers, world)
    scaled = config.compute.amp and config.compute.amp_dtype == "float16"
    return Parts(
        model=model,
        task=build_task(config, world, model, _criterion(config.augmentation), in_precision, preprocessing),
        model_kwargs=model_kwargs,
        ema=_ema(config.ema, model, pace.updates_per_epoch),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(world.device.type, enabled=scaled),
        autocast=in_precision,
        train_loader=_train_loader(config, world, train_set, preprocessing, num_classes, pace.batches_per_epoch),
        eval_loader=eval_loader,
        train_set=train_set,
        notices=lines,
        frozen=frozen,
        classes=classes,
        preprocessing=preprocessing,
        pace=pace,
        num_eval_images=eval_loader.num_images,
        data=data,
        resumed_from=None,  # until a checkpoint is loaded
    )


def _model(
    config: TrainConfig, num_classes: int, continuing: bool, classes: Optional[List[str]]
) -> Tuple[nn.Module, Dict[str, Any], Dict[str, Any], List[nn.Module]]:
    """Return the model, on the CPU and tried out, its arguments, its preprocessing, and its modules that stay frozen."""
    torch.manual_seed(config.run.seed)
    model, model_kwargs = create_model(config, num_classes, continuing, classes)
    preprocessing = data_config(config.data, config.network.img_size, model)
    try_forward(model, preprocessing["input_size"], num_classes)
    # fail now if config.json cannot hold something, not at the first best epoch
    config_text(model, classes, preprocessing)
    frozen = freeze(model, config.network.freeze)
    if config.data.batch_size == 1:
        _check_batch_norm(model, frozen, preprocessing["input_size"])
    return model, model_kwargs, preprocessing, frozen


def open_data(
    config: TrainConfig,
) -> Tuple[Union[ImageSet, StreamSet], Union[ImageSet, StreamSet], Optional[List[str]], int]:
    """Return training set, validation set, class names if known, and the number of classes."""
    data = config.data
    decoder = decode_fast if config.augmentation.on_device else decode
    train_set = open_split(data, data.train_split, True, data.train_num_samples, config.run.seed, decoder)
    eval_set = open_split(data, data.val_split, False, data.val_num_samples, config.run.seed)
    check_same_classes(train_set.classes, eval_set.classes, data.train_split, data.val_split)
    check_disjoint(train_set, eval_set)
    classes, num_classes = train_set.classes, config.network.num_classes
    if classes is None and num_classes is None:
        known = getattr(train_set, "labels", None) and train_set.labels.range
        found = f" (its labels are from {known[0]} to {known[1]})" if known else ""
        raise UserError(f"num_classes: {data.dataset} does not say how many classes it has{found}; pass --num-classes")
    if classes is not None and num_classes not in (None, len(classes)):
        raise UserError(
            f"num_classes: {num_classes}: the data has {len(classes)} classes ({', '.join(classes[:3])}, ...); "
            f"leave the setting out to use them"
        )
    num_classes = num_classes or len(classes)
    if config.run.eval_metric == "top5" and num_classes <= 5:
        raise ConfigError(
            f"eval_metric: top5: every prediction is right with {num_classes} classes, so the first epoch would stay the best; "
            f"set top1 or loss"
        )
    expect_classes(train_set, num_classes)
    expect_classes(eval_set, num_classes)
    return train_set, eval_set, classes, num_classes


def _check_batch_norm(model: nn.Module, frozen: Sequence[nn.Module], input_size: Tuple[int, int, int]) -> None:
    """Raise UserError if a batch norm that is trained gets a single value per channel from a batch of one image."""
    alone: List[str] = []
    with contextlib.ExitStack() as hooks, torch.no_grad(), ops.silent():
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(module is each for each in frozen):
                note = lambda _, inputs, name=name: alone.extend([name] * (inputs[0].numel() == inputs[0].shape[1]))  # noqa: E731
                hooks.enter_context(module.register_forward_pre_hook(note))
        model.eval()(torch.zeros(1, *input_size))
    if alone:
        raise UserError(
            f"batch_size: 1: the batch norm {alone[0]} has one value per channel then, which cannot be normalized; "
            f"set batch_size to 2 or more"
        )


def _checkpoint_gradients(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError):
        raise UserError(f"grad_checkpointing: {name} does not support it; leave it out") from None


def _optimizer(config: TrainConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    settings = config.optimizer
    extra = dict(settings.opt_kwargs)
    if settings.opt_eps is not None:
        extra["eps"] = settings.opt_eps
    if settings.opt_betas is not None:
        extra["betas"] = tuple(settings.opt_betas)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=settings.opt,
            lr=lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            layer_decay=settings.layer_decay,
            **extra,
        )
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(f"opt: {settings.opt}: {one_line(error)}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UserError(f"opt: {settings.opt}: needs second derivatives, which this loop does not compute")
    return optimizer


def _ema(settings: Ema, model: nn.Module, updates_per_epoch: int) -> Optional[ModelEmaV3]:
    if not settings.model_ema:
        return None
    return ModelEmaV3(model, decay=ema_decay(settings, updates_per_epoch), use_warmup=settings.model_ema_warmup)


def _criterion(augmentation: Augmentation) -> nn.Module:
    return SoftTargetCrossEntropy() if augmentation.mixes else LabelSmoothingCrossEntropy(augmentation.smoothing)


def _train_loader(
    config: TrainConfig,
    world: World,
    train_set: Union[ImageSet, StreamSet],
    preprocessing: Dict[str, Any],
    num_classes: int,
    batches_per_epoch: int,
) -> TrainingLoader:
    augmentation = config.augmentation
    if isinstance(train_set, StreamSet) and augmentation.aug_repeats > 1:
        raise UserError(f"aug_repeats: {augmentation.aug_repeats}: a stream (wds/) cannot repeat images; set it to 0")
    erasing = None
    if augmentation.reprob > 0 and not augmentation.no_aug:
        erasing = RandomErasing(
            augmentation.reprob, mode=augmentation.remode, max_count=augmentation.recount, device=world.device
        )
    transform, augment = _transform(augmentation, preprocessing)
    return TrainingLoader(
        train_set,
        transform,
        batch_size=config.data.batch_size,
        batches_per_epoch=batches_per_epoch,
        repeats=augmentation.aug_repeats,
        augment=augment,
        mixup=_mixup(augmentation, num_classes) if augmentation.mixes else None,
        erasing=erasing,
        seed=config.run.seed,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        device=world.device,
        workers=config.data.workers,
        rank=world.rank,
        world_size=world.size,
    )


def _mixup(augmentation: Augmentation, num_classes: int) -> Mixup:
    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        cutmix_minmax=augmentation.cutmix_minmax,
        prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        label_smoothing=augmentation.smoothing,
        num_classes=num_classes,
    )


def can_move_to_device(augmentation: Augmentation, preprocessing: Dict[str, Any]) -> bool:
    """Return whether `--augment-on device` would move a part of the augmentation from the workers to the device."""
    if augmentation.on_device or not (augmentation.aa or augmentation.color_jitter):
        return False
    try:
        _, augment = _transform(augmentation.model_copy(update=dict(augment_on="device")), preprocessing)
    except UserError:
        return False
    return augment is not None


def _transform(augmentation: Augmentation, preprocessing: Dict[str, Any]) -> Tuple[Transform, Optional[DeviceAugment]]:
    """Return what a worker does to an image, and what the device does to a batch."""
    options: Any = dict(
        interpolation=augmentation.train_interpolation,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter,
        auto_augment_policy=augmentation.aa,
    )
    normalisation = preprocessing["input_size"], preprocessing["mean"], preprocessing["std"]
    try:
        whole = training_transform(*normalisation, no_aug=augmentation.no_aug, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"aa: {augmentation.aa!r}: unknown augmentation policy: {one_line(error)}") from None
    if not augmentation.on_device:
        return whole, None
    try:
        return split_training_transform(*normalisation, **options)
    except ValueError as error:
        raise UserError(f"augment_on: device does not support {error}; set augment_on to worker") from None
