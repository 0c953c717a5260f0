"""Keeps a run: writes its checkpoints beside the loop, and finds the way back to the newest good one.

Two generations of the state to continue from are kept, last.pth.tar and previous.pth.tar; a new one takes the place of the
last only when it has been written, read back and found whole. Where the current epoch began is kept as well, as
epoch_start.pth.tar: a run in trouble goes back to there, and not to whatever the clock or an interruption had it save last.
"""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from torch.nn.utils import get_total_norm

from tnt_timm import files
from tnt_timm.data.datasets import check_same_classes
from tnt_timm.errors import UserError
from tnt_timm.export.folder import write_model_folder
from tnt_timm.training import checkpointing, provenance, resuming, run_folder, seal
from tnt_timm.training import config as config_module
from tnt_timm.training.background import BackgroundWriter, copied
from tnt_timm.training.build import Parts
from tnt_timm.training.distributed import World
from tnt_timm.training.evaluation import Accuracy
from tnt_timm.training.progress import Progress
from tnt_timm.training.reporting import write_summary
from tnt_timm.training.schema import TrainConfig

# Settings of the optimizer that may change when a run goes on; the rest of its groups is its own bookkeeping.
HYPER_PARAMETERS = ("initial_lr", "weight_decay", "betas", "momentum", "eps")
TRAINING_STATE = ("progress", "optimizer", "amp_scaler")  # what only a checkpoint to continue from has


