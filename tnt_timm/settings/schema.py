"""Every training setting: its name (timm's), type, bounds, default and meaning, grouped by subject.

The keys are flat in YAML and on the command line. The groups are for the reader, for `--help` and for the code
(`config.schedule.lr`). Defaults are those of the official TNT training script (timm 0.3.2's with AdamW), so that its
published command line keeps its meaning.
"""

from pathlib import Path
from typing import Annotated, Any, Dict, List, Literal, Optional, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeFloat, NonNegativeInt
from pydantic import PositiveFloat, PositiveInt, model_validator

from tnt_timm.settings.command_line import Cli


def _in_a_folder(path: str) -> str:
    folder = Path(path).absolute().parent
    if path and not folder.is_dir():
        raise ValueError(f"{path}: no such folder: {folder}; create it first")
    return path


OutputFile = Annotated[str, AfterValidator(_in_a_folder)]  # checked before the work, not after hours of it
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

    model: str = Field("tnt_s", description="any model name in timm's registry, including this package's")
    model_kwargs: Dict[str, Any] = Field({}, description="model arguments, as name=value")
    pretrained: bool = Field(False, description="start from the model's published weights")
    pretrained_path: Optional[str] = Field(None, description="start from this file or run folder, fitted to the model")
    initial_checkpoint: str = Field("", description="start from this file or run folder; all weights must fit as is")
    num_classes: Optional[PositiveInt] = Field(None, description="size of the head (default: the dataset's classes)")
    img_size: Optional[PositiveInt] = Field(None, description="input height and width, pixels (default: the model's)")
    gp: Optional[str] = Field(None, min_length=1, description="global pooling: token or avg (default: the model's)")
    freeze: Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = Field(
        "", description="freeze the backbone (`backbone`, a linear probe), or the stem and this many first blocks"
    )
    drop: BelowOne = Field(0.0, description="dropout before the head")
    drop_path: Optional[BelowOne] = Field(None, description="stochastic depth rate of the last block")
    grad_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")


class Data(Group):
    """Data"""

    data_dir: str = Field("", description="dataset folder; also the first argument without a flag")
    dataset: str = Field("", description="digits, digits/0-4, torch/..., hfds/..., wds/..., or empty: a folder per class")
    train_split: str = Field("train", min_length=1, description="name of the training split")
    val_split: str = Field("validation", min_length=1, description="name of the validation split")
    dataset_download: bool = Field(False, description="download a torch/ dataset if it is missing")
    class_map: str = Field("", description="file that maps class names to indices")
    input_key: Optional[str] = Field(None, description="image field of a hfds/ or wds/ dataset")
    target_key: Optional[str] = Field(None, description="label field of a hfds/ or wds/ dataset")
    train_num_samples: Optional[PositiveInt] = Field(None, description="training images of a wds/ split without an info")
    val_num_samples: Optional[PositiveInt] = Field(None, description="validation images of a wds/ split without an info")
    batch_size: Annotated[PositiveInt, Cli("-b")] = Field(128, description="training images per process and micro-batch")
    validation_batch_size: Annotated[Optional[PositiveInt], Cli("-vb")] = Field(None, description="default: batch_size")
    workers: Annotated[NonNegativeInt, Cli("-j")] = Field(4, description="loader workers per process; 0 loads in the loop")
    crop_pct: Optional[float] = Field(None, ge=0.25, le=1.0, description="validation: centre crop / resized edge")
    interpolation: Literal["", Filter] = Field("", description="validation: resize filter (default: the model's)")
    mean: Optional[Rgb[float]] = Field(None, description="mean of R, G, B (default: the model's)")
    std: Optional[Rgb[PositiveFloat]] = Field(None, description="standard deviation of R, G, B (default: the model's)")


