"""Keeps a run: writes its checkpoints beside the loop, and finds the way back to the newest good one.

Two generations of the state to continue from are kept, last.pth.tar and previous.pth.tar; a new one takes the place of the
last only when it has been written, read back and found whole.
"""

import shutil
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch.nn.utils import get_total_norm

from tnt_timm.data.datasets import check_same_classes
from tnt_timm.errors import UserError
from tnt_timm.export.folder import write_model_folder
from tnt_timm.training import checkpointing, provenance, run_folder
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
        if self.best is not None:
            checkpointing.write(self.folder / checkpointing.BEST, self.best)
            weights = checkpointing.weights_of(self.best)
            preprocessing = self.parts.preprocessing
            write_model_folder(self.folder, self.parts.model, weights, self.parts.classes, preprocessing)
            self.best = None
        checkpointing.write(self.folder / checkpointing.LAST, state, keep_as=self.folder / checkpointing.PREVIOUS)
        write_summary(self.folder / "summary.csv", state["progress"]["rows"])

    def finish(self) -> None:
        """Until all is on the disk.

        Raises:
            UserError: it cannot be written.
        """
        with self.world.together():
            self.finish_alone()

    def finish_alone(self) -> None:
        """The same on this process, whatever the others do."""
        self.writer.wait()
        trouble = self.writer.take_trouble()
        if trouble is not None:
            raise trouble

    def tell_trouble(self) -> None:
        self.writer.wait()
        trouble = self.writer.take_trouble()
        if trouble is not None:
            self.say(f"WARNING: {trouble}; the run goes on and will try again at its next checkpoint")

    def check_space(self) -> None:
        """Raises UserError when the folder's disk has no room for the run's checkpoints."""
        tensors = [*self.parts.model.state_dict().values()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # last, previous and the next one with weights, EMA and two moments; best twice, with EMA, and as safetensors
        averaged = self.parts.ema is not None
        need = weights * (3 * (3 + averaged) + 2 * (1 + averaged) + 2)
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
        for change in run_folder.changes(path, state, self.config, self.world.size):
            self.say(f"notice: the run goes on with a changed setting: {change}")
        check_same_classes(state["classes"], self.parts.classes, str(path), "the data")
        checkpointing.load_weights(self.parts.model, state["state_dict"], str(path))
        if self.parts.ema is not None:
            checkpointing.load_weights(self.parts.ema.module, state["state_dict_ema"], str(path))
        self._load_optimizer(state["optimizer"])
        if self.parts.scaler.is_enabled() and state["amp_scaler"]:
            self.parts.scaler.load_state_dict(state["amp_scaler"])
        progress = Progress.from_dict(state["progress"], self.parts.pace.global_batch)
        inside = f", {progress.update} updates of the next one" if progress.update else ""
        self.say(f"continuing from {path}: {progress.epoch} of {self.parts.pace.epochs} epochs are done{inside}")
        return progress

    def _load_optimizer(self, state: Dict[str, Any]) -> None:
        """The moments of the checkpoint, with the hyper-parameters of the config, which may have been changed."""
        groups = self.parts.optimizer.param_groups
        wanted = [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in groups]
        self.parts.optimizer.load_state_dict(state)
        for group, settings in zip(self.parts.optimizer.param_groups, wanted):
            group.update(settings)

    def put_damaged_aside(self) -> None:
        """So that the next checkpoint does not take the place of a whole one and leave the damaged one."""
        for path, _ in self.damaged:
            path.rename(path.with_name(path.name + ".damaged"))

    def discard_last(self) -> None:
        """Leave only the checkpoint before the newest one."""
        (self.folder / checkpointing.LAST).unlink(missing_ok=True)
