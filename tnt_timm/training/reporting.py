"""What a run prints: a progress bar or plain lines, and one line per epoch.

Numbers are summed on the device and read once per log interval; each such read is marked `# sync`. (The loop has one more
per update: whether loss and gradient are finite.)
"""

import math
import sys
import time
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from torch import Tensor
from tqdm import tqdm

from tnt_timm.console import BAR_FORMAT, BAR_REFRESH_S, duration, say
from tnt_timm.data.loader import Damage
from tnt_timm.runtime.cpu_contention import CpuWait
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schema import TrainConfig


class EpochMeter:
    """Loss, accuracy, speed and data wait of a training epoch, over the images of this rank.

    Loss and accuracy leave out skipped updates.
    """

    def __init__(self, device: torch.device, world_size: int, start: Tuple[int, float, float] = (0, 0.0, 0.0)):
        self.images, *sums = start  # of the same epoch, before a restart
        self.sums = torch.tensor(sums, dtype=torch.float64, device=device)  # loss * images, correct images
        self.update_images, self.update_sums = 0, torch.zeros_like(self.sums)  # of the current update
        self.images_seen = 0  # by this process, skipped or not
        self.world_size = world_size
        self.wait_s = 0.0
        self.start = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a micro-batch. With mixed targets (B, classes), the larger part counts as the label."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        correct = (logits.argmax(dim=1) == labels).sum()
        self.update_sums += torch.stack([loss.double() * len(labels), correct.double()])
        self.update_images += len(labels)

    def end_update(self, finite: bool) -> None:
        """Count the micro-batches of an update, unless it was skipped."""
        if finite:
            self.sums += self.update_sums
            self.images += self.update_images
        self.images_seen += self.update_images
        self.update_images, self.update_sums = 0, torch.zeros_like(self.sums)

    def read(self) -> Dict[str, float]:
        """Return this rank's means so far; images_per_s is of all ranks."""
        loss, correct = self.sums.tolist()  # sync
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "loss": loss / self.images if self.images else math.nan,
            "accuracy": 100 * correct / self.images if self.images else math.nan,
            "images_per_s": self.images_seen * self.world_size / seconds,
            "data_wait": self.wait_s / seconds,
            "seconds": seconds,
        }

    def state(self) -> Tuple[int, float, float]:
        """Return what a meter needs to continue in another process."""
        return (self.images, *self.sums.tolist())  # sync

    def reduced(self, world: World) -> Dict[str, float]:
        """Return the epoch's means over all ranks, the same on each."""
        images, loss, correct = (sum(column) for column in zip(*world.gather(self.state())))
        means = {"loss": loss / images, "accuracy": 100 * correct / images} if images else {}
        return {**self.read(), **means}


DATA_WAIT = 0.2  # of an epoch. A GPU that waits longer for images deserves a remedy


