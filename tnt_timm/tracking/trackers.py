"""Open the experiment trackers that the settings ask for."""

from pathlib import Path
from typing import Any, Callable, List, Mapping, Protocol, Sequence

from tnt_timm.errors import one_line
from tnt_timm.settings.schema import TrainConfig
from tnt_timm.tracking.wandb_client import WandbTracker


class Tracker(Protocol):
    """Records the figures of a run, a row per epoch. Its errors become warnings in the run's log and never end the run."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Record the figures of the epoch ``row["epoch"]``."""

    def finish(self, exit_code: int, wait: bool = True) -> None:
        """Close the tracker after the last row; with `wait`, give it some seconds to send what is left."""


def open_trackers(
    config: TrainConfig,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    say: Callable[[str], None],
    is_over: bool = False,
) -> List[Tracker]:
    """Open the trackers of a run. One that fails to open is left out, with a warning.

    Args:
        config: the settings of the run.
        folder: the run folder.
        rows: the finished epochs; each tracker records those that it missed in earlier starts of the run.
        say: writes a line to the run's log.
        is_over: no epoch will follow, so a tracker that has all rows does nothing.
    """
    trackers: List[Tracker] = []
    try:
        if config.run.log_tensorboard:
            from tnt_timm.tracking.tensorboard import TensorBoardTracker  # needs an optional package

            trackers.append(TensorBoardTracker(folder, rows, say))
    except Exception as error:
        say(f"warning: log_tensorboard: {one_line(error)}; the run continues without it")
    try:
        if config.run.log_wandb:
            trackers.append(WandbTracker(config, folder, rows, say, is_over))
    except OSError as error:
        say(f"warning: log_wandb: {one_line(error)}; the run continues without it")
    return trackers
