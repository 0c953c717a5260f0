"""The loop: the only place that knows the order in which things happen.

The life of a step: set lr; loss of the micro-batches, gradients synchronised at the last; unscale; clip; check that all is
finite; step; EMA; log; save where it is due. The life of an epoch: train, save, evaluate, save.
"""

import contextlib
import math
import signal
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.nn.utils import get_total_norm

from tnt_timm.checkpoints import run_folder
from tnt_timm.checkpoints.progress import Progress
from tnt_timm.checkpoints.saver import Saver
from tnt_timm.data.loader import TrainingBatch
from tnt_timm.errors import UserError
from tnt_timm.evaluation.accuracy import Accuracy, evaluate
from tnt_timm.runtime.distributed import World
from tnt_timm.runtime.stopping import Stopped, StopRequest
from tnt_timm.runtime.watchdog import Watchdog
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.tracking.trackers import Tracker, open_trackers
from tnt_timm.training import resume_changes
from tnt_timm.training.build import Parts
from tnt_timm.training.reporting import EpochMeter, Reporter

MAX_LEFT_OUT, WINDOW = 20, 100  # of the last so many updates; by then fp16's scale has shrunk a million times
MAX_ROLLBACKS = 3  # times that a run may go back to where its epoch began


class NotFinite(Exception):
    """Weights or steps went bad beyond what leaving out steps can mend; raised on every process alike."""


