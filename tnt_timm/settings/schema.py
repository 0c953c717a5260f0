"""Every training setting: its name (timm's), type, bounds, default and meaning, grouped by subject.

The keys are flat in YAML and on the command line. The groups are for the reader, for `--help` and for the code
(`config.schedule.lr`). Defaults are those of the official TNT training script (timm 0.3.2's with AdamW), so that its
published command line keeps its meaning.
"""

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Optional, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tnt_timm.settings.command_line import setting
from tnt_timm.settings.paths import PathText
from tnt_timm.settings.schedule_rules import check_schedule

LONGEST_NAME = 255  # bytes, of a file or folder


def _in_a_folder(path: str) -> str:
    folder = Path(path).absolute().parent
    if path and not folder.is_dir():
        raise ValueError(f"{path}: no such folder: {folder}; create it first")
    if path and Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; add the name of a file")
    if path and Path(path).exists() and not Path(path).is_file():  # it would be replaced
        raise ValueError(f"{path}: is a device or pipe, not an ordinary file; choose another name")
    return path


def _folder_name(name: str) -> str:
    unseen = [letter for letter in name if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")]
    if name and (name in (".", "..") or not name.strip() or "/" in name or unseen):
        raise ValueError(f"{name!r}: cannot be the name of a folder; use letters and digits, and no slash")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{name[:20]!r}...: longer than {LONGEST_NAME} bytes, the limit for a folder's name; shorten it"
        )
    return name


OutputFile = Annotated[PathText, AfterValidator(_in_a_folder)]  # checked before the work, not after hours of it
FolderName = Annotated[PathText, AfterValidator(_folder_name)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Number = TypeVar("Number")
Pair = Annotated[List[float], Field(min_length=2, max_length=2)]
Rgb = Annotated[List[Number], Field(min_length=3, max_length=3)]
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value % 1 == 0 else value)
]
Filter = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


