"""What a training step computes: the loss of a batch, and with a teacher the distillation loss. timm's tasks do it.

Networks run under autocast and hand out float32 logits; the tasks are called outside of it. (timm calls them inside,
where on a CPU the soft-max and with it the loss would be bfloat16.)
"""

import copy
from typing import Any, Callable, ContextManager, Dict, Sequence, Tuple, Union

import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask, TokenDistillationTask, TrainingTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from tnt_timm import ops
from tnt_timm.errors import UserError, one_line
from tnt_timm.runtime.backends import agree_on_backends
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schema import Compute, Distillation, TrainConfig

Autocast = Callable[[], ContextManager]  # makes the precision context of a forward pass


class FloatLogits(nn.Module):
    """A network that computes under autocast and returns its logits as float32.

    Args:
        module: the network, under the name by which timm finds the model in wrappers.
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
    """timm's teacher, given the images of this run, which are normalised by `mean` and `std`.

    timm takes the student's published normalisation for that of the images, and compares it with the teacher's on the
    device at each step, which waits for the device. Here both are settled once.
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
    """The model with its loss, compiled and wrapped for many processes where asked, and its teacher where there is one.

    Args:
        config: of the run.
        world: this process among all.
        model: to train, on the device.
        criterion: the task loss, of logits (B, classes) and targets (B,) or (B, classes).
        autocast: makes the precision context of the networks.
        preprocessing: size and normalisation of the images.

    Returns:
        Called with images and targets, it gives {"loss": scalar, "output": logits (B, classes), ...}, in float32.

    Raises:
        UserError: a teacher that cannot be had or does not fit, or a model without the head that it would teach.
    """
    settings = config.distillation
    networks = [model]
    if settings.kd_model_name:
        if settings.kd_distill_type == "token":
            images = torch.zeros(2, *preprocessing["input_size"], device=world.device)
            _check_second_head(config.network.model, model, images)
        teacher_network = _teacher_network(settings.kd_model_name, preprocessing["input_size"], model.num_classes)
        networks.append(teacher_network.to(world.device))
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
    if hasattr(model, "set_distilled_training"):  # some models have it and yet no second head
        trial = copy.deepcopy(model).train()  # its batch statistics are not the run's
        trial.set_distilled_training(True)
        with torch.no_grad(), ops.silent():
            if isinstance(trial(images), tuple):
                return
    raise UserError(
        f"kd_distill_type: token: {name} has no second head for a teacher; "
        f"choose a distilled model, as tnt_s_distilled, or --kd-distill-type logit"
    )


def _teacher_network(name: str, input_size: Tuple[int, int, int], num_classes: int) -> nn.Module:
    """The teacher with its published weights and its own head, in evaluation mode, on the CPU."""
    try:
        network = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # registry, hub and folders have their own exceptions for what is missing; all say what
        reason = (
            one_line(error).split(". ")[0].rstrip(".").removeprefix(f"{name}: ")
        )  # more is advice on other settings
        raise UserError(
            f"kd_model_name: {name}: {reason}; "
            f"name a model of timm with published weights, or local-dir:FOLDER with config.json and weights"
        ) from None
    if network.num_classes != num_classes:  # given the number, timm would put a random head in the place of its own
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
    """One line for the log: who teaches, what, and with which weight."""
    parameters = sum(parameter.numel() for parameter in task.teacher.parameters())
    how = "logit distillation"
    if settings.kd_distill_type == "token":
        how = f"{settings.kd_token_distill_type} token distillation"
    if (settings.kd_distill_type, settings.kd_token_distill_type) != ("token", "hard"):
        how += f" at temperature {settings.kd_temperature:g}"
    loss = f"{task.task_loss_weight:g} x task + {task.distill_loss_weight:g} x distillation"
    return f"{settings.kd_model_name}, {parameters:,} parameters; {how}, loss = {loss}"
