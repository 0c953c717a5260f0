"""Send a run's figures to Weights & Biases, through a process of its own: wandb_uploader.py.

So W&B can neither delay, end nor outlive the training. With WANDB_MODE=offline, the figures stay in the run folder.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Mapping, Optional, Sequence

from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig

INIT_TIMEOUT_S = 12  # for W&B's server to answer; after that, the rows are kept offline
FINISH_TIMEOUT_S = 12  # for the last upload
PATIENCE_S = 20  # that the end of a run waits for the uploader; longer than either


class WandbTracker:
    """A W&B run, which a resumed run continues. See `open_trackers` for the arguments."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        rows: Sequence[Mapping[str, Any]],
        say: Callable[[str], None],
        is_over: bool = False,
    ):
        self.say = say
        self.given_up = False
        self.lines: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("wandb_uploader.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is meant for the run
        )
        run = config.run
        task = {"argv": sys.argv, "folder": str(folder.absolute()), "rows": rows, "is_over": is_over}
        task["run"] = {"project": run.wandb_project, "name": run.experiment, "tags": run.wandb_tags}
        task["run"]["config"] = config_module.flat(config)
        task["settings"] = {
            "init_timeout": INIT_TIMEOUT_S,
            "finish_timeout": FINISH_TIMEOUT_S,
            "x_stats_pid": os.getpid(),
        }
        self._put(task)
        self.reader = threading.Thread(target=self._read, name="W&B log", daemon=True)
        self.reader.start()
        threading.Thread(target=self._write, name="W&B rows", daemon=True).start()

    def log(self, row: Mapping[str, Any]) -> None:
        self._put(row)

    def finish(self, exit_code: int, wait: bool = True) -> None:
        self._put({"exit_code": exit_code})
        self.lines.put(None)
        patience_s = PATIENCE_S if wait else 0
        self.reader.join(patience_s)
        if self.reader.is_alive():
            self.given_up = True
            self.process.kill()
            self.say(
                f"warning: log_wandb: no answer within {patience_s} s after the end of the run; "
                f"the same command, started again, sends the rows"
            )

    def _put(self, message: Mapping[str, Any]) -> None:
        self.lines.put(json.dumps(message, default=str) + "\n")

    def _write(self) -> None:
        """Pass messages on to the uploader; in a thread, because its pipe may be full."""
        with contextlib.suppress(OSError), self.process.stdin as pipe:  # an uploader that has died is reported by _read
            while (line := self.lines.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def _read(self) -> None:
        """Copy the uploader's lines to the run's log until it exits."""
        for line in self.process.stdout:
            self.say(line.rstrip("\n"))
        status = self.process.wait()
        if status and not self.given_up:
            self.say(f"warning: log_wandb: the uploader exited with status {status}; the run continues without it")
