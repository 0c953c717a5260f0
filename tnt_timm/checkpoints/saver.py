"""Save the checkpoints of a run in the background.

A new last.pth.tar replaces the old one only after it was written and read back; the old one becomes previous.pth.tar. A run
whose numbers are not finite rolls back to epoch_start.pth.tar, because its last checkpoint depends on clock and interruptions.
"""

import contextlib
import shlex
import shutil
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import get_total_norm

from tnt_timm import atomic_files
from tnt_timm.checkpoints import file_format, run_folder
from tnt_timm.checkpoints.background_writer import BackgroundWriter, copied
from tnt_timm.checkpoints.progress import Pace, Progress
from tnt_timm.checkpoints.resume_file import RESCUED_FROM, RESUMED_FROM
from tnt_timm.errors import UserError, one_line
from tnt_timm.export.folder import architecture_name, write_model_folder
from tnt_timm.runtime import provenance
from tnt_timm.runtime.distributed import World
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig

ONLY_TO_RESUME = ("progress", "optimizer", "amp_scaler", RESUMED_FROM)  # keys that model_best.pth.tar does not have


@dataclass
class TrainState:
    """What checkpoints contain of a run, besides its progress."""

    model: nn.Module  # as created
    model_kwargs: Dict[str, Any]  # recreate it: timm.create_model(arch, **model_kwargs)
    ema: Optional[ModelEmaV3]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    classes: Optional[List[str]]
    preprocessing: Dict[str, Any]
    pace: Pace
    num_eval_images: int
    data: Dict[str, Dict[str, Any]]  # `identity_of` the "train" and the "validation" set
    resumed_from: Optional[Dict[str, str]]  # `origin_of` the file that `resume` named


