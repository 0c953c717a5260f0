"""Keeps a run: writes its checkpoints beside the loop, and finds the way back to the newest good one.

Two generations of the state to continue from are kept, last.pth.tar and previous.pth.tar; a new one takes the place of the
last only when it has been written, read back and found whole. Where the current epoch began is kept as well, as
epoch_start.pth.tar: a run in trouble goes back to there, and not to whatever the clock or an interruption had it save last.
"""

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import get_total_norm

from tnt_timm import files
from tnt_timm.checkpoints import checksum, file_format, run_folder
from tnt_timm.checkpoints.background_writer import BackgroundWriter, copied
from tnt_timm.checkpoints.progress import Pace, Progress
from tnt_timm.data.datasets import check_same_classes
from tnt_timm.errors import UserError
from tnt_timm.export.folder import write_model_folder
from tnt_timm.runtime import provenance
from tnt_timm.runtime.distributed import World
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig

# Settings of the optimizer that may change when a run goes on; the rest of its groups is its own bookkeeping.
HYPER_PARAMETERS = ("initial_lr", "weight_decay", "betas", "momentum", "eps")
TRAINING_STATE = ("progress", "optimizer", "amp_scaler")  # what only a checkpoint to continue from has


@dataclass
class TrainState:
    """What checkpoints hold of a run, besides its progress."""

    model: nn.Module  # as created
    model_kwargs: Dict[str, Any]  # what recreates it: timm.create_model(arch, **model_kwargs)
    ema: Optional[ModelEmaV3]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    classes: Optional[List[str]]
    preprocessing: Dict[str, Any]
    pace: Pace
    num_eval_images: int


