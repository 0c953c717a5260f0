"""What people see of a run: the head, a progress bar or plain lines, one line per epoch, summary.csv.

Only the first process reports. Numbers are added on the device and read once per log interval; each such read is marked
`# sync`. (The loop has one more per update: whether loss and gradient are finite.)
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
from tnt_timm.runtime.cpu_wait import CpuWait
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schema import TrainConfig


class EpochMeter:
    """Loss, accuracy, speed and data wait of a training epoch, over all processes' images of this one.

    Loss and accuracy are of the updates that were made; one that was left out, for it was not finite, is not in them.
    """

    def __init__(self, device: torch.device, world_size: int, start: Tuple[int, float, float] = (0, 0.0, 0.0)):
        self.images, *sums = start  # of an epoch that goes on
        self.sums = torch.tensor(sums, dtype=torch.float64, device=device)  # loss * images, right ones
        self.update_images, self.update_sums = 0, torch.zeros_like(self.sums)  # of the current update
        self.images_seen = 0  # by this process, left out or not
        self.world_size = world_size
        self.wait_s = 0.0
        self.start = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a micro-batch; with mixed targets (B, classes), right means the larger part."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        count = len(labels)
        right = (logits.argmax(dim=1) == labels).sum()
        self.update_sums += torch.stack([loss.double() * count, right.double()])
        self.update_images += count

    def end_update(self, finite: bool) -> None:
        """After an update's last micro-batch: its figures count if it is made."""
        if finite:
            self.sums += self.update_sums
            self.images += self.update_images
        self.images_seen += self.update_images
        self.update_images, self.update_sums = 0, torch.zeros_like(self.sums)

    def read(self) -> Dict[str, float]:
        """The means so far, of this process; images_per_s is of all processes."""
        loss, right = self.sums.tolist()  # sync
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "loss": loss / self.images if self.images else math.nan,
            "accuracy": 100 * right / self.images if self.images else math.nan,
            "images_per_s": self.images_seen * self.world_size / seconds,
            "data_wait": self.wait_s / seconds,
            "seconds": seconds,
        }

    def state(self) -> Tuple[int, float, float]:
        """What a meter that goes on starts from."""
        return (self.images, *self.sums.tolist())  # sync

    def reduced(self, world: World) -> Dict[str, float]:
        """The means of the whole epoch over all processes, the same on each."""
        mine = self.read()
        sums = world.gather(self.state())
        images, loss, right = (sum(column) for column in zip(*sums))
        if images == 0:
            return mine
        return {**mine, "loss": loss / images, "accuracy": 100 * right / images}


class Reporter:
    """The log of a run.

    Args:
        config: of the run.
        world: this process among all; only the first one prints.
        epochs, updates_per_epoch: how long it takes.
    """

    def __init__(self, config: TrainConfig, world: World, epochs: int, updates_per_epoch: int):
        self.is_main = world.is_main
        self.interval = config.run.log_interval
        self.epochs = epochs
        self.updates = updates_per_epoch
        self.live = self.is_main and sys.stdout.isatty()
        self.bar: Optional[tqdm] = None
        self.done_before = 0  # updates of the current epoch that an earlier process did
        self.last_read = 0.0  # clock of the latest read of the meter
        self.damaged: Dict[str, str] = {}
        self.train_seconds: List[float] = []
        self.cpu_wait = CpuWait()
        self.on_cpu = world.device.type == "cpu"

    def line(self, text: str) -> None:
        if self.is_main:
            say(text)

    def start_epoch(self, epoch: int, done: int = 0) -> None:
        """An epoch begins, or goes on after `done` updates."""
        self.done_before = done
        self.open_bar(f"epoch {epoch + 1}/{self.epochs}", self.updates, done)

    def open_bar(self, title: str, total: int, done: int = 0) -> None:
        if self.live:
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=title,
                file=sys.stdout,
                leave=False,
                dynamic_ncols=True,
                bar_format=BAR_FORMAT,
            )

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def update(self, epoch: int, update: int, meter: EpochMeter, lr: float) -> None:
        """After update number `update` (from 1) of an epoch: move the bar, and write the numbers when it is time."""
        if self.is_main and (warning := self.cpu_wait.warning(self.on_cpu)):
            say(f"warning: {warning}")
        if self.bar is not None:
            self.bar.update(1)
        stale = self.bar is not None and time.perf_counter() - self.last_read > BAR_REFRESH_S
        if not self.is_main or (update % self.interval and not stale):
            return
        self.last_read = time.perf_counter()
        now = meter.read()
        per_update = now["seconds"] / (update - self.done_before)
        left = per_update * (self.updates - update) + self._later_epochs(epoch, per_update)
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
        """After a batch of evaluation."""
        if self.bar is None:
            self.open_bar("evaluation", total)
        if self.bar is not None:
            self.bar.update(1)

    def _later_epochs(self, epoch: int, seconds_per_update: float) -> float:
        per_epoch = self.train_seconds[-1] if self.train_seconds else seconds_per_update * self.updates
        return per_epoch * (self.epochs - epoch - 1)

    def end_epoch(self, row: Mapping[str, Any], train: Mapping[str, float], best: float, seconds: float) -> None:
        """The epoch's line; `seconds` is the whole epoch's, evaluation and saving included."""
        self.train_seconds.append(seconds)
        left = duration(seconds * (self.epochs - row["epoch"] - 1))
        ema = f"  EMA top-1 {row['eval_ema_top1']:.3f}" if "eval_ema_top1" in row else ""
        self.line(
            f"epoch {row['epoch'] + 1}/{self.epochs}  train loss {row['train_loss']:.4f} acc {train['accuracy']:.1f} %  "
            f"|  val loss {row['eval_loss']:.4f} top-1 {row['eval_top1']:.3f}{ema}  |  best {best:.3f}  |  "
            f"{train['images_per_s']:.0f} img/s  data wait {100 * train['data_wait']:.0f} %  "
            f"lr {row['lr']:.3g}  {duration(seconds)}, left {left}"
        )

    def note_damage(self, found: List[Damage]) -> None:
        """Name each damaged training file once, on the process that met it."""
        for damage in found:
            if damage.name not in self.damaged:
                self.damaged[damage.name] = damage.reason
                say(f"warning: {damage.name}: damaged training image, replaced by the next one: {damage.reason}")
