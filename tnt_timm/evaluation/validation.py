"""Validate a checkpoint, a run folder or a timm model: the settings, the validation set, the model and its results."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from torch import Tensor

from tnt_timm.checkpoints.model_from_settings import architecture, try_forward
from tnt_timm.checkpoints.open_model import Opened, Source, load, read_named, read_source
from tnt_timm.console import say
from tnt_timm.data import imagenet_sets
from tnt_timm.data.datasets import ImageSet, StreamSet, check_same_classes, expect_classes
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.evaluation.accuracy import PerImageResults, evaluate_per_image
from tnt_timm.evaluation.data_from_settings import evaluation_loader, open_split
from tnt_timm.runtime.backend_agreement import agree_on_backends
from tnt_timm.runtime.cpu_contention import CpuWait
from tnt_timm.runtime.distributed import World
from tnt_timm.runtime.precision import autocast, set_up_torch
from tnt_timm.settings import config
from tnt_timm.settings.schema import Data, TrainConfig

# the settings of train.py that apply to validation
SETTINGS = """model model_kwargs pretrained pretrained_path num_classes img_size gp data_dir dataset val_split val_num_samples
    dataset_download class_map input_key target_key batch_size workers crop_pct interpolation mean std device
    threads amp amp_dtype tf32""".split()


class ModelSource(NamedTuple):
    """Where a model comes from, and how it is validated."""

    settings: TrainConfig  # of the network, only what the command line gives
    source: Source
    exact: bool  # the weights must fit as they are

    @property
    def place(self) -> str:
        """Its name in messages."""
        return self.source.place


class ValidationSet(NamedTuple):
    images: Union[ImageSet, StreamSet]
    classes: Optional[List[str]]  # class names of the model's logits, if known
    columns: Optional[List[int]] = None  # the logits to evaluate (default: all)
    labels: Optional[Tensor] = None  # all correct classes of each image, see `evaluate_per_image`


def model_source(given: Dict[str, Any], path: Optional[str], checkpoint: Optional[str] = None) -> ModelSource:
    """Return the model that a command line refers to. Settings of the command line override the checkpoint's.

    Args:
        given: settings of the command line.
        path: a run folder, a checkpoint or a folder of timm's. If the settings name a model, the dataset's folder.
        checkpoint: weights for the named model, which must fit as they are.

    Raises:
        UserError: there is no such model or checkpoint, or the checkpoint does not describe its model.
    """
    model, pretrained, adapted = given.get("model", ""), given.get("pretrained", False), given.get("pretrained_path")
    if path is not None and checkpoint is not None and not model:
        raise ConfigError(f"command line: {path} and --checkpoint {checkpoint}: give one of them")
    if adapted and (checkpoint is not None or not model):
        raise ConfigError("command line: --pretrained-path: give --model NAME with it, and no other checkpoint")
    if path is None and checkpoint is None and not model:
        raise ConfigError("command line: nothing to validate; give a run folder, a checkpoint, or --model NAME")
    if model:
        config.check_model_name(model, "command line")
        file, more = checkpoint or adapted, {} if path is None else {"data_dir": path}
        source = read_source(file, model) if file else read_named(model, pretrained)
    else:
        source = read_source(path or checkpoint, pretrained=pretrained)
        more = source.settings(given)
    sources = {**dict.fromkeys(more, source.place), **dict.fromkeys(given, "command line")}
    return ModelSource(config.validate({**more, **given}, sources), source, exact=bool(model and checkpoint))


def open_validation_set(data: Data, test_set: str = "") -> ValidationSet:
    """Open the validation set of the settings, or one of ImageNet's other test sets in their `data_dir`.

    Raises:
        UserError: it cannot be opened.
    """
    if not test_set:
        images = open_split(data, data.val_split, False, data.val_num_samples)
        return ValidationSet(images, images.classes)
    if data.dataset or not data.data_dir:
        raise UserError(f"test_set: {test_set}: give its folder as --data-dir, and no --dataset")
    opened = imagenet_sets.open_imagenet_set(test_set, Path(data.data_dir))
    return ValidationSet(opened.images, imagenet_sets.synsets(), opened.columns, opened.labels)


def validate_model(
    source: ModelSource, validation_set: ValidationSet, world: World, use_ema: Optional[bool] = None
) -> Tuple[PerImageResults, Dict[str, Any]]:
    """Load a model and evaluate it; return the results of each image and a summary for a results file.

    `use_ema` selects the averaged or the raw weights (default: those that training selected).

    Raises:
        UserError: the model cannot be loaded or does not fit the validation set, or an image cannot be read.
    """
    settings = source.settings
    data = settings.data
    set_up_torch(settings.compute, world.device)
    with world.together():
        theirs = data.data_dir or data.dataset
        check_same_classes(source.source.described.classes, validation_set.classes, source.place, theirs)
        opened = _load(source, validation_set.classes, use_ema)
        overrides = {key: getattr(data, key) for key in ("crop_pct", "mean", "std", "interpolation")}
        preprocessing = opened.data_config(**overrides)
        try_forward(opened.model, preprocessing["input_size"], opened.model.num_classes)
        model = opened.model.to(world.device)
        expect_classes(validation_set.images, model.num_classes)
        batch_size = data.validation_batch_size or data.batch_size
        loader = evaluation_loader(validation_set.images, preprocessing, batch_size, data.workers, world)
    world.check_same_weights(model)
    if validation_set.columns is not None:
        model.register_forward_hook(lambda module, images, logits: logits[:, validation_set.columns])
    in_precision = autocast(settings.compute, world.device)
    agree_on_backends([model], preprocessing["input_size"], in_precision, world)
    cpu_wait = CpuWait()

    def warn_of_busy_cpu(done: int, total: int) -> None:
        if world.is_main and (warning := cpu_wait.warning(world.device.type == "cpu")):
            say(f"warning: {warning}")

    evaluated = evaluate_per_image(
        {"model": model}, loader, world, in_precision, warn_of_busy_cpu, validation_set.labels
    )
    results = evaluated["model"]
    accuracy = results.accuracy()
    return results, {
        "model": opened.name,
        "top1": round(accuracy.top1, 4),
        "top1_err": round(100 - accuracy.top1, 4),
        "top5": round(accuracy.top5, 4),
        "top5_err": round(100 - accuracy.top5, 4),
        "loss": accuracy.loss,
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "img_size": preprocessing["input_size"][-1],
        "crop_pct": preprocessing["crop_pct"],
        "interpolation": preprocessing["interpolation"],
        "num_images": accuracy.num_images,
    }


def _load(model: ModelSource, classes: Optional[List[str]], use_ema: Optional[bool]) -> Opened:
    """Return the model with its weights, after checking that it can tell the data's classes."""
    network, source = model.settings.network, model.source
    opened = load(source, architecture(network, network.num_classes), use_ema=use_ema, exact=model.exact)
    num_classes = opened.model.num_classes
    if classes is not None and len(classes) != num_classes:
        raise UserError(
            f"num_classes: {opened.name} has {num_classes} classes and the data {len(classes)} "
            f"({', '.join(classes[:3])}, ...); give the model's own dataset, or --num-classes {len(classes)}"
        )
    if opened.new_head:
        raise UserError(
            f"{source.place}: has no head for {num_classes} classes, so there is nothing to validate; "
            "train it on this data first"
        )
    return opened