class Group(BaseModel):
    """Settings of one subject: strict types (no "false" for false), no unknown keys, frozen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Network(Group):
    """Model"""

    model: PathText = setting("tnt_s", "any model name in timm's registry, including this package's")
    model_kwargs: Dict[str, Any] = setting({}, "model arguments, as name=value")
    pretrained: bool = setting(False, "start from the model's published weights")
    pretrained_path: Optional[PathText] = setting(None, "start from this file or run folder, fitted to the model")
    initial_checkpoint: PathText = setting("", "start from this file or run folder; all weights must fit as is")
    num_classes: Optional[PositiveInt] = setting(None, "size of the head (default: the dataset's classes)")
    img_size: Optional[PositiveInt] = setting(None, "input height and width, pixels (default: the model's)")
    gp: Optional[str] = setting(None, "global pooling: token or avg (default: the model's)", min_length=1)
    freeze: str = setting("", "`backbone` (a linear probe), or how many blocks to freeze, with the stem")
    drop: BelowOne = setting(0.0, "dropout before the head")
    drop_path: Optional[BelowOne] = setting(None, "stochastic depth rate of the last block")
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")


class Data(Group):
    """Data"""

    data_dir: PathText = setting("", "dataset folder")
    dataset: PathText = setting("", "digits, digits/0-4, torch/..., hfds/..., wds/..., or empty: a folder per class")
    train_split: str = setting("train", "name of the training split", min_length=1)
    val_split: str = setting("validation", "validation split; a folder may also be called val", min_length=1)
    dataset_download: bool = setting(False, "download a torch/ dataset if it is missing")
    class_map: PathText = setting("", "file that maps class names to indices")
    input_key: Optional[str] = setting(None, "image field of a hfds/ or wds/ dataset")
    target_key: Optional[str] = setting(None, "label field of a hfds/ or wds/ dataset")
    train_num_samples: Optional[PositiveInt] = setting(None, "training images of a wds/ dataset without info file")
    val_num_samples: Optional[PositiveInt] = setting(None, "validation images of a wds/ dataset without info file")
    batch_size: PositiveInt = setting(128, "images per process and batch", flag="-b")
    validation_batch_size: Optional[PositiveInt] = setting(None, "default: batch_size", flag="-vb")
    workers: NonNegativeInt = setting(4, "loader workers per process; 0 loads in the loop", flag="-j")
    crop_pct: Optional[float] = setting(None, "validation: centre crop as a part of the resized edge", ge=0.25, le=1.0)
    interpolation: Literal["", Filter] = setting("", "validation: resize filter (default: the model's)")
    mean: Optional[Rgb[float]] = setting(None, "mean of R, G, B (default: the model's)")
    std: Optional[Rgb[PositiveFloat]] = setting(None, "standard deviation of R, G, B (default: the model's)")


class Augmentation(Group):
    """Augmentation and regularisation"""

    no_aug: bool = setting(False, "resize and centre crop only")
    scale: Pair = setting([0.08, 1.0], "area range of the random crop")
    ratio: Pair = setting([3 / 4, 4 / 3], "aspect ratio range of the random crop")
    hflip: Fraction = setting(0.5, "probability of a horizontal flip")
    vflip: Fraction = setting(0.0, "probability of a vertical flip")
    color_jitter: Optional[NonNegativeFloat] = setting(0.4, "colour jitter; no effect if aa is set")
    aa: Optional[str] = setting(None, "AutoAugment or RandAugment policy, such as rand-m9-mstd0.5-inc1")
    augment_on: Literal["worker", "device"] = setting(
        "worker", "where aa or colour jitter is applied; device: for whole batches, for GPUs"
    )
    train_interpolation: Literal["random", Filter] = setting("random", "resize filter of the random crop")
    aug_repeats: Whole = setting(0, "repeated augmentation: augmented copies of each image; 0 is off", ge=0)
    reprob: Fraction = setting(0.0, "probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = setting("pixel", "fill of random erasing")
    recount: PositiveInt = setting(1, "largest number of erased rectangles")
    mixup: NonNegativeFloat = setting(0.0, "mixup alpha; 0 is off")
    cutmix: NonNegativeFloat = setting(0.0, "CutMix alpha; 0 is off")
    cutmix_minmax: Optional[Pair] = setting(None, "CutMix size range, instead of alpha")
    mixup_prob: Fraction = setting(1.0, "probability that a batch is mixed")
    mixup_switch_prob: Fraction = setting(0.5, "probability of CutMix if mixup is on as well")
    mixup_mode: Literal["batch", "pair", "elem"] = setting("batch", "draw the mix per batch, pair or image")
    mixup_off_epoch: NonNegativeInt = setting(0, "turn mixing off from this epoch on; 0 is never")
    smoothing: BelowOne = setting(0.1, "label smoothing")

    @property
    def on_device(self) -> bool:
        return self.augment_on == "device" and not self.no_aug

    @property
    def mixes(self) -> bool:
        return self.mixup > 0.0 or self.cutmix > 0.0 or self.cutmix_minmax is not None


class Distillation(Group):
    """Distillation"""

    kd_model_name: Optional[PathText] = setting(None, "teacher: a model with published weights, or local-dir:FOLDER")
    kd_distill_type: Literal["logit", "token"] = setting("logit", "logits, or second head of a distilled model")
    kd_loss_type: Literal["kl"] = setting("kl", "distillation loss of the logits")
    kd_token_distill_type: Literal["soft", "hard"] = setting("soft", "match probabilities or the top class")
    kd_temperature: PositiveFloat = setting(4.0, "softmax temperature")
    distill_loss_weight: Optional[NonNegativeFloat] = setting(None, "default: 1 - task_loss_weight if set, else 1")
    task_loss_weight: Optional[NonNegativeFloat] = setting(None, "weight of the label loss (default: 1)")


class Optimizer(Group):
    """Optimizer"""

    opt: str = setting("adamw", "timm's name of the optimizer")
    opt_eps: Optional[PositiveFloat] = setting(None, "epsilon (default: the optimizer's)")
    opt_betas: Optional[List[float]] = setting(None, "betas (default: the optimizer's)", min_length=2, max_length=3)
    opt_kwargs: Dict[str, Any] = setting({}, "more optimizer arguments, as name=value")
    momentum: NonNegativeFloat = setting(0.9, "momentum, if the optimizer has one")
    weight_decay: NonNegativeFloat = setting(0.05, "weight decay; not on biases, norms, tokens and positions")
    layer_decay: Optional[float] = setting(None, "lr factor from each block to the one before", gt=0.0, le=1.0)
    clip_grad: Optional[PositiveFloat] = setting(None, "gradient clipping threshold (default: none)")
    clip_mode: Literal["norm", "value", "agc"] = setting("norm", "gradient clipping method")
    grad_accum_steps: PositiveInt = setting(1, "micro-batches per update")


class Schedule(Group):
    """Schedule"""

    epochs: PositiveInt = setting(300, "length of the schedule, with warm-up and without cooldown")
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = setting("cosine", "lr curve")
    sched_on_updates: bool = setting(False, "change lr after every update instead of every epoch")
    lr: Optional[PositiveFloat] = setting(None, "learning rate, used as it is (default: from lr_base)")
    lr_base: PositiveFloat = setting(5e-4, "learning rate at a global batch of lr_base_size")
    lr_base_size: PositiveInt = setting(512, "global batch for lr_base")
    lr_base_scale: Literal["", "linear", "sqrt"] = setting("linear", "lr scaling with the batch; empty: timm's rule")
    warmup_lr: NonNegativeFloat = setting(1e-6, "lr at the start of warm-up")
    warmup_epochs: NonNegativeInt = setting(5, "epochs of linear warm-up")
    warmup_prefix: bool = setting(False, "run warm-up before the schedule instead of during its first epochs")
    min_lr: NonNegativeFloat = setting(1e-5, "lr at the end of the schedule and during cooldown")
    cooldown_epochs: NonNegativeInt = setting(10, "epochs at min_lr after the schedule (cosine, tanh, poly)")
    decay_epochs: PositiveFloat = setting(90.0, "step: epochs between decays")
    decay_milestones: List[int] = setting([90, 180, 270], "multistep: epochs at which lr decays")
    decay_rate: PositiveFloat = setting(0.1, "step, multistep: decay; poly: power", flag="--dr")
    lr_noise: Optional[Pair] = setting(None, "part of the schedule with lr noise, as two fractions")
    lr_noise_pct: NonNegativeFloat = setting(0.67, "limit of lr noise")
    lr_noise_std: NonNegativeFloat = setting(1.0, "standard deviation of lr noise")
    lr_cycle_mul: PositiveFloat = setting(1.0, "length factor from each cycle to the next")
    lr_cycle_decay: PositiveFloat = setting(0.1, "lr factor from each cycle to the next")
    lr_cycle_limit: PositiveInt = setting(1, "number of cycles")
    lr_k_decay: PositiveFloat = setting(1.0, "k-decay of cosine and poly")

    @model_validator(mode="after")
    def _can_be_meant(self) -> "Schedule":
        check_schedule(self)
        return self


class Ema(Group):
    """Averaged weights (EMA)"""

    model_ema: bool = setting(False, "average the weights (EMA), and choose the best checkpoint by them")
    model_ema_window: Optional[PositiveFloat] = setting(None, "time constant in epochs, to derive the decay")
    model_ema_decay: Optional[BelowOne] = setting(None, "decay per update (default: 0.99996, over 25,000 updates)")
    model_ema_warmup: bool = setting(False, "increase the decay from 0, for runs of few updates")


class Compute(Group):
    """Device and precision"""

    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto is cuda if there is a GPU")
    threads: NonNegativeInt = setting(0, "CPU threads per process (0: OMP_NUM_THREADS, else PyTorch's choice)")
    amp: bool = setting(False, "mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = setting("float16", "autocast type; float16 scales the loss")
    tf32: bool = setting(False, "use TF32 (10 bits of mantissa) for float32 products on CUDA")
    deterministic: bool = setting(False, "use deterministic algorithms; slower on CUDA")
    torchcompile: Optional[str] = setting(None, "compile with this backend, or with inductor", bare="inductor")


class Run(Group):
    """Run"""

    output: PathText = setting("output", "parent of the run folders")
    experiment: FolderName = setting("", "run folder in --output (default: config or model name)")
    resume: PathText = setting("", "resume from this checkpoint (default: the newest one in the run folder)")
    allow_data_change: bool = setting(False, "continue, at the end of an epoch, with data that has changed")
    seed: int = setting(42, "random seed", ge=0, lt=2**32)
    eval_metric: Literal["top1", "top5", "loss"] = setting("top1", "metric that selects the best checkpoint")
    recovery_interval: NonNegativeInt = setting(0, "updates between saves inside an epoch; 0: by time only")
    recovery_minutes: NonNegativeFloat = setting(10.0, "minutes between saves inside an epoch; 0 is never")
    hang_minutes: PositiveFloat = setting(15.0, "minutes without an update until a rank prints its stacks")
    log_interval: PositiveInt = setting(50, "updates between log lines (or refreshes of the progress bar)")
    log_wandb: bool = setting(False, "send the log to Weights & Biases as well")
    log_tensorboard: bool = setting(False, "write the same rows to TensorBoard event files in the run folder")
    wandb_project: Optional[str] = setting("tnt-timm", "Weights & Biases project")
    wandb_tags: List[str] = setting([], "Weights & Biases tags")


class TrainConfig(Group):
    """All settings of one training run."""

    network: Network
    data: Data
    augmentation: Augmentation
    distillation: Distillation
    optimizer: Optimizer
    schedule: Schedule
    ema: Ema
    compute: Compute
    run: Run

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainConfig":
        network, ema = self.network, self.ema
        if self.augmentation.mixes and self.data.batch_size % 2:
            raise ValueError(f"batch_size: {self.data.batch_size}: mixup and CutMix pair images, so it must be even")
        for key, most in (("scale", 1.0), ("ratio", 1e3), ("cutmix_minmax", 1.0)):
            low, high = getattr(self.augmentation, key) or (most, most)
            if not 0 < low <= high <= most:
                raise ValueError(f"{key}: [{low}, {high}]: expected a range [low, high] above 0 and up to {most:g}")
        weight = self.distillation.task_loss_weight
        if weight is not None and weight > 1 and self.distillation.distill_loss_weight is None:
            raise ValueError(
                f"task_loss_weight: {weight}: distill_loss_weight would be 1 - {weight}; set distill_loss_weight as well"
            )
        if network.pretrained_path and network.initial_checkpoint:
            raise ValueError(
                f"pretrained_path: {network.pretrained_path}: initial_checkpoint is set as well; remove one of them"
            )
        if network.freeze not in ("", "backbone") and not network.freeze.isdecimal():
            raise ValueError(f"freeze: {network.freeze!r}: expected backbone, or a number of blocks")
        starts = network.pretrained or network.pretrained_path or network.initial_checkpoint or self.run.resume
        if network.freeze and not starts:
            raise ValueError(
                f"freeze: {network.freeze}: the frozen layers would keep random weights; "
                f"set pretrained, pretrained_path or initial_checkpoint"
            )
        if ema.model_ema_window is not None and ema.model_ema_decay is not None:
            raise ValueError(
                f"model_ema_window: {ema.model_ema_window:g}: model_ema_decay ({ema.model_ema_decay:g}) is set as well; "
                f"set one of them to null"
            )
        for name in network.model_kwargs:
            if name in OWN_SETTING:
                raise ValueError(f"model_kwargs: {name} has a setting of its own, {OWN_SETTING[name]}")
        return self


DEFAULTS = {
    key: field.default
    for group in TrainConfig.model_fields.values()
    for key, field in group.annotation.model_fields.items()
}
# Model arguments that have a setting of their own.
OWN_SETTING = {
    "num_classes": "num_classes",
    "img_size": "img_size",
    "global_pool": "gp",
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "pretrained": "pretrained",
    "checkpoint_path": "initial_checkpoint",
}
