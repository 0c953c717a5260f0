"""Common options of the stages, and the results file with one JSON object per line."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict

ROOT = Path(__file__).resolve().parents[2]


class Stage:
    """The options and results of one stage.

    Args:
        name: of the stage.
        more: adds options of this stage to the parser.
    """

    def __init__(self, name: str, more: Callable[[argparse.ArgumentParser], object] = lambda parser: None):
        parser = argparse.ArgumentParser()
        parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
        parser.add_argument("--until", type=float, required=True, help="end of the stage's time on the monotonic clock")
        parser.add_argument("--output", type=Path, required=True, help="folder of the results")
        parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
        more(parser)
        self.name = name
        self.options = parser.parse_args()
        self.device: str = self.options.device
        self.work: Path = self.options.work

    @property
    def dry(self) -> bool:
        """Whether this is a dry run: on a CPU, with tiny sizes."""
        return self.device == "cpu"

    def left(self) -> float:
        """Return the seconds until the end of the stage's time. All processes share the clock."""
        return self.options.until - time.monotonic()

    def record(self, what: str, ok: bool = True, **figures: Any) -> None:
        """Write one result immediately, so that it survives a crash."""
        line = json.dumps({"stage": self.name, "what": what, "ok": ok, **figures}) + "\n"
        file = os.open(self.options.output / "results.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)
        print(line, end="", flush=True)

    def attempt(self, what: str, work: Callable[[], Dict[str, Any]]) -> bool:
        """Record the figures that `work` returns, or its error in one line. Return whether it succeeded."""
        begun = time.monotonic()
        try:
            figures = {"ok": True, **work()}
        except Exception as error:  # any error, because the rest of the stage should run
            sys.excepthook(*sys.exc_info())
            text = " ".join(str(error).split())
            figures = {"ok": False, "detail": f"{type(error).__name__}: {text[:200]}"}
        self.record(what, seconds=round(time.monotonic() - begun, 1), **figures)
        return figures["ok"]
