"""Resume a run from its newest intact checkpoint, and repair its folder."""

import contextlib
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from tnt_timm import files
from tnt_timm.checkpoints import checksum, file_format, run_folder
from tnt_timm.checkpoints.progress import Progress
from tnt_timm.checkpoints.saver import TrainState, best_checkpoint, write_best
from tnt_timm.data.datasets import check_same_classes
from tnt_timm.errors import UserError
from tnt_timm.settings.schema import TrainConfig

# Settings of the optimizer that may change when a run resumes. The rest of its groups is its own state.
HYPER_PARAMETERS = ("initial_lr", "weight_decay", "betas", "momentum", "eps")


class Restorer:
    """Load checkpoints into the parts of a run; arguments as of `Saver`."""

    def __init__(self, config: TrainConfig, state: TrainState, folder: Path, say: Callable[[str], None]):
        self.config = config
        self.state = state
        self.folder = folder
        self.say = say
        # What `repair_folder` has to do: rename damaged files, link the start of the epoch, write lost best weights
        self.damaged: List[Path] = []
        self.epoch_start: Optional[Path] = None
        self.best: Optional[Dict[str, Any]] = None

    def restore(self, changes: Callable[[Path, Mapping[str, Any]], List[str]]) -> Optional[Progress]:
        """Load the newest intact checkpoint: the run's own, else the one that `resume` names. Nothing is written.

        Args:
            changes: returns what differs between a checkpoint and the run, as lines. Raises UserError if it must not differ.

        Returns:
            The progress to resume from, or None if there is no checkpoint.

        Raises:
            UserError: it is another run's checkpoint, or all of them are damaged.
        """
        path, saved = self._newest()
        if path is None:
            return None
        for notice in changes(path, saved):
            self.say(f"notice: {notice}")
        check_same_classes(saved["classes"], self.state.classes, str(path), "the data")
        file_format.load_weights(self.state.model, saved["state_dict"], str(path))
        if self.state.ema is not None:
            file_format.load_weights(self.state.ema.module, saved["state_dict_ema"], str(path))
        self._load_optimizer(saved["optimizer"])
        if self.state.scaler.is_enabled() and saved["amp_scaler"]:
            self.state.scaler.load_state_dict(saved["amp_scaler"])
        start = self.folder / file_format.EPOCH_START
        is_start = _as_saved(saved).begins_epoch or path.parent != self.folder or not start.is_file()
        self.epoch_start = path if is_start else None
        progress = Progress.from_dict(saved["progress"], self.state.pace.global_batch)
        if progress.best is not None:
            self._check_best(progress, path)
        self.say(f"resuming from {path}: {progress.how_far(self.state.pace.epochs)}")
        return progress

    def _newest(self) -> Tuple[Optional[Path], Dict[str, Any]]:
        """Return the newest intact checkpoint and its content; remember the damaged ones."""
        errors: Dict[Path, UserError] = {}
        for path in run_folder.candidates(self.folder, self.config):
            try:
                saved = file_format.read(path)
            except file_format.DamagedError as error:
                errors[path] = error
                continue
            _check_training_state(path, saved)
            for damaged, error in errors.items():
                self.say(f"warning: {error}; resuming from {path.name} instead of {damaged.name}")
            self.damaged = list(errors)
            return path, saved
        if errors:
            raise next(iter(errors.values()))
        return None, {}

    def _load_optimizer(self, saved: Dict[str, Any]) -> None:
        """Load the optimizer's state, but keep the hyper-parameters of the config, which may have changed."""
        groups = self.state.optimizer.param_groups
        configured = [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in groups]
        self.state.optimizer.load_state_dict(saved)
        for group, settings in zip(self.state.optimizer.param_groups, configured):
            group.update(settings)

    def _check_best(self, progress: Progress, resumed: Path) -> None:
        """If model_best.pth.tar is missing or damaged, find a checkpoint of the same epoch to restore it from.

        If there is none, forget the best accuracy, so that the best of the remaining epochs replaces it.
        """
        path = self.folder / file_format.BEST
        try:
            file_format.read(path)
            return
        except UserError:
            problem = "damaged" if path.exists() else "missing"
        if problem == "damaged":
            self.damaged.append(path)
        metric = self.config.run.eval_metric
        prefix = "eval_" if self.state.ema is None else "eval_ema_"
        row = next(row for row in progress.rows if row[prefix + metric] == progress.best)
        lost = f"{path}: {problem}; it held epoch {row['epoch'] + 1} ({metric} {progress.best:.3f})"
        for source in (resumed, *(self.folder / name for name in file_format.TO_CONTINUE)):
            with contextlib.suppress(UserError):
                saved = file_format.read(source)
                if _as_saved(saved).weights_epoch == row["epoch"]:
                    metrics = {key: row[prefix + key] for key in ("top1", "top5", "loss")}
                    metrics["num_images"] = self.state.num_eval_images
                    self.best = best_checkpoint(saved, metrics, row["epoch"] + 1)
                    self.say(f"warning: {lost}; restoring it from {source.name}")
                    return
        if progress.epoch < self.state.pace.epochs:
            progress.best = None
            remedy = "the best of the remaining epochs will replace it"
        else:
            remedy = f"use {file_format.LAST}, or train longer with more --epochs"
        self.say(f"warning: {lost}, and no other checkpoint has these weights; {remedy}")

    def repair_folder(self) -> None:
        """Rename damaged checkpoints to *.damaged, and write again what was missing. Call this on rank 0, after `restore`."""
        for path in self.damaged:
            path.rename(path.with_name(path.name + ".damaged"))
        if self.epoch_start is not None:
            files.link(self.epoch_start, self.folder / file_format.EPOCH_START)
        if self.best is not None:
            write_best(self.folder, self.best, self.state)
        self.best = None

    def roll_back(self) -> None:
        """Make the start of the current epoch the last checkpoint. Call this on rank 0, then `restore` on all.

        Raises:
            UserError: the checkpoint of the start is missing or damaged.
        """
        start = self.folder / file_format.EPOCH_START
        problem = "missing" if not start.is_file() else "damaged" if checksum.is_whole(start) is False else ""
        if problem:
            raise UserError(
                f"{start}: {problem}, so the run cannot roll back; run the same command to resume from its last checkpoint"
            )
        files.link(start, self.folder / file_format.LAST)


def _as_saved(saved: Mapping[str, Any]) -> Progress:
    """Return a checkpoint's progress, in updates of the size that it was saved with."""
    return Progress.from_dict(saved["progress"], saved["progress"]["global_batch"])


def _check_training_state(path: Path, saved: Mapping[str, Any]) -> None:
    types = dict(progress=dict, optimizer=dict, amp_scaler=dict, state_dict=dict, config=dict, world_size=int)
    if any(not isinstance(saved.get(key), kind) for key, kind in types.items()) or "epoch" not in saved["progress"]:
        raise UserError(f"{path}: holds weights but no training state; to start from them pass --initial-checkpoint")
