"""What changes when a run resumes with other settings: whether it is allowed, and its effect on learning rate and images."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import torch

from tnt_timm.checkpoints import run_folder
from tnt_timm.checkpoints.progress import Pace, Progress
from tnt_timm.checkpoints.restorer import Changes
from tnt_timm.data.datasets import StreamSet
from tnt_timm.data.identity import differences, same_order
from tnt_timm.data.loader import stream_workers
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.runtime import provenance
from tnt_timm.runtime.distributed import World
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import DEFAULTS, TrainConfig
from tnt_timm.training.build import Parts
from tnt_timm.training.schedule import lr_schedule, pace_of

# A run cannot resume with another value of these: its weights, optimizer state, score or order of images would mean something
# else.
FIXED = set(
    "model model_kwargs num_classes img_size gp opt opt_kwargs layer_decay freeze model_ema eval_metric seed".split()
)
# These say where a run starts, so a run with another value is another run. They may be left out once it has started. (A
# teacher's settings may change: like augmentation they change the loss from here on, but not what weights and optimizer
# state mean.)
START = {"pretrained", "pretrained_path", "initial_checkpoint"}
# These say which data a run uses. What counts is the data itself, where the checkpoint has its identity.
DATA = set(
    "dataset data_dir train_split val_split class_map input_key target_key train_num_samples val_num_samples".split()
)
# These change nothing about the result, so they get no notice. (For a stream, `workers` does: see `_images`.)
FREE = set(
    """output experiment resume allow_data_change dataset_download workers log_interval recovery_interval recovery_minutes
    hang_minutes log_wandb log_tensorboard wandb_project wandb_tags""".split()
)
# These change at most the last bits of a result, so that a finished run has none to add.
ROUNDING = {"device", "threads", "deterministic", "torchcompile", "grad_checkpointing", "validation_batch_size"}
# How images are prepared for an evaluation: keys of a checkpoint's `preprocessing`.
PREPROCESSING = ("crop_pct", "crop_mode", "interpolation", "mean", "std")


def compare(path: Path, state: Mapping[str, Any], config: TrainConfig, parts: Parts, world: World) -> Changes:
    """Compare a run with its checkpoint. Return what changed and what follows.

    Args:
        path: of the checkpoint.
        state: what it holds.
        config: of the run now.
        parts: of the run now.
        world: this rank among all.

    Raises:
        UserError: the run cannot resume with these settings or this data, or is finished with others.
    """
    then = _Then(state, config, parts, world)
    now = Progress.from_dict(state["progress"], parts.pace.global_batch)
    finished = now.epoch >= parts.pace.epochs
    changed = _changed_settings(state["config"], config_module.flat(config))
    if not world.is_main:  # other machines may have the start weights elsewhere; rank 0 decides
        changed = {key: text for key, text in changed.items() if key not in START}
    if state["world_size"] != world.size:
        changed["processes"] = f"processes: {state['world_size']} -> {world.size}"
    new_data = _changed_data(then.data, parts.data)
    if finished:
        _check_finished(path, changed, new_data, then, config, parts)
    else:
        _check_settings(path, changed, state["config"], config)
        _check_data(path, changed, new_data, then, config, parts)

    lines = [f"setting changed: {text}{_effect(key, state)}" for key, text in changed.items() if key not in FREE]
    lines += [f"the {split} data changed: {text}" for split, text in new_data.items()]
    installed = provenance.versions()
    for name, version in state["versions"].items():
        if version != installed.get(name):
            lines.append(f"version changed: {name} {version} -> {installed.get(name, 'not installed')}")
    if finished:
        return Changes(lines)
    lines += [*_lr(then, now, config, parts.pace), *_images(then, now, config, parts, world)]
    return Changes(lines, _changed_evaluation(state, new_data, parts))


def _changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Dict[str, str]:
    """Return the settings that changed, as texts. Two ways to write a path are the same.

    A setting that the checkpoint is too old to have was at its default, which keeps what the code did before.
    """
    old = {**DEFAULTS, **old}

    def same(key: str) -> bool:
        if key in START and isinstance(old[key], str) and old[key] and new[key]:
            return Path(old[key]).resolve() == Path(new[key]).resolve()
        return old[key] == new[key]

    return {key: f"{key}: {old[key]!r} -> {new[key]!r}" for key in new if not same(key)}


def _effect(key: str, state: Mapping[str, Any]) -> str:
    if key in START:
        return " (no effect: the run has started)"
    return " (the images are the same)" if key in DATA and "data" in state else ""


def _changed_data(old: Mapping[str, Any], new: Mapping[str, Any]) -> Dict[str, str]:
    """Return what differs, by "train" and "validation". Older checkpoints do not say which data they had."""
    found = {split: differences(old[split], new[split]) for split in new} if old else {}
    return {split: text for split, text in found.items() if text}


def _changed_evaluation(state: Mapping[str, Any], new_data: Mapping[str, str], parts: Parts) -> str:
    """Return why accuracies from now on cannot be compared with those before, empty if they can."""
    if "validation" in new_data:
        return "the validation data changed"
    old, new = state["preprocessing"], parts.preprocessing
    other = [key for key in PREPROCESSING if key in old and key in new and _plain(old[key]) != _plain(new[key])]
    return f"the preprocessing changed ({', '.join(other)})" if other else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _check_finished(
    path: Path,
    changed: Mapping[str, str],
    new_data: Mapping[str, str],
    then: "_Then",
    config: TrainConfig,
    parts: Parts,
) -> None:
    """Raise UserError if a finished run is not the one that the settings and the data ask for."""
    ignored = FREE | ROUNDING
    if then.data and not new_data:
        ignored = ignored | DATA
    if then.pace.global_batch == parts.pace.global_batch:
        ignored = ignored | {"processes"}
    other = [text for key, text in changed.items() if key not in ignored]
    more_epochs = ", or pass more --epochs to train it further"
    if other:
        other += [_of_data(new_data)] if new_data else []
        more_epochs = "" if (FIXED | START) & changed.keys() else more_epochs
        raise ConfigError(
            f"{path}: the run is finished, but it had other settings ({_listed(other)}); "
            f"{_new_run(path, config)}{more_epochs}"
        )
    if new_data:
        raise UserError(
            f"{path}: the run is finished, but its data has changed ({_of_data(new_data)}); {_new_run(path, config)}"
            f"{more_epochs} with --allow-data-change"
        )


def _check_settings(path: Path, changed: Mapping[str, str], old: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise UserError if a setting changed that must not change within a run."""
    given = config_module.flat(config)

    def starts_elsewhere(key: str) -> bool:
        if key not in START or not given[key]:
            return False
        if not (isinstance(old[key], str) and isinstance(given[key], str)):
            return True
        before = Path(old[key])  # each job may have its own copy of the file
        return before.exists() or before.name != Path(given[key]).name

    fixed = [text for key, text in changed.items() if key in FIXED or starts_elsewhere(key)]
    if fixed:
        raise ConfigError(
            f"{path}: holds a run with other settings ({_listed(fixed)}); set them back, or {_new_run(path, config)}"
        )