class Reporter:
    """Print the progress of a run; rank 0 prints for all.

    Args:
        config: settings of the run.
        world: this rank among all.
        epochs: of the run.
        updates_per_epoch: of the run.
        loading_remedy: what the user can do if the GPU waits for images. Empty without a GPU.
    """

    def __init__(self, config: TrainConfig, world: World, epochs: int, updates_per_epoch: int, loading_remedy: str):
        self.world = world
        self.interval = config.run.log_interval
        self.epochs = epochs
        self.updates = updates_per_epoch
        self.live = world.is_main and sys.stdout.isatty()
        self.bar: Optional[tqdm] = None
        self.done_before = 0  # updates of the current epoch that an earlier process made
        self.last_read = 0.0  # clock of the latest read of the meter
        self.damaged: Dict[str, str] = {}
        self.epoch_seconds: Optional[float] = None  # of the latest epoch, evaluation and saving included
        self.cpu_wait = CpuWait()
        self.loading_remedy = loading_remedy  # said once

    def line(self, text: str) -> None:
        if self.world.is_main:
            say(text)

    def start_epoch(self, epoch: int, done: int = 0) -> None:
        """Start the report of an epoch of which `done` updates are made."""
        self.done_before = done
        self.open_bar(f"epoch {epoch + 1}/{self.epochs}", self.updates, done)

    def open_bar(self, title: str, total: int, done: int = 0) -> None:
        if self.live:
            settings = dict(leave=False, dynamic_ncols=True, bar_format=BAR_FORMAT, file=sys.stdout)
            self.bar = tqdm(total=total, initial=done, desc=title, **settings)

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def update(self, epoch: int, update: int, meter: EpochMeter, lr: float) -> None:
        """Report update number `update` (from 1) of an epoch: advance the bar, and print the numbers when they are due."""
        warning = self.cpu_wait.warning(self.world.device.type == "cpu") if self.world.is_main else None
        if warning:
            say(f"warning: {warning}")
        if self.bar is not None:
            self.bar.update(1)
        stale = self.bar is not None and time.perf_counter() - self.last_read > BAR_REFRESH_S
        if not self.world.is_main or (update % self.interval and not stale):
            return
        self.last_read = time.perf_counter()
        now = meter.read()
        per_update = now["seconds"] / (update - self.done_before)
        per_epoch = self.epoch_seconds or per_update * self.updates
        left = per_update * (self.updates - update) + per_epoch * (self.epochs - epoch - 1)
        text = (
            f"loss {now['loss']:.4f}  acc {now['accuracy']:.1f} %  left {duration(left)}  "
            f"{now['images_per_s']:.0f} img/s  data wait {100 * now['data_wait']:.0f} %"
        )
        if self.bar is not None:
            self.bar.bar_format = f"{BAR_FORMAT}  {text}"
            self.bar.refresh()
        else:
            say(f"epoch {epoch + 1}/{self.epochs}  update {update}/{self.updates}  {text}  lr {lr:.3g}")

    def evaluated(self, done: int, total: int) -> None:
        """Advance the bar by one batch of evaluation."""
        if self.bar is None:
            self.open_bar("evaluation", total)
        if self.bar is not None:
            self.bar.update(1)

    def end_epoch(self, row: Mapping[str, Any], train: Mapping[str, float], best: float, seconds: float) -> None:
        """Print the epoch's line.

        Args:
            row: of summary.csv.
            train: means of the epoch's training, from `EpochMeter.reduced`.
            best: metric of the best epoch so far.
            seconds: duration of the epoch, evaluation and saving included.
        """
        self.epoch_seconds = seconds
        left = duration(seconds * (self.epochs - row["epoch"] - 1))
        ema = f"  EMA top-1 {row['eval_ema_top1']:.3f}" if "eval_ema_top1" in row else ""
        self.line(
            f"epoch {row['epoch'] + 1}/{self.epochs}  train loss {row['train_loss']:.4f} acc {train['accuracy']:.1f} %  "
            f"|  val loss {row['eval_loss']:.4f} top-1 {row['eval_top1']:.3f}{ema}  |  best {best:.3f}  |  "
            f"{train['images_per_s']:.0f} img/s  data wait {100 * train['data_wait']:.0f} %  "
            f"lr {row['lr']:.3g}  {duration(seconds)}, left {left}"
        )
        if self.loading_remedy and train["data_wait"] > DATA_WAIT:
            share = f"{100 * train['data_wait']:.0f} %"
            self.line(f"warning: the GPU waits for images {share} of the time; {self.loading_remedy}")
            self.loading_remedy = ""

    def note_damage(self, found: List[Damage]) -> None:
        """Name each damaged training image once, on the rank that read it."""
        for damage in found:
            if damage.name not in self.damaged:
                self.damaged[damage.name] = damage.reason
                say(f"warning: {damage.name}: damaged training image, replaced by the next one: {damage.reason}")

    def count_damage(self) -> None:
        """Print how many damaged training images all ranks have met so far."""
        names = set().union(*self.world.gather(set(self.damaged)))
        if names:
            self.line(f"warning: {len(names)} damaged training images were replaced so far")
