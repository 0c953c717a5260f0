"""The loop: the only place that knows the order in which things happen.

The life of a step: set lr; loss of the micro-batches, gradients synchronised at the last; unscale; clip; check that all is
finite; step; EMA; log. The life of an epoch: train, save aside, evaluate, save.
"""

import contextlib
import math
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn
from torch.nn.utils import get_total_norm

from tnt_timm.data.datasets import check_same_classes
from tnt_timm.data.loader import TrainingBatch
from tnt_timm.errors import UserError
from tnt_timm.training import checkpointing, provenance, run_folder
from tnt_timm.training import config as config_module
from tnt_timm.training.build import Parts
from tnt_timm.training.distributed import World
from tnt_timm.training.evaluation import Accuracy, evaluate
from tnt_timm.training.reporting import EpochMeter, Reporter, WandbLog, write_summary
from tnt_timm.training.schema import TrainConfig

# Settings of the optimizer that may change when a run goes on; the rest of its groups is its own bookkeeping.
HYPER_PARAMETERS = ("initial_lr", "weight_decay", "betas", "momentum", "eps")
MAX_SKIPPED = 20  # fp16 updates in a row that loss scaling may skip; by then the scale has shrunk a million times


class Trainer:
    """One training run, from its first or its last finished step to its end.

    Args:
        config: of the run.
        parts: from `build`.
        world: this process among all.
        folder: the run's folder, writable.
    """

    def __init__(self, config: TrainConfig, parts: Parts, world: World, folder: Path):
        self.config = config
        self.parts = parts
        self.world = world
        self.folder = folder
        self.report = Reporter(config, world, parts.pace.epochs, parts.pace.updates_per_epoch)
        self.wandb: Optional[WandbLog] = None
        # Progress: all that a run is, besides weights, optimizer and scaler
        self.epoch = 0
        self.updates = 0
        self.skipped = 0  # fp16 updates in a row
        self.trained: Optional[Dict[str, float]] = None  # the epoch's training figures, once it only lacks evaluation
        self.rows: List[Dict[str, Any]] = []  # of summary.csv
        self.best: Optional[float] = None

    # ---------------------------------------------------------------- the run

    def run(self) -> None:
        """Train to the end.

        Raises:
            UserError: something that the user can mend; every earlier checkpoint is intact.
        """
        with self.world.together():
            found = self.resume()
        if not self.world.same((found, self.epoch, self.updates)):
            raise UserError(
                f"output: {self.folder}: not every process sees the same checkpoint there; "
                f"choose an --output that all machines share",
                everywhere=True,
            )
        if found != checkpointing.UNEVALUATED:
            self.discard_unevaluated()  # left over from a stop between saving and tidying up
        self.world.on_main(self.write_summary)
        if self.epoch >= self.parts.pace.epochs:
            self.report.line(
                f"already finished: {self.epoch} epochs, best {self.config.run.eval_metric} {self.best:.3f}"
            )
            return
        self.world.on_main(self.open_logs)
        exit_code = 1
        try:
            while self.epoch < self.parts.pace.epochs:
                start = time.perf_counter()
                if self.trained is None:
                    self.trained = self.train_epoch()
                    self.save(checkpointing.UNEVALUATED)  # so that trouble in evaluation costs no training
                self.finish_epoch(self.evaluate_epoch(), start)
            exit_code = 0
        finally:
            if self.wandb is not None:
                self.wandb.finish(exit_code)
        self.report.line(f"done: best {self.config.run.eval_metric} {self.best:.3f}, in {self.folder}")

    def open_logs(self) -> None:
        run_folder.describe(self.folder, self.config, self.parts.classes, self.world.device, self.world.size)
        if self.config.run.log_wandb:
            self.wandb = WandbLog(self.config, self.folder)

    def write_summary(self) -> None:
        write_summary(self.folder / "summary.csv", self.rows)

    def train_epoch(self) -> Dict[str, float]:
        self.parts.scheduler.step(self.epoch)
        self.parts.task.train()
        if self.parts.train_loader.mixup is not None:
            off = self.config.augmentation.mixup_off_epoch
            self.parts.train_loader.mixup.mixup_enabled = not off or self.epoch < off
        meter = EpochMeter(self.world.device, self.world.size)
        batches = self.parts.train_loader.epoch(self.epoch)
        self.report.start_epoch(self.epoch)
        try:
            for update in range(1, self.parts.pace.updates_per_epoch + 1):
                self.train_step(update, batches, meter)
                self.report.update(self.epoch, update, meter, self.lr)
        finally:
            self.report.close_bar()
        self.count_damage()
        return meter.reduced(self.world)

    # --------------------------------------------------------------- the step

    def train_step(self, update: int, batches: Iterator[TrainingBatch], meter: EpochMeter) -> None:
        parts, micro_batches = self.parts, self.config.optimizer.grad_accum_steps
        # 1. learning rate
        parts.scheduler.step_update(self.updates)
        # 2. forward and backward over the micro-batches
        total_loss = torch.zeros((), device=self.world.device)
        for micro in range(micro_batches):
            batch = self.next_batch(batches, meter)
            with parts.task.no_sync() if micro < micro_batches - 1 else contextlib.nullcontext():
                result = parts.task(batch.images, batch.targets)  # the networks under autocast, the loss in float32
                parts.scaler.scale(result["loss"] / micro_batches).backward()
            loss = result["loss"].detach()
            total_loss += loss / micro_batches
            meter.add(loss, result["output"].detach(), batch.targets)
        # 3. unscale and clip
        parts.scaler.unscale_(parts.optimizer)
        grads = [parameter.grad for parameter in parts.model.parameters() if parameter.grad is not None]
        norm = get_total_norm(grads)
        clip, mode = self.config.optimizer.clip_grad, self.config.optimizer.clip_mode
        if clip is not None:
            dispatch_clip_grad(_clipped(parts.model, mode), clip, mode)
        # 4. nothing that is not finite reaches the weights
        stepping = self.check_finite(update, total_loss, norm)
        # 5. step (where fp16 gradients overflowed, leave it out; the scaler then shrinks its scale)
        if stepping:
            parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        # 6. averaged weights
        if parts.ema is not None and stepping:
            parts.ema.update(parts.model, step=self.updates if parts.ema.use_warmup else None)

    def next_batch(self, batches: Iterator[TrainingBatch], meter: EpochMeter) -> TrainingBatch:
        batch = next(batches)
        meter.wait_s += batch.wait_s
        self.report.note_damage(batch.damaged)
        return batch

    def check_finite(self, update: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether the update may happen, agreed over all processes.

        Raises:
            UserError: it may not, and loss scaling cannot help.
        """
        if self.world.all_true(torch.isfinite(loss) & torch.isfinite(norm)):
            self.skipped = 0
            return True
        loss_is_finite = self.world.all_true(torch.isfinite(loss))
        if loss_is_finite and self.parts.scaler.is_enabled() and self.skipped < MAX_SKIPPED:
            self.skipped += 1
            return False
        what = "gradient" if loss_is_finite else "loss"
        raise UserError(
            f"{what} is not finite (loss {loss.item():.4g}, gradient norm {norm.item():.4g}) at epoch {self.epoch + 1}, "
            f"update {update}, lr {self.lr:.3g}; the weights were not touched and checkpoints are intact; "
            f"try a lower --lr, --clip-grad 1, or --amp-dtype bfloat16",
            everywhere=True,
        )

    @property
    def lr(self) -> float:
        """The largest of the parameter groups' (layer decay gives the others a part of it)."""
        return max(group["lr"] for group in self.parts.optimizer.param_groups)

    # ------------------------------------------------- evaluation and the rest

    def evaluate_epoch(self) -> Dict[str, Accuracy]:
        """Accuracy of the raw and the averaged weights; uncompiled, so that validate.py finds the same digits."""
        models = {"raw": self.parts.model}
        if self.parts.ema is not None:
            models["ema"] = self.parts.ema.module
        for model in models.values():
            self.world.share_buffers(model)
        try:
            found = evaluate(models, self.parts.eval_loader, self.world, self.parts.autocast, self.report.evaluated)
        finally:
            self.report.close_bar()
        for name, accuracy in found.items():
            if not math.isfinite(accuracy.loss):
                self.discard_unevaluated()
                raise UserError(
                    f"the {name} weights' validation loss is not finite ({accuracy.loss}) after epoch {self.epoch + 1}; "
                    f"the epoch was discarded and the checkpoints of the one before are intact; try a lower --lr",
                    everywhere=True,
                )
        return found

    def finish_epoch(self, found: Dict[str, Accuracy], start: float) -> None:
        """Record an evaluated epoch: row, best, checkpoints, log."""
        raw, selected = found["raw"], found.get("ema", found["raw"])
        row = {"epoch": self.epoch, "train_loss": self.trained["loss"]}
        row |= {"eval_loss": raw.loss, "eval_top1": raw.top1, "eval_top5": raw.top5}
        if "ema" in found:
            row |= {"eval_ema_loss": selected.loss, "eval_ema_top1": selected.top1, "eval_ema_top5": selected.top5}
        row["lr"] = self.lr
        metric = getattr(selected, self.config.run.eval_metric)
        better = self.best is None or (
            metric < self.best if self.config.run.eval_metric == "loss" else metric > self.best
        )

        trained, self.trained = self.trained, None
        self.rows.append(row)
        self.epoch += 1
        if better:
            self.best = metric
            best = self.folder / checkpointing.BEST
            self.world.on_main(lambda: checkpointing.write(best, self.description(selected)))
        self.save(checkpointing.LAST)
        self.discard_unevaluated()
        self.world.on_main(self.write_summary)
        if self.wandb is not None:
            self.wandb.log(
                {**row, **{f"train_{key}": trained[key] for key in ("accuracy", "images_per_s", "data_wait")}}
            )
        self.report.end_epoch(row, trained, self.best, time.perf_counter() - start)

    def count_damage(self) -> None:
        names = set().union(*self.world.gather(set(self.report.damaged)))
        if names:
            self.report.line(f"warning: {len(names)} damaged training images met and replaced so far")

    # ------------------------------------------------------------- checkpoints

    def description(self, accuracy: Optional[Accuracy] = None) -> Dict[str, Any]:
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
            "epoch": self.epoch,
            "metrics": vars(accuracy) if accuracy is not None else None,
        }
        if parts.ema is not None:
            state["state_dict_ema"] = parts.ema.module.state_dict()
        return state

    def save(self, name: str) -> None:
        """Write all that the run needs to go on."""
        progress = {key: getattr(self, key) for key in ("epoch", "updates", "skipped", "trained", "rows", "best")}

        def write() -> None:
            state = self.description()
            state["progress"] = progress
            state["optimizer"] = self.parts.optimizer.state_dict()
            state["amp_scaler"] = self.parts.scaler.state_dict()
            checkpointing.write(self.folder / name, state)

        self.world.on_main(write)

    def discard_unevaluated(self) -> None:
        if self.world.is_main:
            (self.folder / checkpointing.UNEVALUATED).unlink(missing_ok=True)

    def resume(self) -> str:
        """Priority: 1. the run folder's own newest checkpoint, 2. the one that `resume` names, 3. a fresh start.

        Returns:
            The name of the checkpoint that the run goes on from, or "".
        """
        path, state = run_folder.to_continue(self.folder, self.config)
        if path is None:
            return ""
        for change in run_folder.changes(path, state, self.config, self.world.size):
            self.report.line(f"notice: the run goes on with a changed setting: {change}")
        check_same_classes(state["classes"], self.parts.classes, str(path), "the data")
        checkpointing.load_weights(self.parts.model, state["state_dict"], str(path))
        if self.parts.ema is not None:
            checkpointing.load_weights(self.parts.ema.module, state["state_dict_ema"], str(path))
        self.load_optimizer(state["optimizer"])
        if self.parts.scaler.is_enabled() and state["amp_scaler"]:
            self.parts.scaler.load_state_dict(state["amp_scaler"])
        for key, value in state["progress"].items():
            setattr(self, key, value)
        self.report.line(f"continuing from {path}: {self.epoch} of {self.parts.pace.epochs} epochs are done")
        return path.name

    def load_optimizer(self, state: Dict[str, Any]) -> None:
        """The moments of the checkpoint, with the hyper-parameters of the config, which may have been changed."""
        groups = self.parts.optimizer.param_groups
        wanted = [{key: group[key] for key in HYPER_PARAMETERS if key in group} for group in groups]
        self.parts.optimizer.load_state_dict(state)
        for group, settings in zip(self.parts.optimizer.param_groups, wanted):
            group.update(settings)


def _clipped(model: nn.Module, mode: str) -> List[nn.Parameter]:
    """The parameters whose gradients are clipped: all, or for adaptive clipping all but the head's (or both heads')."""
    heads = model.get_classifier() if mode == "agc" else ()
    heads = heads if isinstance(heads, tuple) else (heads,)
    left_alone = {id(parameter) for head in heads for parameter in head.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in left_alone]
