"""A run from its first or last saved update to its end: start, resume, roll back, stop, finish."""

import time
from pathlib import Path
from typing import Any, List, Mapping, Tuple

import torch
from torch import nn

from tnt_timm.checkpoints import run_folder
from tnt_timm.checkpoints.restorer import Changes, Restorer
from tnt_timm.errors import Stopped, UserError
from tnt_timm.tracking.trackers import Tracker, open_trackers
from tnt_timm.training import resume_changes
from tnt_timm.training.trainer import NotFinite, Trainer

MAX_ROLLBACKS = 3  # times that a run may go back to the start of an epoch


class TrainingRun:
    """One training run: what happens around the epochs of its trainer."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.config = trainer.config
        self.parts = trainer.parts
        self.world = trainer.world
        self.stop = trainer.stop
        self.saver = trainer.saver
        self.folder = trainer.saver.folder
        self.log = trainer.report.line
        self.restorer = Restorer(self.config, self.parts, self.folder, self.log)
        self.trackers: List[Tracker] = []  # on the main process

    def train(self) -> None:
        """Train to the end.

        Raises:
            UserError: something that the user can fix; the checkpoints are intact.
            Stopped: the run was asked to stop; the message says what is saved.
        """
        metric, epochs = self.config.run.eval_metric, self.parts.pace.epochs
        fresh = not self.resume()
        progress = self.trainer.progress
        self.world.on_main(lambda: run_folder.write_summary(self.folder / "summary.csv", progress.rows))
        if progress.epoch >= epochs:
            if self.restorer.from_elsewhere:
                self.save_start([])
            self.log(f"already finished: {progress.epoch} epochs, best {metric} {progress.best:.3f}")
            self.world.on_main(self.send_missing_rows)
            return
        self.world.on_main(self.saver.check_space)
        self.world.on_main(self.open_logs)
        exit_code, start = 1, time.perf_counter()
        try:
            with self.stop.ending_at_once():
                self.settle_gradient_layout()
            if fresh:
                self.save_start([(0, 0.0, 0.0)] * self.world.size)
            elif self.restorer.from_elsewhere:
                self.save_start(self.trainer.progress.meters)
            while self.trainer.progress.epoch < epochs:
                self.run_epoch()
            self.saver.finish()
            exit_code = 0
        except Stopped as stopped:
            self.saver.finish_alone()
            if self.stop.impatient:
                raise Stopped(stopped.number, self.trainer.saved) from None
            raise
        finally:
            trouble = self.saver.writer.wait()
            if trouble is not None:
                self.log(f"warning: {trouble}")
            for tracker in self.trackers:
                tracker.finish(exit_code, wait=not self.stop.impatient)
        wait_s = self.trainer.save_wait_s
        share = 100 * wait_s / (time.perf_counter() - start)
        self.log(f"saved {self.trainer.saves} times, for which training waited {wait_s:.2f} s ({share:.1f} %)")
        self.log(f"done: best {metric} {self.trainer.progress.best:.3f}, in {self.folder}")

    def run_epoch(self) -> None:
        """Train and evaluate an epoch, or the rest of it; roll back if something is not finite."""
        start = time.perf_counter()
        try:
            if self.trainer.progress.trained is None:
                self.trainer.train_epoch()
            with self.stop.ending_at_once():  # nothing is lost: the epoch's training is saved
                found = self.trainer.evaluate_epoch()
            row = self.trainer.finish_epoch(found, start)
        except NotFinite as trouble:
            self.roll_back(trouble)
        else:
            for tracker in self.trackers:
                tracker.log(row)

    # ---------------------------------------------------------------- start and resume

    def resume(self) -> bool:
        """Continue from the newest intact checkpoint. Return False if there is none.

        Raises:
            UserError: it belongs to another run, or the ranks do not see the same one.
        """
        with self.world.together():
            found = self.restorer.restore(self.compare)
        if not self.world.same(found and (found.epoch, found.update, found.updates, found.best)):
            raise UserError(
                f"output: {self.folder}: the ranks do not see the same checkpoint there; "
                f"choose an --output that all machines share",
                everywhere=True,
            )
        if found is None:
            return False
        self.world.on_main(self.restorer.repair_folder)
        self.trainer.progress, self.trainer.saved = found, found.place
        self.saver.updates_on_disk = found.updates
        return True

    def compare(self, path: Path, state: Mapping[str, Any]) -> Changes:
        """Return what changed since a checkpoint; raise UserError for what must not change."""
        return resume_changes.compare(path, state, self.config, self.parts, self.world)

    def save_start(self, meters: List[Tuple[int, float, float]]) -> None:
        """Save the starting point, which also proves, before any work, that saving works.

        Args:
            meters: each rank's training figures of the current epoch.

        Raises:
            UserError: saving fails, or the weights are not finite.
        """
        try:
            self.trainer.save(meters)
        except NotFinite:
            raise UserError("the starting weights are not finite; start from others", everywhere=True) from None
        self.saver.finish()

    def settle_gradient_layout(self) -> None:
        """With several ranks, run one backward pass before the first step, so that every start sums gradients alike.

        DDP lays gradients out in one order for its first pass and in another from then on. The layout decides in which order
        the ranks' parts are summed, so a resumed run would otherwise differ in the last bits from one that never stopped.
        """
        if self.world.size == 1:
            return
        parts = self.parts
        buffers = {name: buffer.clone() for name, buffer in parts.model.named_buffers()}
        images = torch.zeros(self.config.data.batch_size, *parts.preprocessing["input_size"], device=self.world.device)
        targets = torch.zeros(len(images), dtype=torch.long, device=self.world.device)
        if parts.train_loader.mixup is not None:
            targets = nn.functional.one_hot(targets, parts.model_kwargs["num_classes"]).float()
        parts.train_mode()
        parts.task(images, targets)["loss"].backward()
        parts.optimizer.zero_grad(set_to_none=True)
        for name, buffer in parts.model.named_buffers():
            buffer.copy_(buffers[name])

    def open_logs(self) -> None:
        run_folder.describe(self.folder, self.config, self.parts.classes, self.world.device, self.world.size)
        self.trackers = open_trackers(self.config, self.folder, self.trainer.progress.rows, self.log)

    def send_missing_rows(self) -> None:
        """Send the trackers the rows of a finished run that earlier starts could not send."""
        for tracker in open_trackers(self.config, self.folder, self.trainer.progress.rows, self.log, is_over=True):
            tracker.finish(0)

    # ---------------------------------------------------------------- roll back

    def roll_back(self, trouble: NotFinite) -> None:
        """Return to the start of the epoch, and continue from there with other random numbers.

        Raises:
            UserError: the run did so too often.
        """
        self.world.on_main(self.saver.warn_of_failure)
        self.world.on_main(self.restorer.roll_back)
        rollbacks = self.trainer.progress.rollbacks + 1
        if rollbacks > MAX_ROLLBACKS:
            raise UserError(
                f"{trouble}; the run rolled back to the start of an epoch {MAX_ROLLBACKS} times and failed again; "
                f"the checkpoints are intact; try a lower --lr, --clip-grad 1, or --amp-dtype bfloat16",
                everywhere=True,
            )
        self.log(f"warning: {trouble}; rolling back to the start of the epoch ({rollbacks} of at most {MAX_ROLLBACKS})")
        self.resume()
        self.trainer.progress.rollbacks = rollbacks
        self.trainer.progress.left_out = []  # the previous epoch may have ended in skipped updates