class Saver:
    """The checkpoints of one run.

    Args:
        config: of the run.
        parts: what is saved.
        world: this process among all; the first one writes.
        folder: the run's folder.
        say: takes a line for the log.
    """

    def __init__(self, config: TrainConfig, parts: Parts, world: World, folder: Path, say: Callable[[str], None]):
        self.config = config
        self.parts = parts
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
        models = [self.parts.model] if self.parts.ema is None else [self.parts.model, self.parts.ema.module]
        tensors = [value for model in models for value in model.state_dict().values() if value.is_floating_point()]
        finite = torch.isfinite(get_total_norm(tensors)).reshape(1)
        return self.world.all_true(finite if self.world.is_main else torch.ones_like(finite))[0]  # sync

    def save(self, progress: Progress, better: Optional[Accuracy] = None) -> None:
        """Write the state to continue from, and with `better` the selected weights; the loop goes on meanwhile."""
        self.saved_at_s = time.monotonic()
        if self.world.is_main:
            self.tell_trouble()
            state = copied(self.description())
            if better is not None:
                self.best = {**state, "metrics": vars(better), "epoch": progress.epoch}
            state |= copied(
                {
                    "epoch": progress.epoch,
                    "progress": progress.as_dict(),
                    "optimizer": self.parts.optimizer.state_dict(),
                    "amp_scaler": self.parts.scaler.state_dict(),
                }
            )
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)  # sync: the copies off the device
            self.writer.start(lambda: self._write(state))

    def _write(self, state: Dict[str, Any]) -> None:
        self._write_best()
        last = self.folder / checkpointing.LAST
        checkpointing.write(last, state, keep_as=self.folder / checkpointing.PREVIOUS)
        if _begins_an_epoch(state["progress"]):
            files.link(last, self.folder / checkpointing.EPOCH_START)
        write_summary(self.folder / "summary.csv", state["progress"]["rows"])

    def _write_best(self) -> None:
        if self.best is not None:
            checkpointing.write(self.folder / checkpointing.BEST, self.best)
            weights = checkpointing.weights_of(self.best)
            preprocessing = self.parts.preprocessing
            write_model_folder(self.folder, self.parts.model, weights, self.parts.classes, preprocessing)
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
        tensors = [*self.parts.model.state_dict().values()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # last, previous, the epoch's first and the next with weights, EMA, two moments; best twice, with EMA, as safetensors
        averaged = self.parts.ema is not None
        need = weights * (4 * (3 + averaged) + 2 * (1 + averaged) + 2)
        free = shutil.disk_usage(self.folder).free + run_folder.size(self.folder)
        if free < need:
            raise UserError(
                f"output: {self.folder}: {free / 1e9:.2f} GB free, and the run's checkpoints need {need / 1e9:.2f} GB; "
                f"make room or choose another --output"
            )

    def description(self) -> Dict[str, Any]:
        """A checkpoint that needs nothing else to be validated or used; keys as in checkpointing.py."""
        parts = self.parts
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

    def restore(self) -> Optional[Progress]:
        """Put the newest whole checkpoint into the parts: the run folder's own, else the one that `resume` names.

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
        for notice in resuming.notices(path, state, self.config, self.parts, self.world):
            self.say(f"notice: {notice}")
        check_same_classes(state["classes"], self.parts.classes, str(path), "the data")
        checkpointing.load_weights(self.parts.model, state["state_dict"], str(path))
        if self.parts.ema is not None:
            checkpointing.load_weights(self.parts.ema.module, state["state_dict_ema"], str(path))
        self._load_optimizer(state["optimizer"])
        if self.parts.scaler.is_enabled() and state["amp_scaler"]:
            self.parts.scaler.load_state_dict(state["amp_scaler"])
        progress = Progress.from_dict(state["progress"], self.parts.pace.global_batch)
        start = self.folder / checkpointing.EPOCH_START
        is_start = _begins_an_epoch(state["progress"]) or path.parent != self.folder or not start.is_file()
        self.epoch_start = path if is_start else None
        if progress.best is not None:
            self._check_best(progress, path)
        self.say(f"continuing from {path}: {progress.how_far(self.parts.pace.epochs)}")
        return progress

    def _load_optimizer(self, state: Dict[str, Any]) -> None:
        """The moments of the checkpoint, with the hyper-parameters of the config, which may have been changed."""
        groups = self.parts.optimizer.param_groups
        wanted = [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in groups]
        self.parts.optimizer.load_state_dict(state)
        for group, settings in zip(self.parts.optimizer.param_groups, wanted):
            group.update(settings)

    def _check_best(self, progress: Progress, continued: Path) -> None:
        """Notice that the selected weights are missing or damaged, and take them from a checkpoint of the same epoch.

        Where there is none, the best of the epochs to come takes their place.

        Args:
            progress: the place where the run goes on.
            continued: the checkpoint that it goes on from, which may be another run's.
        """
        path, trouble = self.folder / checkpointing.BEST, "missing"
        try:
            checkpointing.read(path)
            return
        except UserError as error:
            if path.exists():
                trouble = "damaged"
                self.damaged.append((path, error))
        metric = self.config.run.eval_metric
        kind = "eval_" if self.parts.ema is None else "eval_ema_"
        row = next(row for row in progress.rows if row[kind + metric] == progress.best)
        lost = f"{path} is {trouble}; it held epoch {row['epoch'] + 1} ({metric} {progress.best:.3f})"
        for source in (continued, *(self.folder / name for name in checkpointing.TO_CONTINUE)):
            with contextlib.suppress(UserError):
                state = checkpointing.read(source)
                if _weights_after(state["progress"]) == row["epoch"]:
                    values = {key: row[kind + key] for key in ("top1", "top5", "loss")}
                    metrics = vars(Accuracy(**values, num_images=self.parts.eval_loader.num_images))
                    self.best = {key: value for key, value in state.items() if key not in TRAINING_STATE}
                    self.best |= {"metrics": metrics, "epoch": row["epoch"] + 1}
                    self.say(f"WARNING: {lost}; it is written again, from {source.name}")
                    return
        if progress.epoch < self.parts.pace.epochs:
            progress.best = None
            self.say(f"WARNING: {lost}, whose weights are gone; the best of the epochs to come takes its place")
        else:
            self.say(
                f"WARNING: {lost}, whose weights are gone; use {checkpointing.LAST}, or train on with more --epochs"
            )

    def mend_folder(self) -> None:
        """Put what is damaged aside, so that it takes nobody's place; write again what was lost."""
        for path, _ in self.damaged:
            path.rename(path.with_name(path.name + ".damaged"))
        if self.epoch_start is not None:
            files.link(self.epoch_start, self.folder / checkpointing.EPOCH_START)
        self._write_best()

    def rewind(self) -> None:
        """Make the checkpoint from which the current epoch began the last one.

        Raises:
            UserError: it is missing or damaged.
        """
        start = self.folder / checkpointing.EPOCH_START
        trouble = "missing" if not start.is_file() else "damaged" if seal.is_whole(start) is False else ""
        if trouble:
            raise UserError(
                f"{start}: {trouble}, so the run cannot go back; the same command goes on from its last checkpoint"
            )
        files.link(start, self.folder / checkpointing.LAST)


def _begins_an_epoch(progress: Mapping[str, Any]) -> bool:
    return progress["update"] == 0 and progress["trained"] is None


def _weights_after(progress: Mapping[str, Any]) -> Optional[int]:
    """The epoch, counted from 0, at whose end the weights of a checkpoint are; None inside an epoch."""
    if progress["trained"] is not None:  # not evaluated yet
        return progress["epoch"]
    return progress["epoch"] - 1 if _begins_an_epoch(progress) else None
