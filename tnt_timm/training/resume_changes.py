"""What is different when a run goes on: whether it may be, and what it does to learning rate and images, as lines for the log."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Callable, List, Mapping, Tuple

import torch

from tnt_timm.checkpoints.progress import Progress
from tnt_timm.data.datasets import StreamSet
from tnt_timm.data.loader import stream_workers
from tnt_timm.errors import UserError
from tnt_timm.runtime import provenance
from tnt_timm.runtime.distributed import World
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.training.build import Pace, Parts, lr_schedule, pace_of

# A run cannot go on with another of these: its weights, optimizer state or score would mean something else.
FIXED = (
    "model",
    "model_kwargs",
    "num_classes",
    "img_size",
    "gp",
    "opt",
    "opt_kwargs",
    "layer_decay",
    "freeze",
    "model_ema",
    "eval_metric",
)
# These say where a run starts, and no longer matter when it goes on. (The teacher's settings do: like those of augmentation
# they change the loss from here on, and not what weights and optimizer state mean. So they may change, with a notice.)
START = ("pretrained", "pretrained_path", "initial_checkpoint")
# Another of these changes nothing about the run, so it is not worth a word. (Of a stream, `workers` does: `_images` says it.)
FREE = (
    "output",
    "experiment",
    "resume",
    "workers",
    "log_interval",
    "recovery_interval",
    "recovery_minutes",
    "hang_minutes",
    "log_wandb",
    "log_tensorboard",
    "wandb_project",
    "wandb_tags",
)


def notices(path: Path, state: Mapping[str, Any], config: TrainConfig, parts: Parts, world: World) -> List[str]:
    """What is different from the run in a checkpoint, and then what follows from it.

    Raises:
        UserError: a difference that the run cannot be continued with.
    """
    old, new = state["config"], config_module.flat(config)
    found = [f"{key}: {old[key]!r} -> {new[key]!r}" for key in new if key in old and old[key] != new[key]]
    fixed = [change for change in found if change.split(":")[0] in FIXED]
    if fixed:
        raise UserError(
            f"{path}: holds a run with other settings ({'; '.join(fixed)}); "
            f"choose another --experiment, or remove the folder to start over"
        )
    if state["world_size"] != world.size:
        found.append(f"processes: {state['world_size']} -> {world.size}")
    late = " (without effect: the run has started)"
    keys = [change.split(":")[0] for change in found]
    lines = [change + late * (key in START) for key, change in zip(keys, found) if key not in FREE]
    lines = [f"the run goes on with a changed setting: {line}" for line in lines]

    now_installed = provenance.versions()
    lines += [
        f"the run goes on with another {name}: {version} -> {now_installed.get(name, 'not installed')}"
        for name, version in state["versions"].items()
        if version != now_installed.get(name)
    ]

    was = _Then(state, config, parts, world)
    now = Progress.from_dict(state["progress"], parts.pace.global_batch)
    if now.epoch >= parts.pace.epochs:
        return lines
    return [*lines, *_lr(was, now, config, parts.pace), *_images(was, now, config, parts, world)]


class _Then:
    """The run as a checkpoint left it."""

    def __init__(self, state: Mapping[str, Any], config: TrainConfig, parts: Parts, world: World):
        self.progress = Progress.from_dict(state["progress"], state["progress"]["global_batch"])
        self.config = config.model_copy(
            update={
                name: getattr(config, name).model_copy(
                    update={key: state["config"][key] for key in group.model_fields if key in state["config"]}
                )
                for name, group in config_module.GROUPS.items()
            }
        )
        self.processes = state["world_size"]
        # the data set may have shrunk since, and then to less than one update
        train_size = max(len(parts.train_set), self.progress.global_batch)
        self.pace = pace_of(self.config, dataclasses.replace(world, size=self.processes), train_size)
        self.lr, self.epochs = _lr_curve(self.config, self.pace)


def _lr_curve(config: TrainConfig, pace: Pace) -> Tuple[Callable[[int, int], float], int]:
    """(epoch, finished updates in it) -> the largest lr of the parameter groups; and for how many epochs."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=pace.lr)
    scheduler, pace = lr_schedule(config, optimizer, pace)

    def lr(epoch: int, update: int) -> float:
        scheduler.step(epoch)
        scheduler.step_update(epoch * pace.updates_per_epoch + update)
        return optimizer.param_groups[0]["lr"]

    return lr, pace.epochs


def _lr(was: _Then, now: Progress, config: TrainConfig, pace: Pace) -> List[str]:
    """The first epoch in which the learning rate is another."""
    lr, epochs = _lr_curve(config, pace)
    updates, updates_then = now.update, was.progress.update
    trained = now.trained is not None or now.update == pace.updates_per_epoch
    for epoch in range(now.epoch + trained, epochs):
        value = lr(epoch, updates)
        if epoch >= was.epochs:
            before = was.lr(epoch - 1, 0)
            return [f"epoch {epoch + 1} is new; its lr is {value:.3g}, after {before:.3g} in epoch {epoch}"]
        before = was.lr(epoch, updates_then)
        if not math.isclose(value, before, rel_tol=1e-6):
            return [f"lr of epoch {epoch + 1} is {value:.3g} instead of {before:.3g}"]
        updates = updates_then = 0
    return []


def _images(was: _Then, now: Progress, config: TrainConfig, parts: Parts, world: World) -> List[str]:
    """What becomes of the order in which images come."""
    found, old, new = [], was.pace, parts.pace
    done = was.progress.update * old.global_batch  # images of the current epoch
    if new.global_batch != old.global_batch:
        found.append(
            f"an update is {new.global_batch} images instead of {old.global_batch}, "
            f"an epoch {new.updates_per_epoch} updates instead of {old.updates_per_epoch}"
        )
    deal, deal_then = _deal(parts, config, world.size), _deal(parts, was.config, was.processes)
    inside = done > 0 and now.update < new.updates_per_epoch
    if deal != deal_then and isinstance(parts.train_set, StreamSet):
        twice = f"some images of epoch {now.epoch + 1} come twice and others not at all, and " if inside else ""
        dealt = f"the stream is dealt to {_text(deal)} instead of {_text(deal_then)}"
        return [*found, f"{dealt}: {twice}images come in another order"]
    if deal != deal_then:
        same = "each update has the same images as before; " if new.global_batch == old.global_batch else ""
        found.append(f"{same}mixing, erasing and dropout, drawn per process and batch, come out otherwise")
    again = done - now.update * new.global_batch
    if again and inside:
        found.append(
            f"{again} images of epoch {now.epoch + 1} come a second time: the {done} that it has seen are no multiple of "
            f"{new.global_batch}"
        )
    return found


def _deal(parts: Parts, config: TrainConfig, processes: int) -> Tuple[int, int, int]:
    """Processes, readers of each, and images of a batch: what decides who sees which image."""
    readers = 1
    if isinstance(parts.train_set, StreamSet):
        readers = max(1, stream_workers(parts.train_set, config.data.workers, processes))
    return processes, readers, config.data.batch_size


def _text(deal: Tuple[int, int, int]) -> str:
    processes, readers, batch_size = deal
    return f"{processes} x {readers} readers in batches of {batch_size}"
