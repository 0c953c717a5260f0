"""validate.py: a checkpoint, a run folder or any timm model on a validation set -> one exact number."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from torch import Tensor, nn

from tnt_timm.checkpoints import create_model, file_format
from tnt_timm.console import say
from tnt_timm.data import imagenet_sets
from tnt_timm.data.datasets import ImageSet, StreamSet, check_same_classes
from tnt_timm.data.loader import EvaluationLoader
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.evaluation.accuracy import Accuracy, Judgement, Score, any_right_class, judge, one_right_class
from tnt_timm.evaluation.inputs import data_config, evaluation_loader, open_split
from tnt_timm.runtime.backends import agree_on_backends
from tnt_timm.runtime.cpu_wait import CpuWait
from tnt_timm.runtime.distributed import World
from tnt_timm.runtime.precision import autocast, set_up_torch
from tnt_timm.settings import config
from tnt_timm.settings.schema import Data, Network, TrainConfig

# The settings of train.py that mean something here.
SETTINGS = """model model_kwargs pretrained pretrained_path num_classes img_size gp data_dir dataset val_split val_num_samples
    dataset_download class_map input_key target_key batch_size workers crop_pct interpolation mean std device
    threads amp amp_dtype tf32""".split()


class Subject(NamedTuple):
    """What is validated: its settings, the checkpoint where there is one, and what to call it in a message."""

    settings: TrainConfig
    state: Dict[str, Any]
    place: str


class Exam(NamedTuple):
    """What it is validated on."""

    images: Union[ImageSet, StreamSet]
    classes: Optional[List[str]]  # what the logits have to mean, where known
    columns: Optional[List[int]] = None  # the logits that count; None is all of them
    score: Score = one_right_class


class Columns(nn.Module):
    """A model without the logits that do not count."""

    def __init__(self, model: nn.Module, columns: Sequence[int]):
        super().__init__()
        self.model = model
        self.columns = list(columns)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, columns)."""
        return self.model(images)[:, self.columns]


def subject_of(given: Dict[str, Any], path: Optional[str], checkpoint: Optional[str] = None) -> Subject:
    """What a command line means.

    Args:
        given: its settings; they win over the checkpoint's.
        path: run folder or checkpoint; with a model in the settings, the data's folder.
        checkpoint: weights for that model.

    Raises:
        UserError: no such model or checkpoint, or one that does not say what it is.
    """
    if path is not None and checkpoint is not None and "model" not in given:
        raise ConfigError(f"command line: {path} and --checkpoint {checkpoint}: give one of them")
    if given.get("pretrained_path") and ("model" not in given or checkpoint is not None):
        raise ConfigError("command line: --pretrained-path: give --model NAME with it, and no checkpoint beside it")
    if "model" in given:
        config.check_model_name(given["model"], "command line")
        if path is not None:
            given.setdefault("data_dir", path)
        state = file_format.read(Path(checkpoint)) if checkpoint else {}
        place = checkpoint or given["model"]
    else:
        if path is None and checkpoint is None:
            raise ConfigError("command line: nothing to validate; give a run folder, a checkpoint, or --model NAME")
        place = str(file_format.find(Path(path or checkpoint)))
        state = file_format.read(Path(place))
        if "arch" not in state or "config" not in state:
            raise UserError(
                f"{place}: does not say what model it is; pass --model NAME --data-dir DIR --checkpoint {place}"
            )
    return Subject(_settings(state if "model" not in given else {}, given), state, place)


def open_exam(data: Data, test_set: str = "") -> Exam:
    """The validation set of the settings, or one of ImageNet's test sets in their `data_dir`.

    Raises:
        UserError: it cannot be opened.
    """
    if not test_set:
        images = open_split(data, data.val_split, False, data.val_num_samples)
        return Exam(images, images.classes)
    if data.dataset or not data.data_dir:
        raise UserError(f"test_set: {test_set}: give the folder that it lies in as --data-dir, and no --dataset")
    opened = imagenet_sets.open_imagenet_set(test_set, Path(data.data_dir))
    score = one_right_class if opened.labels is None else any_right_class(opened.labels)
    return Exam(opened.images, imagenet_sets.synsets(), opened.columns, score)