class Trainer:
    """One training run, from its first or its last saved step to its end.

    Args:
        config: of the run.
        parts: from `build`.
        world: this process among all.
        folder: the run's folder, writable.
        stop: notes when somebody asks this process to stop.
        watchdog: is told of each step.
    """

    def __init__(
        self, config: TrainConfig, parts: Parts, world: World, folder: Path, stop: StopRequest, watchdog: Watchdog
    ):
        self.config = config
        self.parts = parts
        self.world = world
        self.folder = folder
        self.stop = stop
        self.report = Reporter(config, world, parts.pace.epochs, parts.pace.updates_per_epoch)
        self.saver = Saver(config, parts, world, folder, self.report.line)
        self.watchdog = watchdog
        self.trackers: List[Tracker] = []  # on the main process
        self.progress = Progress(global_batch=parts.pace.global_batch)
        self.saved = self.progress.place  # of the latest checkpoint
        self.warm = False  # the first step, which may compile, is behind
        self.saves, self.stall_s = 0, 0.0  # of this process: how often it saved, and how long the loop waited for that

    # ---------------------------------------------------------------- the run

    def run(self) -> None:
        """Train to the end.

        Raises:
            UserError: something that the user can mend; the checkpoints are intact.
            Stopped: somebody asked for it; it says what is saved.
        """
        fresh = not self.continue_from_checkpoint()
        self.world.on_main(self.write_summary)
        if self.progress.epoch >= self.parts.pace.epochs:
            self.report.line(
                f"already finished: {self.progress.epoch} epochs, best {self.config.run.eval_metric} {self.progress.best:.3f}"
            )
            self.world.on_main(self.send_rest)
            return
        self.world.on_main(self.saver.check_space)
        self.world.on_main(self.open_logs)
        exit_code, start = 1, time.perf_counter()
        try:
            with self.stop.ending_at_once():
                self.settle_order_of_sums()
            if fresh:
                self.save_start()
            while self.progress.epoch < self.parts.pace.epochs:
                self.run_epoch()
            self.saver.finish()
            exit_code = 0
        except Stopped as stopped:
            self.saver.finish_alone()
            if self.stop.impatient:
                raise Stopped(stopped.number, self.saved) from None
            raise
        finally:
            trouble = self.saver.writer.wait()
            if trouble is not None:
                self.report.line(f"WARNING: {trouble}")
            for tracker in self.trackers:
                tracker.finish(exit_code, wait=not self.stop.impatient)
        share = 100 * self.stall_s / (time.perf_counter() - start)
        self.report.line(f"saved {self.saves} times, for which training waited {self.stall_s:.2f} s ({share:.1f} %)")
        self.report.line(f"done: best {self.config.run.eval_metric} {self.progress.best:.3f}, in {self.folder}")

    def run_epoch(self) -> None:
        """Train an epoch, or what is left of it, and evaluate it; on trouble go back instead."""
        start = time.perf_counter()
        try:
            if self.progress.trained is None:
                self.train_epoch()
            with self.stop.ending_at_once():  # all is saved
                found = self.evaluate_epoch()
            self.finish_epoch(found, start)
        except NotFinite as trouble:
            self.roll_back(trouble)

    def settle_order_of_sums(self) -> None:
        """Let several processes have one backward pass before the first step, so that every start adds gradients alike.

        DDP lays them out in one order for its first pass and in another from then on, and where a gradient lies decides
        in which order the processes' parts of it are added: a run that goes on would differ from one that never stopped.
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
        self.trackers = open_trackers(self.config, self.folder, self.progress.rows, self.report.line)

    def send_rest(self) -> None:
        """Send the trackers the rows of this finished run that earlier starts could not send."""
        for tracker in open_trackers(self.config, self.folder, self.progress.rows, self.report.line, is_over=True):
            tracker.finish(0)

    def write_summary(self) -> None:
        run_folder.write_summary(self.folder / "summary.csv", self.progress.rows)

    def train_epoch(self) -> None:
        """The rest of the current epoch, and a checkpoint of it, so that trouble in evaluation costs no training."""
        progress = self.progress
        self.parts.scheduler.step(progress.epoch)
        self.parts.train_mode()
        if self.parts.train_loader.mixup is not None:
            off = self.config.augmentation.mixup_off_epoch
            self.parts.train_loader.mixup.mixup_enabled = not off or progress.epoch < off
        meter = EpochMeter(self.world.device, self.world.size, progress.meter_of(self.world.rank, self.world.size))
        first_batch = progress.update * self.config.optimizer.grad_accum_steps
        batches = self.parts.train_loader.epoch(progress.epoch, first_batch, progress.rollbacks)
        self.report.start_epoch(progress.epoch, progress.update)
        try:
            while progress.update < self.parts.pace.updates_per_epoch:
                wishes = self.train_step(batches, meter)
                self.report.update(progress.epoch, progress.update, meter, self.lr)
                self.watchdog.feed()
                if wishes["stop"] or wishes["save"]:
                    self.save(self.world.gather(meter.state()))
                if wishes["stop"]:
                    self.saver.finish()
                    raise Stopped(self.stop.signal or signal.SIGTERM)  # or another process was asked to
        finally:
            self.report.close_bar()
            batches.close()
        self.count_damage()
        progress.trained = meter.reduced(self.world)
        progress.update = 0
        self.save([])

    # --------------------------------------------------------------- the step

    def train_step(self, batches: Iterator[TrainingBatch], meter: EpochMeter) -> Dict[str, bool]:
        """One update. Returns what the processes agreed on: whether all is "finite", to "stop", to "save"."""
        parts, progress, micro_batches = self.parts, self.progress, self.config.optimizer.grad_accum_steps
        # 1. learning rate (counted in updates of this size, if earlier ones had another)
        parts.scheduler.step_update(progress.epoch * parts.pace.updates_per_epoch + progress.update)
        # 2. forward and backward over the micro-batches (the first one may compile for minutes, with nothing to lose)
        total_loss = torch.zeros((), device=self.world.device)
        with contextlib.nullcontext() if self.warm else self.stop.ending_at_once():
            for micro in range(micro_batches):
                batch = self.next_batch(batches, meter)
                with parts.task.no_sync() if micro < micro_batches - 1 else contextlib.nullcontext():
                    result = parts.task(batch.images, batch.targets)  # the networks under autocast, the loss in float32
                    parts.scaler.scale(result["loss"] / micro_batches).backward()
                loss = result["loss"].detach()
                total_loss += loss / micro_batches
                meter.add(loss, result["output"].detach(), batch.targets)
        self.warm = True
        # 3. unscale and clip
        parts.scaler.unscale_(parts.optimizer)
        grads = [parameter.grad for parameter in parts.model.parameters() if parameter.grad is not None]
        norm = get_total_norm(grads)
        clip, mode = self.config.optimizer.clip_grad, self.config.optimizer.clip_mode
        if clip is not None:
            dispatch_clip_grad(_clipped(parts.model, mode), clip, mode)
        # 4. nothing that is not finite reaches the weights; the processes agree on that, and on what comes after the step
        agreed = self.agree(total_loss, norm)
        meter.end_update(agreed["finite"])
        # 5. step (where fp16 gradients overflowed, leave it out; the scaler then shrinks its scale)
        if agreed["finite"]:
            parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        progress.update += 1
        progress.updates += 1
        # 6. averaged weights
        if parts.ema is not None and agreed["finite"]:
            parts.ema.update(parts.model, step=progress.updates if parts.ema.use_warmup else None)
        # 7. too many steps left out are trouble
        if not agreed["finite"]:
            self.count_left_out(total_loss, norm)
        return agreed

    def next_batch(self, batches: Iterator[TrainingBatch], meter: EpochMeter) -> TrainingBatch:
        batch = next(batches)
        meter.wait_s += batch.wait_s
        self.report.note_damage(batch.damaged)
        return batch

    def agree(self, loss: torch.Tensor, norm: torch.Tensor) -> Dict[str, bool]:
        """What all processes do next: step if every one is finite, stop or save if one of them wishes to."""
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        others = [not self.stop, not self.saver.is_due(self.progress.update + 1)]
        flags = torch.cat([finite.reshape(1), torch.tensor(others, device=finite.device)])
        finite_everywhere, nobody_stops, nobody_saves = self.world.all_true(flags)  # sync
        return {"finite": finite_everywhere, "stop": not nobody_stops, "save": not nobody_saves}

    def count_left_out(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Count an update that was left out, among the last ones; in a row or with good ones between them.

        Raises:
            NotFinite: too many.
        """
        now, before = self.progress.updates, self.progress.left_out
        self.progress.left_out = [number for number in before if number > now - WINDOW] + [now]
        too_many = len(self.progress.left_out) >= MAX_LEFT_OUT
        if self.parts.scaler.is_enabled() and not too_many:
            return  # fp16's scale is searched for this way
        what = (
            f"loss or gradient is not finite (loss {loss.item():.4g}, gradient norm {norm.item():.4g}) "
            f"at epoch {self.progress.epoch + 1}, update {self.progress.update}, lr {self.lr:.3g}"
        )
        if now - 1 not in before:
            self.report.line(f"warning: {what}; the update was left out")
        if too_many:
            raise NotFinite(f"{what}, as for {MAX_LEFT_OUT} of the last {WINDOW} updates")

    @property
    def lr(self) -> float:
        """The largest of the parameter groups' (layer decay gives the others a part of it)."""
        return max(group["lr"] for group in self.parts.optimizer.param_groups)

    # ------------------------------------------------- evaluation and the rest

    def evaluate_epoch(self) -> Dict[str, Accuracy]:
        """Accuracy of the raw and the averaged weights; uncompiled, so that validate.py finds the same digits.

        Raises:
            NotFinite: a loss is not finite.
        """
        models = {"raw": self.parts.model}
        if self.parts.ema is not None:
            models["ema"] = self.parts.ema.module
        for model in models.values():
            self.world.share_buffers(model)

        def after_a_batch(done: int, total: int) -> None:
            self.report.evaluated(done, total)
            self.watchdog.feed()
            self.stop.obey()

        try:
            found = evaluate(models, self.parts.eval_loader, self.world, self.parts.autocast, after_a_batch)
        finally:
            self.report.close_bar()
        for name, accuracy in found.items():
            if not math.isfinite(accuracy.loss):
                epoch = self.progress.epoch + 1
                raise NotFinite(
                    f"the {name} weights' validation loss is not finite ({accuracy.loss}) after epoch {epoch}"
                )
        return found

    def finish_epoch(self, found: Dict[str, Accuracy], start: float) -> None:
        """Record an evaluated epoch: row, best, checkpoints, log."""
        progress = self.progress
        raw, selected = found["raw"], found.get("ema", found["raw"])
        row = {"epoch": progress.epoch, "train_loss": progress.trained["loss"]}
        row |= {"eval_loss": raw.loss, "eval_top1": raw.top1, "eval_top5": raw.top5}
        if "ema" in found:
            row |= {"eval_ema_loss": selected.loss, "eval_ema_top1": selected.top1, "eval_ema_top5": selected.top5}
        row["lr"] = self.lr
        metric = getattr(selected, self.config.run.eval_metric)
        better = progress.best is None or (
            metric < progress.best if self.config.run.eval_metric == "loss" else metric > progress.best
        )

        trained, progress.trained = progress.trained, None
        progress.rows.append(row)
        progress.epoch += 1
        if better:
            progress.best = metric
        self.save([], vars(selected) if better else None)
        for tracker in self.trackers:
            tracker.log({**row, **{f"train_{key}": trained[key] for key in ("accuracy", "images_per_s", "data_wait")}})
        self.report.end_epoch(row, trained, progress.best, time.perf_counter() - start)

    def count_damage(self) -> None:
        names = set().union(*self.world.gather(set(self.report.damaged)))
        if names:
            self.report.line(f"warning: {len(names)} damaged training images met and replaced so far")

    # ------------------------------------------------------------- checkpoints

    def save(self, meters: List[Tuple[int, float, float]], better: Optional[Mapping[str, float]] = None) -> None:
        """Save the run where it stands; `meters` are the training figures of a part of an epoch, per process.

        Raises:
            NotFinite: the weights are not worth saving.
        """
        start = time.perf_counter()
        if not self.saver.weights_are_finite():
            raise NotFinite(f"the weights are not finite after update {self.progress.updates}")
        self.progress.meters = meters
        self.saver.save(self.progress, better)
        self.saved = self.progress.place
        self.saves += 1
        self.stall_s += time.perf_counter() - start

    def save_start(self) -> None:
        """Save what the run starts from, which also proves, before any work, that saving works.

        Raises:
            UserError: it does not, or the weights are not worth it.
        """
        try:
            self.save([(0, 0.0, 0.0)] * self.world.size)
        except NotFinite:
            raise UserError("the weights that the run would start from are not finite; use others", True) from None
        self.saver.finish()

    def continue_from_checkpoint(self) -> bool:
        """Go on where the newest whole checkpoint stands; False when there is none.

        Raises:
            UserError: it is another run's, or the processes do not see the same one.
        """
        with self.world.together():
            found = self.saver.restore(self.changes)
        if not self.world.same(found and (found.epoch, found.update, found.updates, found.best)):
            raise UserError(
                f"output: {self.folder}: not every process sees the same checkpoint there; "
                f"choose an --output that all machines share",
                everywhere=True,
            )
        if found is None:
            return False
        self.world.on_main(self.saver.mend_folder)
        self.progress, self.saved = found, found.place
        return True

    def changes(self, path: Path, state: Mapping[str, Any]) -> List[str]:
        """What is different from the run in a checkpoint, for the log; raises UserError where it must not be."""
        return resume_changes.notices(path, state, self.config, self.parts, self.world)

    def roll_back(self, trouble: NotFinite) -> None:
        """Go back to where the epoch began, and on from there with other random numbers.

        Raises:
            UserError: the run did so too often.
        """
        self.world.on_main(self.saver.tell_trouble)
        self.world.on_main(self.saver.rewind)
        rollbacks = self.progress.rollbacks + 1
        if rollbacks > MAX_ROLLBACKS:
            raise UserError(
                f"{trouble}; the run went back to where the epoch began {MAX_ROLLBACKS} times and came to this again; "
                f"the checkpoints are intact; try a lower --lr, --clip-grad 1, or --amp-dtype bfloat16",
                everywhere=True,
            )
        self.report.line(f"WARNING: {trouble}; going back, {rollbacks} of at most {MAX_ROLLBACKS} times")
        self.continue_from_checkpoint()
        self.progress.rollbacks, self.progress.left_out = rollbacks, []  # the last epoch may have ended in bad steps


def _clipped(model: nn.Module, mode: str) -> List[nn.Parameter]:
    """The parameters whose gradients are clipped: all, or for adaptive clipping all but the head's (or both heads')."""
    heads = model.get_classifier() if mode == "agc" else ()
    heads = heads if isinstance(heads, tuple) else (heads,)
    left_alone = {id(parameter) for head in heads for parameter in head.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in left_alone]
