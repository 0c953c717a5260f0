"""Loss and distillation tasks, built on timm's `TrainingTask`.

Networks run under autocast and return float32 logits; the loss is computed outside of autocast. (timm computes it inside, where
on a CPU the softmax and with it the loss would be bfloat16.)
"""

import copy
from typing import Any, Callable, ContextManager, Dict, Sequence, Tuple, Union

import torch
from timm.task import ClassificationTask, LogitDistillationTask, TokenDistillationTask, TrainingTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from tnt_timm import ops
from tnt_timm.checkpoints.open_model import load, read_named
from tnt_timm.errors import UserError, one_line
from tnt_timm.runtime.backend_agreement import agree_on_backends
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schema import Compute, Distillation, TrainConfig

Autocast = Callable[[], ContextManager]  # makes the precision context of a forward pass


class FloatLogits(nn.Module):
    """Run a network under autocast, and return its logits in float32.

    Args:
        module: the network, under the attribute name where timm looks for the model inside of wrappers.
        autocast: makes the precision context.
    """

    def __init__(self, module: nn.Module, autocast: Autocast):
        super().__init__()
        self.module = module
        self.autocast = autocast

    def forward(self, images: Tensor) -> Union[Tensor, Tuple[Tensor, ...]]:  # (B, 3, H, W) -> (B, classes), or two
        with self.autocast():
            logits = self.module(images)
        return tuple(part.float() for part in logits) if isinstance(logits, tuple) else logits.float()