def _check_data(
    path: Path,
    changed: Mapping[str, str],
    new_data: Mapping[str, str],
    then: "_Then",
    config: TrainConfig,
    parts: Parts,
) -> None:
    """Raise UserError if the data changed inside an epoch, or without permission.

    A validation set needs no permission as long as nothing was evaluated: a damaged image in it may have been repaired.
    """
    if not new_data or (list(new_data) == ["validation"] and not then.progress.rows):
        return
    other = [text for key, text in changed.items() if key in DATA]
    error = ConfigError if other else UserError
    what = f"{path}: holds a run on other data ({_of_data(new_data)}{''.join(f'; {text}' for text in other)})"
    if then.progress.update and not same_order(then.data["train"], parts.data["train"]):
        raise error(
            f"{what}, and it stopped inside epoch {then.progress.epoch + 1}, whose images would no longer come once each; "
            f"put the data back as it was, or {_new_run(path, config)}"
        )
    if not config.run.allow_data_change:
        raise error(
            f"{what}; put it back as it was, {_new_run(path, config)}, or pass --allow-data-change to continue with this data"
        )


def _of_data(new_data: Mapping[str, str]) -> str:
    return "; ".join(f"{split}: {text}" for split, text in new_data.items())


def _listed(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - 6} more" if len(texts) > 6 else ""
    return "; ".join(texts[:6]) + more


def _new_run(path: Path, config: TrainConfig) -> str:
    """Return how to start another run instead."""
    if path.parent == run_folder.path_of(config):
        return "choose another --experiment"
    return "start a run from its weights with --initial-checkpoint"


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
        self.data = state.get("data") or {}
        # in older checkpoints, which do not say: the dataset may have shrunk since, even to less than one update
        train_size = max(len(parts.train_set), self.progress.global_batch)
        if self.data:
            train_size = self.data["train"]["images"]
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
