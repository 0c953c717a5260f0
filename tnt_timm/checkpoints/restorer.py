"""Resume a run from its newest intact checkpoint, and repair its folder."""

import contextlib
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from tnt_timm import atomic_files
from tnt_timm.checkpoints import checksum, file_format, resume_file, run_folder
from tnt_timm.checkpoints.progress import Progress
from tnt_timm.checkpoints.saver import TrainState, best_checkpoint, write_best
from tnt_timm.data.datasets import check_same_classes
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.settings.schema import TrainConfig

# Settings of the optimizer that may change when a run resumes. The rest of its groups is its own state.
HYPER_PARAMETERS = ("initial_lr", "weight_decay", "betas", "momentum", "eps")


class Changes(NamedTuple):
    """What differs between a checkpoint and the run that resumes from it."""

    notices: List[str]  # for the log
    evaluation: str = ""  # what changed about the evaluation, so that its results cannot be compared


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
        self.from_elsewhere = False  # the checkpoint is not in the run's folder
        self.best: Optional[Dict[str, Any]] = None

    def restore(self, compare: Callable[[Path, Mapping[str, Any]], Changes]) -> Optional[Progress]:
        """Load the newest intact checkpoint: the run's own, else the one that `resume` names. Nothing is written.

        Args:
            compare: returns what differs between a checkpoint and the run. Raises UserError if it must not differ.

        Returns:
            The progress to resume from, or None if there is no checkpoint.

        Raises:
            UserError: it is another run's checkpoint, or all of them are damaged.
        """
        path, saved = self._newest()
        if path is None:
            return None
        check_same_classes(saved["classes"], self.state.classes, str(path), "the data")
        changes = compare(path, saved)
        for notice in changes.notices:
            self.say(f"notice: {notice}")
        file_format.load_weights(self.state.model, saved["state_dict"], str(path))
        if self.state.ema is not None:
            file_format.load_weights(self.state.ema.module, saved["state_dict_ema"], str(path))
        self._load_optimizer(saved["optimizer"])
        if self.state.scaler.is_enabled() and saved["amp_scaler"]:
            self.state.scaler.load_state_dict(saved["amp_scaler"])
        self.from_elsewhere = path.parent != self.folder
        self.state.resumed_from = self._origin(path, saved)
        self.epoch_start = path if _as_saved(saved).begins_epoch or not self._has_start_of(saved) else None
        progress = Progress.from_dict(saved["progress"], self.state.pace.global_batch)
        if progress.best is not None and changes.evaluation:
            self.say(
                f"notice: {changes.evaluation}, so the best {self.config.run.eval_metric} so far ({progress.best:.3f}) "
                f"does not count any more"
            )
            progress.best, progress.best_since = None, progress.epoch
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
            return self._obey_resume(path, saved)
        if errors:
            raise next(iter(errors.values()))
        return None, {}

    def _obey_resume(self, path: Path, saved: Dict[str, Any]) -> Tuple[Path, Dict[str, Any]]:
        """Return the file that `resume` names, if there is one to obey, else the folder's own checkpoint."""
        if not self.config.run.resume or path.parent != self.folder:
            return path, saved
        named = run_folder.resume_path(self.config)
        if named.parent.resolve() == self.folder.resolve() and (named in self.damaged or not named.is_file()):
            return path, saved  # the folder's own, of which a kill or damage left an older one
        if resume_file.replaces(named, path, saved):
            saved = file_format.read(named)
            _check_training_state(named, saved)
            return named, saved
        if resume_file.has_changed(named, saved):
            changed = f"{named}: has changed since the run in {self.folder} started from it"
            if saved["progress"]["epoch"] >= self.state.pace.epochs:
                raise ConfigError(f"resume: {changed}, and that run is finished; choose another --experiment")
            self.say(f"warning: {changed}; continuing that run")
        return path, saved

    def _origin(self, path: Path, saved: Mapping[str, Any]) -> Optional[Dict[str, str]]:
        """Return what the run was resumed from, if from a file of another folder."""
        if self.from_elsewhere:
            return resume_file.origin_of(path)
        named = run_folder.resume_path(self.config)
        if self.config.run.resume and named.is_file():
            origin = resume_file.origin_of(named)
            if origin["content"] == resume_file.origin_of(path)["content"]:  # its copy, before the first save
                return origin
        return saved.get(resume_file.RESUMED_FROM) or self.state.resumed_from

    def _has_start_of(self, saved: Mapping[str, Any]) -> bool:
        """Return whether the folder has the start of a checkpoint's epoch."""
        start = self.folder / file_format.EPOCH_START
        if not self.from_elsewhere:
            return start.is_file()
        if resume_file.RESCUED_FROM in saved:
            with contextlib.suppress(UserError):
                return file_format.read(start)["progress"]["epoch"] == saved["progress"]["epoch"]
        return False

    def _load_optimizer(self, saved: Dict[str, Any]) -> None:
        """Load the optimizer's state, but keep the hyper-parameters of the config, which may have changed."""
        groups = self.state.optimizer.param_groups
        configured = [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in groups]
        self.state.optimizer.load_state_dict(saved)
        for group, settings in zip(self.state.optimizer.param_groups, configured):
            group.update(settings)

    def _check_best(self, progress: Progress, resumed: Path) -> None:
        """If model_best.pth.tar is missing, damaged or too old, find a checkpoint of the best epoch to restore it from.

        If there is none, forget the best accuracy, so that the best of the remaining epochs replaces it.
        """
        path, metric = self.folder / file_format.BEST, self.config.run.eval_metric
        prefix = "eval_" if self.state.ema is None else "eval_ema_"
        rows = (row for row in progress.rows if row["epoch"] >= progress.best_since)
        row = next(row for row in rows if row[prefix + metric] == progress.best)
        try:
            if file_format.read(path).get("epoch", 0) > row["epoch"]:
                return
            problem = "too old"  # the newer one could not be saved
        except UserError:
            problem = "damaged" if path.exists() else "missing"
        if problem == "damaged":
            self.damaged.append(path)
        lost = f"{path}: {problem}; it held epoch {row['epoch'] + 1} ({metric} {progress.best:.3f})"
        if problem == "too old":
            lost = f"{path}: {problem}; the best epoch is {row['epoch'] + 1} ({metric} {progress.best:.3f})"
        metrics = {key: row[prefix + key] for key in ("top1", "top5", "loss")}
        metrics["num_images"] = self.state.num_eval_images
        for source in (
            resumed,
            resumed.with_name(file_format.BEST),
            *map(self.folder.joinpath, file_format.TO_CONTINUE),
        ):
            with contextlib.suppress(UserError):
                saved = file_format.read(source)
                if _weights_epoch(saved) == row["epoch"]:
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
            atomic_files.link(self.epoch_start, self.folder / file_format.EPOCH_START)
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
        atomic_files.link(start, self.folder / file_format.LAST)


def _as_saved(saved: Mapping[str, Any]) -> Progress:
    """Return a checkpoint's progress, in updates of the size that it was saved with."""
    return Progress.from_dict(saved["progress"], saved["progress"]["global_batch"])


def _weights_epoch(saved: Mapping[str, Any]) -> Optional[int]:
    """Return the epoch, from 0, at whose end a checkpoint's weights are; None inside an epoch."""
    return _as_saved(saved).weights_epoch if "progress" in saved else saved["epoch"] - 1


def _check_training_state(path: Path, saved: Mapping[str, Any]) -> None:
    types = dict(progress=dict, optimizer=dict, amp_scaler=dict, state_dict=dict, config=dict, world_size=int)
    if any(not isinstance(saved.get(key), kind) for key, kind in types.items()) or "epoch" not in saved["progress"]:
        raise UserError(f"{path}: holds weights but no training state; to start from them pass --initial-checkpoint")
