"""Every setting of train.py: its name (timm's), type, bounds, default and meaning, grouped by subject.

The keys are flat in YAML and on the command line; the groups exist for the reader, for `--help` and for the code
(`config.schedule.lr`). Defaults are those of the official TNT training script (timm 0.3.2's with AdamW), so that its
published command line means here what it meant there.
"""

from typing import Annotated, Any, Dict, List, Literal, Optional

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Interpolation = Literal["", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
Positive = Annotated[float, Field(gt=0.0)]
Whole = Annotated[
    int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value % 1 == 0 else value)
]


class Group(BaseModel):
    """A subject's settings: strict types (no "false" for false), no unknown keys, frozen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Network(Group):
    """Model"""

    model: str = Field("tnt_s", description="any model name of timm's registry, ours included")
    model_kwargs: Dict[str, Any] = Field({}, description="arguments of the model, as name=value")
    pretrained: bool = Field(False, description="start from the model's published weights")
    pretrained_path: Optional[str] = Field(
        None,
        description="start from the weights in this file or run folder as if published: adapted to head and img_size",
    )
    initial_checkpoint: str = Field(
        "", description="start from the weights in this file or run folder, which fit as they are"
    )
    num_classes: Optional[int] = Field(None, gt=0, description="size of the head (default: the data set's classes)")
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square input in pixels (default: the model's)")
    gp: Optional[str] = Field(
        None, min_length=1, description="global pooling before the head: token or avg (default: the model's)"
    )
    freeze: Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = Field(
        "", description="do not train these: backbone (a linear probe), or stem and so many of the first blocks"
    )
    drop: float = Field(0.0, ge=0.0, lt=1.0, description="dropout before the head")
    drop_path: Optional[float] = Field(None, ge=0.0, lt=1.0, description="stochastic depth at the last block")
    grad_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")


class Data(Group):
    """Data"""

    data_dir: str = Field("", description="folder of the data set; also the first argument without a flag")
    dataset: str = Field(
        "", description="digits (or digits/0-4), torch/..., hfds/..., wds/..., or empty for folders of class folders"
    )
    train_split: str = Field("train", min_length=1, description="name of the training split")
    val_split: str = Field("validation", min_length=1, description="name of the validation split")
    dataset_download: bool = Field(False, description="download torch/ data sets that are not there")
    class_map: str = Field("", description="file that maps class names to indices")
    input_key: Optional[str] = Field(None, description="image field of hfds/ and wds/ data sets")
    target_key: Optional[str] = Field(None, description="label field of hfds/ and wds/ data sets")
    train_num_samples: Optional[int] = Field(None, gt=0, description="training images of a wds/ split without an info")
    val_num_samples: Optional[int] = Field(None, gt=0, description="validation images of a wds/ split without an info")
    batch_size: int = Field(128, gt=0, description="training images per process and micro-batch")
    validation_batch_size: Optional[int] = Field(None, gt=0, description="default: batch_size")
    workers: int = Field(4, ge=0, description="loader processes per training process; 0 loads in the loop")
    crop_pct: Optional[float] = Field(None, ge=0.25, le=1.0, description="validation: centre crop / resized edge")
    interpolation: Interpolation = Field("", description="validation: resampling (default: the model's)")
    mean: Optional[List[float]] = Field(
        None, min_length=3, max_length=3, description="of R, G, B (default: the model's)"
    )
    std: Optional[List[Positive]] = Field(
        None, min_length=3, max_length=3, description="of R, G, B (default: the model's)"
    )


class Augmentation(Group):
    """Augmentation and regularisation"""

    no_aug: bool = Field(False, description="resize and centre crop only")
    scale: List[float] = Field([0.08, 1.0], min_length=2, max_length=2, description="area range of the random crop")
    ratio: List[float] = Field(
        [3 / 4, 4 / 3], min_length=2, max_length=2, description="aspect range of the random crop"
    )
    hflip: float = Field(0.5, ge=0.0, le=1.0, description="probability of a horizontal flip")
    vflip: float = Field(0.0, ge=0.0, le=1.0, description="probability of a vertical flip")
    color_jitter: Optional[float] = Field(0.4, ge=0.0, description="colour jitter; without effect when aa is on")
    aa: Optional[str] = Field(None, description="AutoAugment or RandAugment policy, as rand-m9-mstd0.5-inc1")
    train_interpolation: Literal["random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = Field(
        "random", description="training: resampling; random is bilinear or bicubic"
    )
    aug_repeats: Whole = Field(0, ge=0, description="repeated augmentation: draw each image this often in a row")
    reprob: float = Field(0.0, ge=0.0, le=1.0, description="probability of random erasing")
    remode: Literal["const", "rand", "pixel"] = Field("pixel", description="what random erasing fills in")
    recount: int = Field(1, gt=0, description="rectangles that random erasing draws at most")
    mixup: float = Field(0.0, ge=0.0, description="alpha of mixup; 0 is off")
    cutmix: float = Field(0.0, ge=0.0, description="alpha of CutMix; 0 is off")
    cutmix_minmax: Optional[List[float]] = Field(None, min_length=2, max_length=2, description="CutMix by size range")
    mixup_prob: float = Field(1.0, ge=0.0, le=1.0, description="probability that a batch is mixed at all")
    mixup_switch_prob: float = Field(0.5, ge=0.0, le=1.0, description="probability of CutMix when mixup is on as well")
    mixup_mode: Literal["batch", "pair", "elem"] = Field("batch", description="mixed alike per batch, pair or image")
    mixup_off_epoch: int = Field(0, ge=0, description="switch mixing off from this epoch; 0 is never")
    smoothing: float = Field(0.1, ge=0.0, lt=1.0, description="label smoothing")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0.0 or self.cutmix > 0.0 or self.cutmix_minmax is not None


class Distillation(Group):
    """Distillation"""

    kd_model_name: Optional[str] = Field(
        None, description="teacher: a model name with published weights, or local-dir:FOLDER (default: no teacher)"
    )
    kd_distill_type: Literal["logit", "token"] = Field(
        "logit", description="what learns from it: the logits, or the second head of a distilled model"
    )
    kd_loss_type: Literal["kl"] = Field("kl", description="distillation loss of the logits")
    kd_token_distill_type: Literal["soft", "hard"] = Field(
        "soft", description="token: match the teacher's probabilities, or its most likely class"
    )
    kd_temperature: Positive = Field(4.0, description="temperature of the probabilities matched")
    distill_loss_weight: Optional[float] = Field(
        None, ge=0.0, description="factor on the distillation loss (default: 1, or the rest of task_loss_weight)"
    )
    task_loss_weight: Optional[float] = Field(None, ge=0.0, description="factor on the loss of the labels (default: 1)")


class Optimizer(Group):
    """Optimizer"""

    opt: str = Field("adamw", description="optimizer by timm's name")
    opt_eps: Optional[float] = Field(None, gt=0.0, description="epsilon (default: the optimizer's)")
    opt_betas: Optional[List[float]] = Field(
        None, min_length=2, max_length=3, description="betas (default: the optimizer's)"
    )
    opt_kwargs: Dict[str, Any] = Field({}, description="more arguments of the optimizer, as name=value")
    momentum: float = Field(0.9, ge=0.0, description="momentum, where the optimizer has one")
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay; not on biases, norms, tokens and positions")
    layer_decay: Optional[float] = Field(
        None, gt=0.0, le=1.0, description="factor on lr from each block to the one before"
    )
    clip_grad: Optional[float] = Field(None, gt=0.0, description="gradient clipping threshold (default: none)")
    clip_mode: Literal["norm", "value", "agc"] = Field("norm", description="how gradients are clipped")
    grad_accum_steps: int = Field(1, gt=0, description="micro-batches per update")


class Schedule(Group):
    """Schedule"""

    epochs: int = Field(300, gt=0, description="length of the schedule, warm-up included, cooldown not")
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = Field("cosine", description="lr curve")
    sched_on_updates: bool = Field(False, description="change lr at every update instead of every epoch")
    lr: Optional[float] = Field(None, gt=0.0, description="learning rate, used as it is (default: from lr_base)")
    lr_base: float = Field(5e-4, gt=0.0, description="learning rate at global batch lr_base_size")
    lr_base_size: int = Field(512, gt=0, description="global batch that lr_base belongs to")
    lr_base_scale: Literal["", "linear", "sqrt"] = Field(
        "linear", description="how lr grows with the global batch; empty is timm's rule: sqrt for Adam's family"
    )
    warmup_lr: float = Field(1e-6, ge=0.0, description="lr at which warm-up starts")
    warmup_epochs: int = Field(5, ge=0, description="epochs of linear warm-up")
    warmup_prefix: bool = Field(False, description="put warm-up before the schedule instead of over its start")
    min_lr: float = Field(1e-5, ge=0.0, description="lr at the end of the schedule and in cooldown")
    cooldown_epochs: int = Field(10, ge=0, description="epochs at min_lr after the schedule (cosine, tanh, poly)")
    decay_epochs: float = Field(90.0, gt=0.0, description="step: epochs between decays")
    decay_milestones: List[int] = Field([90, 180, 270], description="multistep: epochs at which lr decays")
    decay_rate: float = Field(0.1, gt=0.0, description="step, multistep: factor per decay; poly: power")
    lr_noise: Optional[List[float]] = Field(
        None, min_length=2, max_length=2, description="part of the schedule with noise on lr, as two fractions"
    )
    lr_noise_pct: float = Field(0.67, ge=0.0, description="limit of that noise")
    lr_noise_std: float = Field(1.0, ge=0.0, description="standard deviation of that noise")
    lr_cycle_mul: float = Field(1.0, gt=0.0, description="factor on the length of each next cycle")
    lr_cycle_decay: float = Field(0.1, gt=0.0, description="factor on lr of each next cycle")
    lr_cycle_limit: int = Field(1, gt=0, description="number of cycles")
    lr_k_decay: float = Field(1.0, gt=0.0, description="k-decay of cosine and poly")


class Ema(Group):
    """Averaged weights (EMA)"""

    model_ema: bool = Field(False, description="keep an exponential moving average of the weights, and select by it")
    model_ema_window: Optional[float] = Field(
        None, gt=0.0, description="epochs that it averages over (time constant), from which its decay follows"
    )
    model_ema_decay: Optional[float] = Field(
        None, ge=0.0, lt=1.0, description="its decay per update, instead (default: 0.99996, for 25,000 updates)"
    )
    model_ema_warmup: bool = Field(False, description="let the decay grow from 0, for runs of few updates")


class Compute(Group):
    """Device and precision"""

    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto is cuda where there is one")
    threads: int = Field(0, ge=0, description="CPU threads per process (0: OMP_NUM_THREADS, else PyTorch's choice)")
    amp: bool = Field(False, description="mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] = Field(
        "float16", description="its type; float16 comes with loss scaling"
    )
    tf32: bool = Field(False, description="let CUDA round float32 products to TF32 (10 bits of mantissa)")
    deterministic: bool = Field(
        False, description="take algorithms that give the same bits each time; slower on CUDA, where others may not"
    )
    torchcompile: Optional[str] = Field(
        None, description="compile the model with this backend (inductor when none is named)"
    )


class Run(Group):
    """Run"""

    output: str = Field("output", description="folder that holds the runs")
    experiment: str = Field(
        "", pattern=r"^[^/\n\x00]*$", description="name of the run folder in it (default: the config file's name)"
    )
    resume: str = Field("", description="start from this checkpoint's training state (default: the run folder's last)")
    seed: int = Field(42, ge=0, lt=2**32, description="of everything random")
    eval_metric: Literal["top1", "top5", "loss"] = Field("top1", description="what makes a checkpoint the best")
    recovery_interval: int = Field(0, ge=0, description="updates between two saves inside an epoch; 0: by time only")
    recovery_minutes: float = Field(10.0, ge=0.0, description="minutes between two saves inside an epoch; 0 is never")
    hang_minutes: float = Field(15.0, gt=0.0, description="say where a process stands after so long without a step")
    log_interval: int = Field(50, gt=0, description="updates between two lines (or bar refreshes) of the log")
    log_wandb: bool = Field(False, description="log to Weights & Biases as well")
    log_tensorboard: bool = Field(
        False, description="write the epochs' figures to TensorBoard event files in the run folder"
    )
    wandb_project: Optional[str] = Field("tnt-timm", description="project there")
    wandb_tags: List[str] = Field([], description="tags there")


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
        if self.augmentation.mixes and self.data.batch_size % 2:
            raise ValueError(f"batch_size: {self.data.batch_size}: mixup and CutMix pair images, so it must be even")
        for key, most in (("scale", 1.0), ("ratio", 1e3), ("cutmix_minmax", 1.0)):
            low, high = getattr(self.augmentation, key) or (most, most)
            if not 0 < low <= high <= most:
                raise ValueError(
                    f"{key}: [{low}, {high}]: expected a range, low before high, above 0 and up to {most:g}"
                )
        weight = self.distillation.task_loss_weight
        if weight is not None and weight > 1 and self.distillation.distill_loss_weight is None:
            raise ValueError(
                f"task_loss_weight: {weight}: alone it means 1 - {weight} for distillation; give distill_loss_weight too"
            )
        if self.network.pretrained_path and self.network.initial_checkpoint:
            raise ValueError(
                f"pretrained_path: {self.network.pretrained_path}: initial_checkpoint says as well where training starts; "
                f"give one of them"
            )
        self._check_freezing()
        if self.ema.model_ema_window is not None and self.ema.model_ema_decay is not None:
            raise ValueError(
                f"model_ema_window: {self.ema.model_ema_window:g}: model_ema_decay ({self.ema.model_ema_decay:g}) says as "
                f"well what is averaged; set one of them to null"
            )
        for name in self.network.model_kwargs:
            if name in OWN_SETTING:
                raise ValueError(f"model_kwargs: {name} has a setting of its own, {OWN_SETTING[name]}")
        return self

    def _check_freezing(self) -> None:
        network = self.network
        if network.freeze not in ("", "backbone") and not network.freeze.isdecimal():
            raise ValueError(f"freeze: {network.freeze!r}: expected backbone, or a number of blocks")
        starts = network.pretrained or network.pretrained_path or network.initial_checkpoint or self.run.resume
        if network.freeze and not starts:
            raise ValueError(
                f"freeze: {network.freeze}: what is frozen would stay random; "
                f"say which weights to start from: pretrained, pretrained_path or initial_checkpoint"
            )


# Arguments of a model that have a setting of their own, so that they are not given twice.
OWN_SETTING = {
    "num_classes": "num_classes",
    "img_size": "img_size",
    "global_pool": "gp",
    "drop_rate": "drop",
    "drop_path_rate": "drop_path",
    "pretrained": "pretrained",
    "checkpoint_path": "initial_checkpoint",
}