class Saver:
    """The checkpoints of one run.

    Args:
        config: of the run.
        state: what is saved.
        world: this rank and the number of ranks; rank 0 writes.
        folder: the run's folder.
        say: prints a line of the log.
    """

    def __init__(self, config: TrainConfig, state: TrainState, world: World, folder: Path, say: Callable[[str], None]):
        self.config = config
        self.state = state
        self.world = world
        self.folder = folder
        self.say = say
        self.writer = BackgroundWriter()
        self.best: Optional[Dict[str, Any]] = None  # the best weights, if they are not on disk yet
        self.unsaved: Optional[Dict[str, Any]] = None  # the state that is being written, or whose write failed
        self.updates_on_disk = 0  # finished updates that the newest checkpoint holds
        self.saved_at_s = time.monotonic()

    def is_due(self, update: int) -> bool:
        """Return whether to save inside an epoch. Rank 0's clock decides."""
        run = self.config.run
        if run.recovery_interval and update % run.recovery_interval == 0:
            return True
        minutes = (time.monotonic() - self.saved_at_s) / 60
        return self.world.is_main and 0 < run.recovery_minutes <= minutes

    def weights_are_finite(self) -> bool:
        """Return whether everything to save is finite, including buffers and EMA. Rank 0 decides: buffers differ."""
        models = [self.state.model] if self.state.ema is None else [self.state.model, self.state.ema.module]
        tensors = [value for model in models for value in model.state_dict().values() if value.is_floating_point()]
        finite = torch.isfinite(get_total_norm(tensors)).reshape(1)
        return self.world.all_true(finite if self.world.is_main else torch.ones_like(finite))[0]  # sync

    def save(self, progress: Progress, better: Optional[Mapping[str, float]] = None) -> None:
        """Save the state to resume from and, if its weights are the best so far, the weights with their accuracy `better`.

        Raises:
            UserError: this save and the one before failed; raised on every rank. It says where the state is instead.
        """
        self.saved_at_s = time.monotonic()
        with self.world.together():
            if self.world.is_main:
                self._save(progress, better)

    def _save(self, progress: Progress, better: Optional[Mapping[str, float]]) -> None:
        self.warn_of_failure()
        failed = self.unsaved is not None
        self.unsaved = copied(self._contents(progress))
        if better is not None:
            self.best = best_checkpoint(self.unsaved, better, progress.epoch)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # sync: the copies off the device
        self.writer.start(self._write)
        error = self.writer.wait() if failed else None
        if error is not None:
            raise self._saved_elsewhere(error)

    def _contents(self, progress: Progress) -> Dict[str, Any]:
        """Return what a checkpoint contains; its keys are listed in file_format.py."""
        parts = self.state
        contents: Dict[str, Any] = {
            "arch": architecture_name(self.config.network.model, parts.model),
            "model_kwargs": parts.model_kwargs,
            "num_classes": parts.model_kwargs["num_classes"],
            "classes": parts.classes,
            "preprocessing": parts.preprocessing,
            "weights": "raw" if parts.ema is None else "ema",
            "state_dict": parts.model.state_dict(),
            "config": config_module.flat(self.config),
            "data": parts.data,
            RESUMED_FROM: parts.resumed_from,
            "versions": provenance.versions(),
            "world_size": self.world.size,
            "metrics": None,
            "epoch": progress.epoch,
            "progress": asdict(progress),
            "optimizer": parts.optimizer.state_dict(),
            "amp_scaler": parts.scaler.state_dict(),
        }
        if parts.ema is not None:
            contents["state_dict_ema"] = parts.ema.module.state_dict()
        return contents

    def _write(self) -> None:
        state, progress = self.unsaved, Progress(**self.unsaved["progress"])
        if self.best is not None:
            write_best(self.folder, self.best, self.state)
            self.best = None
        last = self.folder / file_format.LAST
        file_format.write(last, state, keep_as=self.folder / file_format.PREVIOUS)
        self.updates_on_disk = progress.updates
        if progress.begins_epoch:
            atomic_files.link(last, self.folder / file_format.EPOCH_START)
        run_folder.write_summary(self.folder / "summary.csv", progress.rows)
        self.unsaved = None

    def finish(self) -> None:
        """Wait until everything is on disk.

        Raises:
            UserError: it cannot be written; raised on every rank.
        """
        with self.world.together():
            self.finish_alone()

    def finish_alone(self) -> None:
        """`finish` on this rank only."""
        if self.writer.wait() is None:
            return
        self.writer.start(self._write)  # a second try
        error = self.writer.wait()
        if error is not None:
            raise self._saved_elsewhere(error)

    def warn_of_failure(self) -> None:
        """Wait for the last save. If it failed, print a warning: training continues."""
        error = self.writer.wait()
        if error is not None:
            self.say(f"warning: {error}; training continues and retries at the next checkpoint")

    def _saved_elsewhere(self, error: UserError) -> UserError:
        """Save what the run folder could not take into the system's folder for temporary files. Return what to tell the user."""
        updates = self.unsaved["progress"]["updates"]
        if not updates:
            return error  # nothing is lost
        if updates <= self.updates_on_disk:
            return UserError(
                f"{error}; the run stops, with all its training saved; make room, then run the same command"
            )
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"tnt-timm-{self.folder.name}-"))
            path = folder / file_format.LAST
            file_format.write(path, {**self.unsaved, RESCUED_FROM: str(self.folder.resolve())})
        except (OSError, UserError) as second:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return UserError(
                f"{error}; the run stops, and the work since its last checkpoint is lost: it cannot be saved elsewhere either: "
                f"{one_line(second)}"
            )
        if self.best is not None:
            with contextlib.suppress(UserError):
                file_format.write(folder / file_format.BEST, self.best)
        return UserError(
            f"{error}; the run stops, and its state is in {path} on {socket.gethostname()}; "
            f"make room, then run the same command with --resume {shlex.quote(str(path))}"
        )

    def check_space(self) -> None:
        """Raise UserError if the disk has no room for the run's checkpoints."""
        weights = sum(tensor.nbytes for tensor in self.state.model.state_dict().values())
        # Weights, EMA and two moments in four files: last, previous, epoch start, and the next one while it is written.
        # Weights and EMA in two: the best, and the next best. Weights in two: model.safetensors, and the next one.
        averaged = self.state.ema is not None
        need = weights * (4 * (3 + averaged) + 2 * (1 + averaged) + 2)
        stats = [path.stat() for path in self.folder.iterdir() if path.is_file()]
        used = sum({stat.st_ino: stat.st_size for stat in stats}.values())  # hard links count once
        free = shutil.disk_usage(self.folder).free + used
        if free < need:
            raise UserError(
                f"output: {self.folder}: {free / 1e9:.2f} GB free, but the run's checkpoints need {need / 1e9:.2f} GB; "
                f"free some space or choose another --output"
            )


def best_checkpoint(state: Mapping[str, Any], metrics: Mapping[str, float], epoch: int) -> Dict[str, Any]:
    """Return the content of model_best.pth.tar: a checkpoint's weights, and their accuracy after `epoch` epochs."""
    kept = {key: value for key, value in state.items() if key not in ONLY_TO_RESUME}
    return {**kept, "metrics": dict(metrics), "epoch": epoch}


def write_best(folder: Path, best: Mapping[str, Any], state: TrainState) -> None:
    """Write model_best.pth.tar, and the same weights for timm."""
    file_format.write(folder / file_format.BEST, best)
    write_model_folder(folder, state.model, file_format.weights_of(best), state.classes, state.preprocessing)
