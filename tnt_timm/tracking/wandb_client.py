"""A run's numbers in Weights & Biases; WANDB_MODE=offline keeps them in the run folder.

They are a copy, made by a process of its own (wandb_uploader.py): what goes wrong with them is said, and the run goes on. Rows
that an earlier process of the run did not hand over are taken from the run's own record.
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

from tnt_timm.errors import one_line
from tnt_timm.settings import config as config_module
from tnt_timm.settings.schema import TrainConfig

INIT_TIMEOUT_S = 12  # until the rows are kept offline instead
FINISH_TIMEOUT_S = 12  # of the last upload
PATIENCE_S = 20  # that the end of a run waits for it all; longer than either


class WandbLog:
    """One W&B run, which a continued run goes on in.

    Args:
        config: of the run.
        folder: the run's folder.
        rows: of the epochs that are done.
        say: takes a line for the log.
        is_over: no epoch follows, so that nothing is to be done where all rows are handed over.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        rows: Sequence[Mapping[str, Any]],
        say: Callable[[str], None],
        is_over: bool = False,
    ):
        self.say = say
        self.process: Optional[subprocess.Popen] = None
        self.given_up = False
        self.lines: queue.SimpleQueue[Optional[str]] = queue.SimpleQueue()
        self._put(
            {
                "argv": sys.argv,
                "pid": os.getpid(),
                "folder": str(folder.absolute()),
                "rows": rows,
                "is_over": is_over,
                "project": config.run.wandb_project,
                "name": config.run.experiment,
                "tags": config.run.wandb_tags,
                "config": config_module.flat(config),
                "init_timeout_s": INIT_TIMEOUT_S,
                "finish_timeout_s": FINISH_TIMEOUT_S,
            }
        )
        self.thread = threading.Thread(target=self._serve, name="W&B log", daemon=True)
        self.thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """An epoch's numbers; they are sent in the background."""
        self._put(row)

    def finish(self, exit_code: int, wait: bool = True) -> None:
        """Wait until all is handed over, but not for long; or not at all."""
        self._put({"exit_code": exit_code})
        self.lines.put(None)
        patience_s = PATIENCE_S if wait else 0
        self.thread.join(patience_s)
        if self.thread.is_alive():
            self.given_up = True
            if self.process is not None:
                self.process.kill()
            self.say(
                f"warning: log_wandb: no answer within {patience_s} s after the end of the run; "
                f"the same command, started again, sends the rows"
            )

    def _put(self, message: Mapping[str, Any]) -> None:
        self.lines.put(json.dumps(message, default=str) + "\n")

    def _serve(self) -> None:
        """Start the process, and repeat in the run's log what it says until it ends."""
        try:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("wandb_uploader.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            self.say(f"warning: log_wandb: {one_line(error)}; the run goes on without")
            return
        threading.Thread(target=self._write, name="W&B rows", daemon=True).start()
        for line in self.process.stdout:
            self.say(line.rstrip("\n"))
        status = self.process.wait()
        if status and not self.given_up:
            self.say(f"warning: log_wandb: its process ended with status {status}; the run goes on without")

    def _write(self) -> None:
        with contextlib.suppress(OSError), self.process.stdin as pipe:  # where the process has ended, it has said why
            while (line := self.lines.get()) is not None:
                pipe.write(line)
                pipe.flush()