class Augmentation(Group):
    """Augmentation and regularisation"""

    no_aug: bool = Field(False, description="resize and centre crop only")
    scale: Pair = Field([0.08, 1.0], description="area range of the random crop")
    ratio: Pair = Field([3 / 4, 4 / 3], description="aspect ratio range of the random crop")
    hflip: Fraction = Field(0.5, description="probability of a horizontal flip")
    vflip: Fraction = Field(0.0, description="probability of a vertical flip")
    color_jitter: Optional[NonNegativeFloat] = Field(0.4, description="colour jitter; no effect if aa is set")
    aa: Optional[str] = Field(None, description="AutoAugment or RandAugment policy, such as rand-m9-mstd0.5-inc1")
    train_interpolation: Literal["random", Filter] = Field("random", description="resize filter of the random crop")
    aug_repeats: Whole = Field(0, ge=0, description="repeated augmentation: copies of each image in a row; 0 is off")
    reprob: Fraction = Field(0.0, description="probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = Field("pixel", description="fill of random erasing")
    recount: PositiveInt = Field(1, description="largest number of erased rectangles")
    mixup: NonNegativeFloat = Field(0.0, description="mixup alpha; 0 is off")
    cutmix: NonNegativeFloat = Field(0.0, description="CutMix alpha; 0 is off")
    cutmix_minmax: Optional[Pair] = Field(None, description="CutMix size range, instead of alpha")
    mixup_prob: Fraction = Field(1.0, description="probability that a batch is mixed")
    mixup_switch_prob: Fraction = Field(0.5, description="probability of CutMix if mixup is on as well")
    mixup_mode: Literal["batch", "pair", "elem"] = Field("batch", description="draw the mix per batch, pair or image")
    mixup_off_epoch: NonNegativeInt = Field(0, description="turn mixing off from this epoch on; 0 is never")
    smoothing: BelowOne = Field(0.1, description="label smoothing")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0.0 or self.cutmix > 0.0 or self.cutmix_minmax is not None


class Distillation(Group):
    """Distillation"""

    kd_model_name: Optional[str] = Field(
        None, description="teacher: a model name with published weights, or local-dir:FOLDER (default: no teacher)"
    )
    kd_distill_type: Literal["logit", "token"] = Field(
        "logit", description="what learns from the teacher: the logits, or the second head of a distilled model"
    )
    kd_loss_type: Literal["kl"] = Field("kl", description="distillation loss of the logits")
    kd_token_distill_type: Literal["soft", "hard"] = Field(
        "soft", description="token: match the teacher's probabilities, or its most likely class"
    )
    kd_temperature: PositiveFloat = Field(4.0, description="softmax temperature")
    distill_loss_weight: Optional[NonNegativeFloat] = Field(
        None, description="weight of the distillation loss (default: 1, or 1 - task_loss_weight)"
    )
    task_loss_weight: Optional[NonNegativeFloat] = Field(None, description="weight of the label loss (default: 1)")


class Optimizer(Group):
    """Optimizer"""

    opt: str = Field("adamw", description="timm's name of the optimizer")
    opt_eps: Optional[PositiveFloat] = Field(None, description="epsilon (default: the optimizer's)")
    opt_betas: Optional[List[float]] = Field(None, min_length=2, max_length=3, description="default: the optimizer's")
    opt_kwargs: Dict[str, Any] = Field({}, description="more optimizer arguments, as name=value")
    momentum: NonNegativeFloat = Field(0.9, description="momentum, if the optimizer has one")
    weight_decay: NonNegativeFloat = Field(0.05, description="weight decay; not on biases, norms, tokens and positions")
    layer_decay: Optional[float] = Field(None, gt=0.0, le=1.0, description="lr factor from each block to the one before")
    clip_grad: Optional[PositiveFloat] = Field(None, description="gradient clipping threshold (default: none)")
    clip_mode: Literal["norm", "value", "agc"] = Field("norm", description="gradient clipping method")
    grad_accum_steps: PositiveInt = Field(1, description="micro-batches per update")


class Schedule(Group):
    """Schedule"""

    epochs: PositiveInt = Field(300, description="length of the schedule, with warm-up and without cooldown")
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = Field("cosine", description="lr curve")
    sched_on_updates: bool = Field(False, description="change lr after every update instead of every epoch")
    lr: Optional[PositiveFloat] = Field(None, description="learning rate, used as it is (default: from lr_base)")
    lr_base: PositiveFloat = Field(5e-4, description="learning rate at a global batch of lr_base_size")
    lr_base_size: PositiveInt = Field(512, description="global batch for lr_base")
    lr_base_scale: Literal["", "linear", "sqrt"] = Field("linear", description="lr scaling with the batch; empty: timm's rule")
    warmup_lr: NonNegativeFloat = Field(1e-6, description="lr at the start of warm-up")
    warmup_epochs: NonNegativeInt = Field(5, description="epochs of linear warm-up")
    warmup_prefix: bool = Field(False, description="run warm-up before the schedule instead of during its first epochs")
    min_lr: NonNegativeFloat = Field(1e-5, description="lr at the end of the schedule and during cooldown")
    cooldown_epochs: NonNegativeInt = Field(10, description="epochs at min_lr after the schedule (cosine, tanh, poly)")
    decay_epochs: PositiveFloat = Field(90.0, description="step: epochs between decays")
    decay_milestones: List[int] = Field([90, 180, 270], description="multistep: epochs at which lr decays")
    decay_rate: Annotated[PositiveFloat, Cli("--dr")] = Field(0.1, description="step, multistep: decay; poly: power")
    lr_noise: Optional[Pair] = Field(None, description="part of the schedule with lr noise, as two fractions")
    lr_noise_pct: NonNegativeFloat = Field(0.67, description="limit of lr noise")
    lr_noise_std: NonNegativeFloat = Field(1.0, description="standard deviation of lr noise")
    lr_cycle_mul: PositiveFloat = Field(1.0, description="length factor from each cycle to the next")
    lr_cycle_decay: PositiveFloat = Field(0.1, description="lr factor from each cycle to the next")
    lr_cycle_limit: PositiveInt = Field(1, description="number of cycles")
    lr_k_decay: PositiveFloat = Field(1.0, description="k-decay of cosine and poly")


class Ema(Group):
    """Averaged weights (EMA)"""

    model_ema: bool = Field(False, description="keep an exponential moving average of the weights, and select by it")
    model_ema_window: Optional[PositiveFloat] = Field(None, description="time constant in epochs, to derive the decay")
    model_ema_decay: Optional[BelowOne] = Field(None, description="decay per update (default: 0.99996: 25,000 updates)")
    model_ema_warmup: bool = Field(False, description="increase the decay from 0, for runs of few updates")


class Compute(Group):
    """Device and precision"""

    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto is cuda if there is a GPU")
    threads: NonNegativeInt = Field(0, description="CPU threads per process (0: OMP_NUM_THREADS, else PyTorch's choice)")
    amp: bool = Field(False, description="mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = Field("float16", description="autocast type; float16 scales the loss")
    tf32: bool = Field(False, description="use TF32 (10 bits of mantissa) for float32 products on CUDA")
    deterministic: bool = Field(False, description="use deterministic algorithms; slower on CUDA")
    torchcompile: Annotated[Optional[str], Cli(bare="inductor")] = Field(
        None, description="compile the model with this backend (without a value: inductor)"
    )


class Run(Group):
    """Run"""

    output: str = Field("output", description="parent of the run folders")
    experiment: str = Field("", pattern=r"^[^/\n\x00]*$", description="run folder in it (default: the config's name)")
    resume: str = Field("", description="resume from this checkpoint (default: the newest one in the run folder)")
    seed: int = Field(42, ge=0, lt=2**32, description="random seed")
    eval_metric: Literal["top1", "top5", "loss"] = Field("top1", description="metric that selects the best checkpoint")
    recovery_interval: NonNegativeInt = Field(0, description="updates between saves inside an epoch; 0: by time only")
    recovery_minutes: NonNegativeFloat = Field(10.0, description="minutes between saves inside an epoch; 0 is never")
    hang_minutes: PositiveFloat = Field(15.0, description="minutes without a step until a process logs its stack")
    log_interval: PositiveInt = Field(50, description="updates between log lines (or refreshes of the progress bar)")
    log_wandb: bool = Field(False, description="send the log to Weights & Biases as well")
    log_tensorboard: bool = Field(False, description="write the same rows to TensorBoard event files in the run folder")
    wandb_project: Optional[str] = Field("tnt-timm", description="Weights & Biases project")
    wandb_tags: List[str] = Field([], description="Weights & Biases tags")


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