def measure(
    subject: Subject, exam: Exam, here: World, use_ema: Optional[bool] = None
) -> Tuple[Judgement, Dict[str, Any]]:
    """What a model makes of each image, and what belongs into a file of results.

    Raises:
        UserError: anything that keeps the number from being computed.
    """
    settings = subject.settings
    set_up_torch(settings.compute, here.device)
    with here.together():
        model, preprocessing, loader = _prepare(subject, exam, use_ema, here)
    counted = model if exam.columns is None else Columns(model, exam.columns)
    in_precision = autocast(settings.compute, here.device)
    agree_on_backends([model], preprocessing["input_size"], in_precision, here)
    cpu_wait = CpuWait()

    def after_a_batch(done: int, total: int) -> None:
        if here.is_main and (warning := cpu_wait.warning(here.device.type == "cpu")):
            say(f"warning: {warning}")

    found = judge({"model": counted}, loader, here, in_precision, after_a_batch, exam.score)["model"]
    return found, _results(found.accuracy(), model, settings, preprocessing)


def _settings(state: Dict[str, Any], given: Dict[str, Any]) -> TrainConfig:
    """The checkpoint's settings with those of the command line over them; settings of training alone play no part."""
    wanted = (*SETTINGS, "validation_batch_size")
    settings = {key: value for key, value in state.get("config", {}).items() if key in wanted}
    settings["num_classes"] = state.get("num_classes")
    settings |= given
    if "batch_size" in given:
        settings["validation_batch_size"] = None
    return config.validate(settings, dict.fromkeys(given, "command line"))


def _prepare(
    subject: Subject, exam: Exam, use_ema: Optional[bool], here: World
) -> Tuple[nn.Module, Dict[str, Any], EvaluationLoader]:
    settings, state, place = subject
    if state.get("classes") is not None:
        check_same_classes(state["classes"], exam.classes, place, settings.data.data_dir or settings.data.dataset)
    model = _model(settings.network, state, place, use_ema, exam.classes)
    preprocessing = data_config(settings.data, settings.network.img_size, model)
    batch_size = settings.data.validation_batch_size or settings.data.batch_size
    loader = evaluation_loader(exam.images, preprocessing, batch_size, settings.data.workers, here)
    return model.to(here.device), preprocessing, loader


def _model(
    settings: Network, state: Dict[str, Any], place: str, use_ema: Optional[bool], classes: Optional[List[str]]
) -> nn.Module:
    arguments = create_model.architecture(settings, settings.num_classes)
    if settings.pretrained_path and not state:
        model, _, new_head = create_model.adapted_model(
            settings.model, arguments, settings.pretrained_path, classes=classes
        )
        _check_head(model, classes, settings)
        if new_head:
            raise UserError(
                f"pretrained_path: {settings.pretrained_path}: has no head for {model.num_classes} classes, "
                f"so there is nothing to validate; train it on this data first"
            )
        return model
    model, _ = create_model.timm_model(settings.model, arguments, dict(pretrained=settings.pretrained and not state))
    _check_head(model, classes, settings)
    if state:
        which = "" if use_ema is None else "ema" if use_ema else "raw"
        file_format.load_weights(model, file_format.weights_of(state, which, place), place)
    return model


def _check_head(model: nn.Module, classes: Optional[List[str]], settings: Network) -> None:
    if classes is not None and len(classes) != model.num_classes:
        raise UserError(
            f"num_classes: {settings.model} has {model.num_classes} classes and the data {len(classes)} "
            f"({', '.join(classes[:3])}, ...); pass the data that belongs to the model, or --num-classes {len(classes)}"
        )


def _results(
    accuracy: Accuracy, model: nn.Module, settings: TrainConfig, preprocessing: Dict[str, Any]
) -> Dict[str, Any]:
    return {
        "model": settings.network.model,
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