class Teacher(DistillationTeacher):
    """timm's teacher, for images normalized by the run's `mean` and `std`.

    timm assumes the student's published normalization, and compares it with the teacher's on the device in each step, which is
    a sync. Here the conversion is computed once.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], device: torch.device):
        super().__init__(network, device=device)
        self.requires_grad_(False)
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
        self.as_they_are = torch.equal(mean, self.mean_kd) and torch.equal(std, self.std_kd)
        self.register_buffer("scale", std / self.std_kd, persistent=False)
        self.register_buffer("shift", (mean - self.mean_kd) / self.std_kd, persistent=False)

    def normalize_input(self, images: Tensor, student_mean: Any = None, student_std: Any = None) -> Tensor:
        return images if self.as_they_are else images * self.scale + self.shift


def build_task(
    config: TrainConfig,
    world: World,
    model: nn.Module,
    criterion: nn.Module,
    autocast: Autocast,
    preprocessing: Dict[str, Any],
) -> TrainingTask:
    """Return the model with its loss, compiled and wrapped for DDP if asked, and with its teacher if there is one.

    Args:
        config: of the run.
        world: this rank among all.
        model: to train, on the device.
        criterion: the loss, of logits (B, classes) and targets (B,) or (B, classes).
        autocast: makes the precision context of the networks.
        preprocessing: size and normalization of the images.

    Returns:
        A module; called with images and targets, it returns {"loss": scalar, "output": logits (B, classes), ...}, in float32.

    Raises:
        UserError: the teacher cannot be loaded or does not fit, or the model has no head for it.
    """
    settings = config.distillation
    networks = [model]
    if settings.kd_model_name:
        with world.together():
            if settings.kd_distill_type == "token":
                images = torch.zeros(2, *preprocessing["input_size"], device=world.device)
                _check_second_head(config.network.model, model, images)
            network = _teacher_network(settings.kd_model_name, preprocessing["input_size"], model.num_classes)
            networks.append(network.to(world.device))
        world.check_same_weights(networks[-1])
    agree_on_backends(networks, preprocessing["input_size"], autocast, world)
    student, *teachers = (FloatLogits(_compiled(config.compute, network), autocast) for network in networks)
    common: Dict[str, Any] = dict(criterion=criterion, device=world.device, verbose=False)
    if not teachers:
        task: TrainingTask = ClassificationTask(student, **common)
    else:
        teacher = Teacher(teachers[0], preprocessing["mean"], preprocessing["std"], world.device)
        task = _distillation_task(settings, student, teacher, common)
    if world.size > 1:
        task.prepare_distributed(device_ids=[world.device.index] if world.device.type == "cuda" else None)
    return task


def _distillation_task(
    settings: Distillation, student: nn.Module, teacher: Teacher, common: Dict[str, Any]
) -> TrainingTask:
    common = dict(
        common,
        distill_loss_weight=settings.distill_loss_weight,
        task_loss_weight=settings.task_loss_weight,
        temperature=settings.kd_temperature,
    )
    if settings.kd_distill_type == "token":
        return TokenDistillationTask(student, teacher, distill_type=settings.kd_token_distill_type, **common)
    return LogitDistillationTask(student, teacher, loss_type=settings.kd_loss_type, **common)


def _check_second_head(name: str, model: nn.Module, images: Tensor) -> None:
    if hasattr(model, "set_distilled_training"):  # some models have the method, but no second head
        trial = copy.deepcopy(model).train()  # leave the batch statistics of the run alone
        trial.set_distilled_training(True)
        with torch.no_grad(), ops.silent():
            if isinstance(trial(images), tuple):
                return
    raise UserError(
        f"kd_distill_type: token: {name} has no second head for a teacher; "
        f"choose a distilled model such as tnt_s_distilled, or --kd-distill-type logit"
    )


def _teacher_network(name: str, input_size: Tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the teacher with its published weights and its own head, in evaluation mode, on the CPU."""
    try:
        opened = load(read_named(name, pretrained=True))
    except Exception as error:  # registry, Hub and folders each raise their own exceptions for what is missing
        first_sentence = one_line(error).split(". ")[0]  # the others are advice on timm's own settings
        reason = first_sentence.rstrip(".").removeprefix("model: ").removeprefix(f"{name}: ")
        raise UserError(
            f"kd_model_name: {name}: {reason}; "
            f"name a timm model with published weights, or local-dir:FOLDER with config.json and weights"
        ) from None
    network = opened.model.eval()
    network.pretrained_cfg.update(opened.preprocessing)  # timm's task normalizes the teacher's images by it
    if network.num_classes != num_classes:  # asked for this number, timm would replace the head by a random one
        raise UserError(
            f"kd_model_name: {name} has {network.num_classes} classes and the data {num_classes}; "
            f"choose a teacher that was trained on these classes"
        )
    size = f"{input_size[1]}x{input_size[2]}"
    try:
        with torch.no_grad(), ops.silent():
            shape = tuple(network(torch.zeros(1, *input_size)).shape)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise UserError(
            f"kd_model_name: {name} does not take the run's images of {size}: {one_line(error)}; "
            f"choose a teacher for that size, or another --img-size"
        ) from None
    if shape != (1, num_classes):
        raise UserError(f"kd_model_name: {name} gives {shape} instead of logits (1, {num_classes}); choose another")
    return network


def _compiled(compute: Compute, network: nn.Module) -> nn.Module:
    if not compute.torchcompile:
        return network
    try:
        return torch.compile(network, backend=compute.torchcompile)
    except RuntimeError as error:
        raise UserError(f"torchcompile: {compute.torchcompile}: {one_line(error)}") from None


def describe_teacher(settings: Distillation, task: TrainingTask) -> str:
    """Return one line for the log: the teacher, the kind of distillation, and the weights of the losses."""
    parameters = sum(parameter.numel() for parameter in task.teacher.parameters())
    how = "logit distillation"
    if settings.kd_distill_type == "token":
        how = f"{settings.kd_token_distill_type} token distillation"
    if (settings.kd_distill_type, settings.kd_token_distill_type) != ("token", "hard"):
        how += f" at temperature {settings.kd_temperature:g}"
    loss = f"{task.task_loss_weight:g} x task + {task.distill_loss_weight:g} x distillation"
    return f"{settings.kd_model_name}, {parameters:,} parameters; {how}, loss = {loss}"
