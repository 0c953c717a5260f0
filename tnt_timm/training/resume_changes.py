"""What changes when a run resumes with other settings: whether it is allowed, and its effect on learning rate and images."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Callable, List, Mapping, Tuple

import torch

from tnt_timm.checkpoints.progress import Pace, Progress
from tnt_timm.data.datasets import StreamSet
from tnt_timm.data.loader import stream_workers
from tnt_timm.errors import UserError
from tnt_timm.runtime import provenance
from tnt_timm.runtime.distributed import World
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.training.build import Parts
from tnt_timm.training.schedule import lr_schedule, pace_of

# A run cannot resume with another value of these: its weights, optimizer state or score would mean something else.
FIXED = set(
    "model model_kwargs num_classes img_size gp opt opt_kwargs layer_decay freeze model_ema eval_metric".split()
)
# These say where a run starts, and have no effect later. (A teacher's settings have: like augmentation they change the loss
# from here on, but not what weights and optimizer state mean. So they may change, with a notice.)
START = {"pretrained", "pretrained_path", "initial_checkpoint"}
# These change nothing about the result, so they get no notice. (For a stream, `workers` does: see `_images`.)
FREE = set(
    """output experiment resume workers log_interval recovery_interval recovery_minutes hang_minutes
    log_wandb log_tensorboard wandb_project wandb_tags""".split()
)


def notices(path: Path, state: Mapping[str, Any], config: TrainConfig, parts: Parts, world: World) -> List[str]:
    """Compare a run with its checkpoint. Return what changed and what follows, as lines for the log.

    Args:
        path: of the checkpoint.
        state: what it holds.
        config: of the run now.
        parts: of the run now.
        world: this rank among all.

    Raises:
        UserError: the run cannot resume with these settings.
    """
    old, new = state["config"], config_module.flat(config)
    changed = {key: f"{key}: {old[key]!r} -> {new[key]!r}" for key in new if key in old and old[key] != new[key]}
    fixed = [text for key, text in changed.items() if key in FIXED]
    if fixed:
        raise UserError(
            f"{path}: holds a run with other settings ({'; '.join(fixed)}); "
            f"choose another --experiment, or remove the folder to start over"
        )
    if state["world_size"] != world.size:
        changed["processes"] = f"processes: {state['world_size']} -> {world.size}"
    lines = []
    for key, text in changed.items():
        if key not in FREE:
            lines.append(f"setting changed: {text}" + " (no effect: the run has started)" * (key in START))
    installed = provenance.versions()
    for name, version in state["versions"].items():
        if version != installed.get(name):
            lines.append(f"version changed: {name} {version} -> {installed.get(name, 'not installed')}")

    then = _Then(state, config, parts, world)
    now = Progress.from_dict(state["progress"], parts.pace.global_batch)
    if now.epoch >= parts.pace.epochs:
        return lines
    return [*lines, *_lr(then, now, config, parts.pace), *_images(then, now, config, parts, world)]


class _Then:
    """The run as the checkpoint left it."""

    def __init__(self, state: Mapping[str, Any], config: TrainConfig, parts: Parts, world: World):
        self.progress = Progress.from_dict(state["progress"], state["progress"]["global_batch"])
        old = state["config"]
        groups = {name: getattr(config, name) for name in config_module.GROUPS}
        update = {
            name: group.model_copy(update={key: old[key] for key in type(group).model_fields if key in old})
            for name, group in groups.items()
        }
        self.config = config.model_copy(update=update)
        self.processes = state["world_size"]
        # the dataset may have shrunk since, even to less than one update
        train_size = max(len(parts.train_set), self.progress.global_batch)
        self.pace = pace_of(self.config, dataclasses.replace(world, size=self.processes), train_size)


def _lr_curve(config: TrainConfig, pace: Pace) -> Tuple[Callable[[int, int], float], int]:
    """Return (epoch, finished updates in it) -> the largest learning rate of the parameter groups, and the number of epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=pace.lr)
    scheduler, pace = lr_schedule(config, optimizer, pace)

    def lr(epoch: int, update: int) -> float:
        scheduler.step(epoch)
        scheduler.step_update(epoch * pace.updates_per_epoch + update)
        return optimizer.param_groups[0]["lr"]

    return lr, pace.epochs


def _lr(then: _Then, now: Progress, config: TrainConfig, pace: Pace) -> List[str]:
    """Name the first epoch whose learning rate differs."""
    lr, epochs = _lr_curve(config, pace)
    lr_then, epochs_then = _lr_curve(then.config, then.pace)
    updates, updates_then = now.update, then.progress.update
    trained = now.trained is not None or now.update == pace.updates_per_epoch
    for epoch in range(now.epoch + trained, epochs):
        value = lr(epoch, updates)
        if epoch >= epochs_then:
            before = lr_then(epoch - 1, 0)
            return [f"epoch {epoch + 1} is new: its lr is {value:.3g}, after {before:.3g} in epoch {epoch}"]
        before = lr_then(epoch, updates_then)
        if not math.isclose(value, before, rel_tol=1e-6):
            return [f"lr of epoch {epoch + 1} is {value:.3g} instead of {before:.3g}"]
        updates = updates_then = 0
    return []


def _images(then: _Then, now: Progress, config: TrainConfig, parts: Parts, world: World) -> List[str]:
    """Say what changes in the order of the images."""
    lines, old, new = [], then.pace, parts.pace
    seen = then.progress.update * old.global_batch  # images of the current epoch
    inside_epoch = seen > 0 and now.update < new.updates_per_epoch
    if new.global_batch != old.global_batch:
        lines.append(
            f"an update has {new.global_batch} images instead of {old.global_batch}, "
            f"an epoch {new.updates_per_epoch} updates instead of {old.updates_per_epoch}"
        )
    split, split_then = _split(parts, config, world.size), _split(parts, then.config, then.processes)
    if split != split_then and isinstance(parts.train_set, StreamSet):
        repeats = f"some images of epoch {now.epoch + 1} are repeated and others left out, and " if inside_epoch else ""
        split_text = "the stream is split over {} x {} readers in batches of {} instead of {} x {} in batches of {}"
        return [*lines, f"{split_text.format(*split, *split_then)}: {repeats}the order of images changes"]
    if split != split_then:
        same = "each update has the same images as before; " if new.global_batch == old.global_batch else ""
        lines.append(f"{same}mixup, erasing and dropout, which are drawn per process and batch, come out differently")
    repeated = seen - now.update * new.global_batch
    if repeated and inside_epoch:
        lines.append(
            f"{repeated} images of epoch {now.epoch + 1} are repeated: "
            f"the {seen} that it has seen are not a multiple of {new.global_batch}"
        )
    return lines


def _split(parts: Parts, config: TrainConfig, processes: int) -> Tuple[int, int, int]:
    """Return processes, readers per process and batch size, which decide who sees which image."""
    readers = 1
    if isinstance(parts.train_set, StreamSet):
        readers = max(1, stream_workers(parts.train_set, config.data.workers, processes))
    return processes, readers, config.data.batch_size
