"""How far a run is: what a checkpoint holds besides weights, optimizer and scaler."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional, Tuple


@dataclass(frozen=True)
class Pace:
    """Durations, resolved once: what the loop counts."""

    batches_per_epoch: int  # micro-batches per process
    updates_per_epoch: int
    global_batch: int  # images per update, over all processes and micro-batches
    epochs: int  # cooldown included
    lr: float  # at the top of the schedule


@dataclass
class Progress:
    """The place of a run, the same on every process."""

    epoch: int = 0  # finished ones
    update: int = 0  # finished ones of the current epoch
    updates: int = 0  # finished ones in all
    left_out: List[int] = field(default_factory=list)  # latest updates whose loss or gradient was not finite
    rollbacks: int = (
        0  # how often the run went back to where an epoch began; part of the key of what is random from there on
    )
    best: Optional[float] = None
    trained: Optional[Dict[str, float]] = None  # the current epoch's training figures, once it only lacks evaluation
    meters: List[Tuple[int, float, float]] = field(default_factory=list)  # before that, per process: EpochMeter.sums
    global_batch: int = 0  # images per update
    rows: List[Dict[str, Any]] = field(default_factory=list)  # of summary.csv

    def as_dict(self) -> Dict[str, Any]:
        """A copy in plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], global_batch: int) -> "Progress":
        """The place that a checkpoint names, counted in updates of `global_batch` images."""
        known = {entry.name for entry in fields(cls)}  # another version may have saved others
        progress = cls(**{name: value for name, value in values.items() if name in known})
        progress.update = progress.update * progress.global_batch // global_batch
        progress.global_batch = global_batch
        return progress

    @property
    def place(self) -> str:
        """What was done last."""
        if self.trained is not None:
            return f"the training of epoch {self.epoch + 1}"
        if self.update:
            return f"update {self.update} of epoch {self.epoch + 1}"
        return f"epoch {self.epoch}" if self.epoch else "the start"

    def how_far(self, epochs: int) -> str:
        """For the log, of a run of so many epochs."""
        if self.epoch > epochs:
            return f"{self.epoch} epochs are done, more than the {epochs} that are asked for"
        inside = f", {self.update} updates of the next one" if self.update else ""
        return f"{self.epoch} of {epochs} epochs are done{inside}"

    def meter_of(self, rank: int, world_size: int) -> Tuple[int, float, float]:
        """A process's part of the epoch's figures so far; with another number of processes the first one takes all."""
        if len(self.meters) == world_size:
            return tuple(self.meters[rank])
        columns = list(zip(*self.meters)) if rank == 0 and self.meters else [(0,), (0.0,), (0.0,)]
        return tuple(sum(column) for column in columns)
