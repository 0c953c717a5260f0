"""Training progress: the part of a checkpoint that is not weights, optimizer or scaler."""

from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Mapping, Optional, Tuple


@dataclass(frozen=True)
class Pace:
    """Durations in the units that the training loop counts."""

    batches_per_epoch: int  # micro-batches per rank
    updates_per_epoch: int
    global_batch: int  # images per update, over all ranks and micro-batches
    epochs: int  # cooldown included
    lr: float  # peak of the schedule


@dataclass
class Progress:
    """How far a run is; the same on every rank. Its fields are keys of the checkpoint: keep their names."""

    epoch: int = 0  # finished epochs
    update: int = 0  # finished updates of the current epoch
    updates: int = 0  # finished updates in total
    left_out: List[int] = field(default_factory=list)  # latest updates whose loss or gradient was not finite
    rollbacks: int = 0  # to the start of an epoch; part of the random seed from there on
    best: Optional[float] = None
    best_since: int = 0  # epochs whose accuracy `best` leaves out, because they had another validation set
    trained: Optional[Dict[str, float]] = (
        None  # training figures of the current epoch, if only its evaluation is missing
    )
    meters: List[Tuple[int, float, float]] = field(default_factory=list)  # inside an epoch, per rank: EpochMeter.state
    global_batch: int = 0  # images per update
    rows: List[Dict[str, Any]] = field(default_factory=list)  # of summary.csv

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], global_batch: int) -> "Progress":
        """Return a checkpoint's progress, counted in updates of `global_batch` images."""
        known = {entry.name for entry in fields(cls)}  # another version may have saved more
        progress = cls(**{name: value for name, value in values.items() if name in known})
        progress.update = progress.update * progress.global_batch // global_batch
        progress.global_batch = global_batch
        return progress

    @property
    def begins_epoch(self) -> bool:
        """Whether no update of the current epoch is finished."""
        return self.update == 0 and self.trained is None

    @property
    def weights_epoch(self) -> Optional[int]:
        """The epoch, from 0, at whose end the weights are; None inside an epoch."""
        if self.trained is not None:
            return self.epoch
        return self.epoch - 1 if self.begins_epoch else None

    @property
    def place(self) -> str:
        """The last finished step, for the log."""
        if self.trained is not None:
            return f"the training of epoch {self.epoch + 1}"
        if self.update:
            return f"update {self.update} of epoch {self.epoch + 1}"
        return f"epoch {self.epoch}" if self.epoch else "the start"

    def how_far(self, epochs: int) -> str:
        """Return the progress of a run of `epochs` epochs, for the log."""
        inside = f", and {self.update} updates of the next one" if self.update else ""
        return f"{self.epoch} of {epochs} epochs are done{inside}"

    def meter_of(self, rank: int, world_size: int) -> Tuple[int, float, float]:
        """Return a rank's part of the epoch's figures so far. If the number of ranks has changed, rank 0 takes all."""
        if len(self.meters) == world_size:
            return tuple(self.meters[rank])
        columns = list(zip(*self.meters)) if rank == 0 and self.meters else [(0,), (0.0,), (0.0,)]
        return tuple(sum(column) for column in columns)