class Saver:
    """The checkpoints of one run.

    Args:
        config: of the run.
        state: what is saved.
        world: this process among all; the first one writes.
        folder: the run's folder.
        say: takes a line for the log.
    """

    def __init__(self, config: TrainConfig, state: TrainState, world: World, folder: Path, say: Callable[[str], None]):
        self.config = config
        self.state = state
        self.world = world
        self.folder = folder
        self.say = say
        self.writer = BackgroundWriter()
        self.best: Optional[Dict[str, Any]] = None  # not yet on the disk
        self.saved_at_s = time.monotonic()
        self.damaged: List[Tuple[Path, str]] = []  # met on the way back
        self.epoch_start: Optional[Path] = None  # found on the way back, and not yet under that name

    # ------------------------------------------------------------------ saving

    def is_due(self, update: int) -> bool:
        """Whether it is time to save inside an epoch; the first process's clock decides."""
        run = self.config.run
        if run.recovery_interval and update % run.recovery_interval == 0:
            return True
        minutes = (time.monotonic() - self.saved_at_s) / 60
        return self.world.is_main and 0 < run.recovery_minutes <= minutes

    def weights_are_finite(self) -> bool:
        """Whether a checkpoint is worth writing: what would be saved is finite, buffers and averaged weights too.

        Every process gets the first one's answer; buffers differ.
        """
        models = [self.state.model] if self.state.ema is None else [self.state.model, self.state.ema.module]
        tensors = [value for model in models for value in model.state_dict().values() if value.is_floating_point()]
        finite = torch.isfinite(get_total_norm(tensors)).reshape(1)
        return self.world.all_true(finite if self.world.is_main else torch.ones_like(finite))[0]  # sync

    def save(self, progress: Progress, better: Optional[Mapping[str, float]] = None) -> None:
        """Write the state to continue from, and and, given the accuracy of `better` weights, these too."""
        self.saved_at_s = time.monotonic()
        if self.world.is_main:
            self.tell_trouble()
            state = copied(self.description())
            if better is not None:
                self.best = {**state, "metrics": dict(better), "epoch": progress.epoch}
            state |= copied(
                {
                    "epoch": progress.epoch,
                    "progress": progress.as_dict(),
                    "optimizer": self.state.optimizer.state_dict(),
                    "amp_scaler": self.state.scaler.state_dict(),
                }
            )
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # sync: the copies off the device
            self.writer.start(lambda: self._write(state))

    def _write(self, state: Dict[str, Any]) -> None:
        self._write_best()
        last = self.folder / file_format.LAST
        file_format.write(last, state, keep_as=self.folder / file_format.PREVIOUS)
        if _begins_an_epoch(state["progress"]):
            files.link(last, self.folder / file_format.EPOCH_START)
        run_folder.write_summary(self.folder / "summary.csv", state["progress"]["rows"])

    def _write_best(self) -> None:
        if self.best is not None:
            file_format.write(self.folder / file_format.BEST, self.best)
            weights = file_format.weights_of(self.best)
            preprocessing = self.state.preprocessing
            write_model_folder(self.folder, self.state.model, weights, self.state.classes, preprocessing)
            self.best = None

    def finish(self) -> None:
        """Until all is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        with self.world.together():
            self.finish_alone()

    def finish_alone(self) -> None:
        """The same on this process, whatever the others do."""
        trouble = self.writer.wait()
        if trouble is not None:
            raise trouble

    def tell_trouble(self) -> None:
        """Until nothing is being written; what went wrong with it does not end the run."""
        trouble = self.writer.wait()
        if trouble is not None:
            self.say(f"WARNING: {trouble}; the run goes on and will try again at its next checkpoint")

    def check_space(self) -> None:
        """Raises UserError when the folder's disk has no room for the run's checkpoints."""
        tensors = [*self.state.model.state_dict().values()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # last, previous, the epoch's first and the next with weights, EMA, two moments; best twice, with EMA, as safetensors
        averaged = self.state.ema is not None
        need = weights * (4 * (3 + averaged) + 2 * (1 + averaged) + 2)
        free = shutil.disk_usage(self.folder).free + run_folder.size(self.folder)
        if free < need:
            raise UserError(
                f"output: {self.folder}: {free / 1e9:.2f} GB free, and the run's checkpoints need {need / 1e9:.2f} GB; "
                f"make room or choose another --output"
            )

    def description(self) -> Dict[str, Any]:
        """A checkpoint that needs nothing else to be validated or used; keys as in file_format.py."""
        parts = self.state
        state: Dict[str, Any] = {
            "arch": self.config.network.model,
            "model_kwargs": parts.model_kwargs,
            "num_classes": parts.model_kwargs["num_classes"],
            "classes": parts.classes,
            "preprocessing": parts.preprocessing,
            "weights": "raw" if parts.ema is None else "ema",
            "state_dict": parts.model.state_dict(),
            "config": config_module.flat(self.config),
            "versions": provenance.versions(),
            "world_size": self.world.size,
            "metrics": None,
        }
        if parts.ema is not None:
            state["state_dict_ema"] = parts.ema.module.state_dict()
        return state

    # ------------------------------------------------------------ the way back

    def restore(self, changes: Callable[[Path, Mapping[str, Any]], List[str]]) -> Optional[Progress]:
        """Put the newest whole checkpoint into the parts: the run folder's own, else the one that `resume` names.

        Args:
            changes: what is different from the run in a checkpoint, as lines; raises UserError where it may not be.

        Returns:
            The place where the run goes on; None when there is no checkpoint.

        Raises:
            UserError: it is another run's, or all there are are damaged.
        """
        path, state, self.damaged = run_folder.to_continue(self.folder, self.config)
        for damaged, why in self.damaged:
            self.say(f"WARNING: {why}; going on from {path.name} instead of {damaged.name}")
        if path is None:
            return None
        for notice in changes(path, state):
            self.say(f"notice: {notice}")
        check_same_classes(state["classes"], self.state.classes, str(path), "the data")
        file_format.load_weights(self.state.model, state["state_dict"], str(path))
        if self.state.ema is not None:
            file_format.load_weights(self.state.ema.module, state["state_dict_ema"], str(path))
        self._load_optimizer(state["optimizer"])
        if self.state.scaler.is_enabled() and state["amp_scaler"]:
            self.state.scaler.load_state_dict(state["amp_scaler"])
        progress = Progress.from_dict(state["progress"], self.state.pace.global_batch)
        start = self.folder / file_format.EPOCH_START
        is_start = _begins_an_epoch(state["progress"]) or path.parent != self.folder or not start.is_file()
        self.epoch_start = path if is_start else None
        if progress.best is not None:
            self._check_best(progress, path)
        self.say(f"continuing from {path}: {progress.how_far(self.state.pace.epochs)}")
        return progress

    def _load_optimizer(self, state: Dict[str, Any]) -> None:
        """The moments of the checkpoint, with the hyper-parameters of the config, which may have been changed."""
        groups = self.state.optimizer.param_groups
        wanted = [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in groups]
        self.state.optimizer.load_state_dict(state)
        for group, settings in zip(self.state.optimizer.param_groups, wanted):
            group.update(settings)

    def _check_best(self, progress: Progress, continued: Path) -> None:
        """Notice that the selected weights are missing or damaged, and take them from a checkpoint of the same epoch.

        Where there is none, the best of the epochs to come takes their place.

        Args:
            progress: the place where the run goes on.
            continued: the checkpoint that it goes on from, which may be another run's.
        """
        path, trouble = self.folder / file_format.BEST, "missing"
        try:
            file_format.read(path)
            return
        except UserError as error:
            if path.exists():
                trouble = "damaged"
                self.damaged.append((path, error))
        metric = self.config.run.eval_metric
        kind = "eval_" if self.state.ema is None else "eval_ema_"
        row = next(row for row in progress.rows if row[kind + metric] == progress.best)
        lost = f"{path} is {trouble}; it held epoch {row['epoch'] + 1} ({metric} {progress.best:.3f})"
        for source in (continued, *(self.folder / name for name in file_format.TO_CONTINUE)):
            with contextlib.suppress(UserError):
                state = file_format.read(source)
                if _weights_after(state["progress"]) == row["epoch"]:
                    values = {key: row[kind + key] for key in ("top1", "top5", "loss")}
                    metrics = {**values, "num_images": self.state.num_eval_images}
                    self.best = {key: value for key, value in state.items() if key not in TRAINING_STATE}
                    self.best |= {"metrics": metrics, "epoch": row["epoch"] + 1}
                    self.say(f"WARNING: {lost}; it is written again, from {source.name}")
                    return
        if progress.epoch < self.state.pace.epochs:
            progress.best = None
            self.say(f"WARNING: {lost}, whose weights are gone; the best of the epochs to come takes its place")
        else:
            self.say(f"WARNING: {lost}, whose weights are gone; use {file_format.LAST}, or train on with more --epochs")

    def mend_folder(self) -> None:
        """Put what is damaged aside, so that it takes nobody's place; write again what was lost."""
        for path, _ in self.damaged:
            path.rename(path.with_name(path.name + ".damaged"))
        if self.epoch_start is not None:
            files.link(self.epoch_start, self.folder / file_format.EPOCH_START)
        self._write_best()

    def rewind(self) -> None:
        """Make the checkpoint from which the current epoch began the last one.

        Raises:
            UserError: it is missing or damaged.
        """
        start = self.folder / file_format.EPOCH_START
        trouble = "missing" if not start.is_file() else "damaged" if checksum.is_whole(start) is False else ""
        if trouble:
            raise UserError(
                f"{start}: {trouble}, so the run cannot go back; the same command goes on from its last checkpoint"
            )
        files.link(start, self.folder / file_format.LAST)


def _begins_an_epoch(progress: Mapping[str, Any]) -> bool:
    return progress["update"] == 0 and progress["trained"] is None


def _weights_after(progress: Mapping[str, Any]) -> Optional[int]:
    """The epoch, counted from 0, at whose end the weights of a checkpoint are; None inside an epoch."""
    if progress["trained"] is not None:  # not evaluated yet
        return progress["epoch"]
    return progress["epoch"] - 1 if _begins_an_epoch(progress) else None
