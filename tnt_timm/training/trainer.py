"""The training loop: the only place that knows the order in which things happen.

An epoch: train, save, evaluate, save. A step: set the learning rate; forward and backward of each micro-batch, gradients
synchronized in the last; unscale; clip; agree on what is finite; step; EMA; log; save where it is due. Everything around the
epochs (start, resume, roll back, stop) is in run.py.
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

from tnt_timm.checkpoints.progress import Progress
from tnt_timm.checkpoints.saver import Saver
from tnt_timm.data.loader import TrainingBatch
from tnt_timm.errors import Stopped
from tnt_timm.evaluation.accuracy import Accuracy, evaluate
from tnt_timm.runtime.distributed import World
from tnt_timm.runtime.hang_watchdog import Watchdog
from tnt_timm.runtime.signals import StopRequest
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.training.build import Parts
from tnt_timm.training.reporting import EpochMeter, Reporter

# This many skipped updates among the last WINDOW are a failure. By then the loss scale of float16 has shrunk a million times.
MAX_SKIPPED, WINDOW = 20, 100


class NotFinite(Exception):
    """The weights, a validation loss or too many updates are not finite. Every rank raises it at the same point."""


class Trainer:
    """Train and evaluate epochs.

    Args:
        config: settings of the run.
        parts: model, data, optimizer and so on, from `build`.
        world: this rank among all.
        folder: the run folder, writable.
        stop: notes the signals that ask the run to stop.
        watchdog: is fed after each update.
        loading_remedy: see `Reporter`.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        world: World,
        folder: Path,
        stop: StopRequest,
        watchdog: Watchdog,
        loading_remedy: str,
    ):
        self.config = config
        self.parts = parts
        self.world = world
        self.stop = stop
        self.watchdog = watchdog
        self.report = Reporter(config, world, parts.pace.epochs, parts.pace.updates_per_epoch, loading_remedy)
        self.saver = Saver(config, parts, world, folder, self.report.line)
        self.progress = Progress(global_batch=parts.pace.global_batch)
        self.saved = self.progress.place  # the place of the latest checkpoint
        self.saves, self.save_wait_s = 0, 0.0  # how often this process saved, and how long the loop waited for that
        self.first_step_done = False

    def train_epoch(self) -> None:
        """Train the rest of the current epoch, and save it so that a failure in evaluation costs no training."""
        parts, progress = self.parts, self.progress
        parts.scheduler.step(progress.epoch)
        parts.train_mode()
        if parts.train_loader.mixup is not None:
            off = self.config.augmentation.mixup_off_epoch
            parts.train_loader.mixup.mixup_enabled = not off or progress.epoch < off
        meter = EpochMeter(self.world.device, self.world.size, progress.meter_of(self.world.rank, self.world.size))
        first_batch = progress.update * self.config.optimizer.grad_accum_steps
        batches = parts.train_loader.epoch(progress.epoch, first_batch, progress.rollbacks)
        self.report.start_epoch(progress.epoch, progress.update)
        try:
            while progress.update < parts.pace.updates_per_epoch:
                agreed = self.train_step(batches, meter)
                self.report.update(progress.epoch, progress.update, meter, self.lr)
                self.watchdog.feed()
                if agreed["stop"] or agreed["save"]:
                    self.save(self.world.gather(meter.state()))
                if agreed["stop"]:
                    self.saver.finish()
                    raise Stopped(self.stop.signal or signal.SIGTERM)  # or another rank was asked to stop
        finally:
            self.report.close_bar()
            batches.close()
        self.report.count_damage()
        progress.trained = meter.reduced(self.world)
        progress.update = 0
        self.save([])

    def train_step(self, batches: Iterator[TrainingBatch], meter: EpochMeter) -> Dict[str, bool]:
        """Make one update. Return what the ranks agreed on: whether it was "finite", to "stop", to "save"."""
        parts, progress, micro_batches = self.parts, self.progress, self.config.optimizer.grad_accum_steps
        # 1. learning rate
        parts.scheduler.step_update(progress.epoch * parts.pace.updates_per_epoch + progress.update)
        # 2. forward and backward (the first step may compile for minutes; a signal then stops it at once, with nothing lost)
        total_loss = torch.zeros((), device=self.world.device)
        with contextlib.nullcontext() if self.first_step_done else self.stop.ending_at_once():
            for micro in range(micro_batches):
                batch = self.next_batch(batches, meter)
                with parts.task.no_sync() if micro < micro_batches - 1 else contextlib.nullcontext():
                    result = parts.task(batch.images, batch.targets)  # networks under autocast, loss in float32
                    parts.scaler.scale(result["loss"] / micro_batches).backward()
                loss = result["loss"].detach()
                total_loss += loss / micro_batches
                meter.add(loss, result["output"].detach(), batch.targets)
        self.first_step_done = True
        # 3. unscale and clip
        parts.scaler.unscale_(parts.optimizer)
        norm = get_total_norm([p.grad for p in parts.model.parameters() if p.grad is not None])
        clip, mode = self.config.optimizer.clip_grad, self.config.optimizer.clip_mode
        if clip is not None:
            dispatch_clip_grad(_clipped_parameters(parts.model, mode), clip, mode)
        # 4. agree: nothing that is not finite on any rank reaches the weights
        agreed = self.agree(total_loss, norm)
        meter.end_update(agreed["finite"])
        # 5. step, or skip it (where float16 gradients overflowed, the scaler then shrinks its scale)
        if agreed["finite"]:
            parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        progress.update += 1
        progress.updates += 1
        # 6. averaged weights
        if parts.ema is not None and agreed["finite"]:
            parts.ema.update(parts.model, step=progress.updates if parts.ema.use_warmup else None)
        # 7. too many skipped updates are a failure
        if not agreed["finite"]:
            self.count_skipped(total_loss, norm)
        return agreed

    def next_batch(self, batches: Iterator[TrainingBatch], meter: EpochMeter) -> TrainingBatch:
        batch = next(batches)
        meter.wait_s += batch.wait_s
        self.report.note_damage(batch.damaged)
        return batch

    def agree(self, loss: torch.Tensor, norm: torch.Tensor) -> Dict[str, bool]:
        """Return what all ranks do next: step if all are finite; stop or save if one of them wants to."""
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        others = [not self.stop, not self.saver.is_due(self.progress.update + 1)]
        flags = torch.cat([finite.reshape(1), torch.tensor(others, device=finite.device)])
        finite_everywhere, nobody_stops, nobody_saves = self.world.all_true(flags)  # sync
        return {"finite": finite_everywhere, "stop": not nobody_stops, "save": not nobody_saves}

    def count_skipped(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Count a skipped update among the last ones, whether in a row or with good ones between them.

        Raises:
            NotFinite: too many were skipped.
        """
        now, before = self.progress.updates, self.progress.left_out
        self.progress.left_out = [number for number in before if number > now - WINDOW] + [now]
        too_many = len(self.progress.left_out) >= MAX_SKIPPED
        if self.parts.scaler.is_enabled() and not too_many:
            return  # this is how the loss scale of float16 is found
        what = (
            f"loss or gradient is not finite (loss {loss.item():.4g}, gradient norm {norm.item():.4g}) "
            f"at epoch {self.progress.epoch + 1}, update {self.progress.update}, lr {self.lr:.3g}"
        )
        if now - 1 not in before:
            self.report.line(f"warning: {what}; the update was skipped")
        if too_many:
            raise NotFinite(f"{what}, like {MAX_SKIPPED} of the last {WINDOW} updates")

    @property
    def lr(self) -> float:
        """The largest learning rate of the parameter groups; layer decay gives the others a fraction of it."""
        return max(group["lr"] for group in self.parts.optimizer.param_groups)

    def evaluate_epoch(self) -> Dict[str, Accuracy]:
        """Return the accuracy of the "raw" and the averaged ("ema") weights, uncompiled as in validate.py.

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
                raise NotFinite(
                    f"the {name} weights' validation loss is not finite ({accuracy.loss}) after epoch {self.progress.epoch + 1}"
                )
        return found

    def finish_epoch(self, found: Dict[str, Accuracy], start: float) -> Dict[str, Any]:
        """Record an evaluated epoch, save, and report it.

        Args:
            found: accuracy of the raw and the averaged weights.
            start: clock at the start of the epoch.

        Returns:
            The epoch's row of summary.csv, and its training figures as train_*, for experiment trackers.
        """
        progress, eval_metric = self.progress, self.config.run.eval_metric
        raw, selected = found["raw"], found.get("ema", found["raw"])
        row = {"epoch": progress.epoch, "train_loss": progress.trained["loss"]}
        row |= {"eval_loss": raw.loss, "eval_top1": raw.top1, "eval_top5": raw.top5}
        if "ema" in found:
            row |= {"eval_ema_loss": selected.loss, "eval_ema_top1": selected.top1, "eval_ema_top5": selected.top5}
        row["lr"] = self.lr
        metric = getattr(selected, eval_metric)
        better = progress.best is None or (metric < progress.best if eval_metric == "loss" else metric > progress.best)

        trained, progress.trained = progress.trained, None
        progress.rows.append(row)
        progress.epoch += 1
        if better:
            progress.best = metric
        self.save([], vars(selected) if better else None)
        self.report.end_epoch(row, trained, progress.best, time.perf_counter() - start)
        return {**row, **{f"train_{key}": trained[key] for key in ("accuracy", "images_per_s", "data_wait")}}

    def save(self, meters: List[Tuple[int, float, float]], better: Optional[Mapping[str, float]] = None) -> None:
        """Save the run at its current place.

        Args:
            meters: inside an epoch, each rank's training figures so far.
            better: accuracy of the weights, if they are the best so far.

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
        self.save_wait_s += time.perf_counter() - start


def _clipped_parameters(model: nn.Module, mode: str) -> List[nn.Parameter]:
    """All parameters, or for adaptive clipping those outside of the classifiers."""
    heads = model.get_classifier() if mode == "agc" else ()
    heads = heads if isinstance(heads, tuple) else (heads,)
    excluded = {id(parameter) for head in heads for parameter in head.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in excluded]
