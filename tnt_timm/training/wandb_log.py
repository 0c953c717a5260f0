"""A run's numbers in Weights & Biases; WANDB_MODE=offline keeps them in the run folder.

They are a copy: what goes wrong with them is said, and the run goes on.
"""

import json
import secrets
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

from tnt_timm import files
from tnt_timm.errors import UserError, one_line
from tnt_timm.training import config as config_module
from tnt_timm.training.schema import TrainConfig

INIT_TIMEOUT_S = 20  # of the start, while all processes wait
FINISH_TIMEOUT_S = 60  # of the last upload; `wandb sync` does the rest


class WandbLog:
    """One W&B run, which a continued run goes on in.

    Args:
        config: of the run.
        folder: the run's folder.
        say: takes a line for the log.

    Raises:
        UserError: nobody is logged in.
    """

    def __init__(self, config: TrainConfig, folder: Path, say: Callable[[str], None]):
        import wandb

        self.say = say
        self.is_broken = False
        id_file = folder / "wandb_id.json"
        run_id = json.loads(id_file.read_text()) if id_file.exists() else secrets.token_hex(4)
        arguments: Dict[str, Any] = dict(
            project=config.run.wandb_project,
            name=config.run.experiment,
            tags=config.run.wandb_tags,
            config=config_module.flat(config),
            dir=str(folder),
            id=run_id,
            resume="allow",
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S),
        )
        try:
            try:
                self.run = wandb.init(**arguments)
            except wandb.errors.AuthenticationError:
                raise
            except wandb.errors.CommError as error:
                say(
                    f"warning: log_wandb: cannot be reached ({one_line(error, 120)}); the numbers are kept in {folder}/wandb, "
                    f"`wandb sync` sends them"
                )
                self.run = wandb.init(**arguments, mode="offline")
        except wandb.Error as error:
            mend = "run `wandb login`, set WANDB_MODE=offline, or leave --log-wandb out"
            raise UserError(f"log_wandb: {one_line(error)}; {mend}") from None
        files.replace_text(id_file, json.dumps(run_id))

    def log(self, row: Mapping[str, Any]) -> None:
        """An epoch's numbers; they are sent in the background."""
        self._attempt(lambda: self.run.log(dict(row), step=row["epoch"]))

    def finish(self, exit_code: int) -> None:
        self._attempt(lambda: self.run.finish(exit_code=exit_code))

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it is not the run's
            if not self.is_broken:
                self.say(f"warning: log_wandb: {one_line(error)}; the run goes on without")
            self.is_broken = True
