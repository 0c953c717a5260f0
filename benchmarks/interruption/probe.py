"""Run an unchanged training script, log its updates, saves and evaluated images, and kill it at a given moment.

    PROBE='{"log": FILE, ...}' python probe.py SCRIPT [ARGUMENT ...]

The probe wraps functions of torch that every script calls. One call is fixed: timm's train.py passes the CPU as a device ID to
DDP, which DDP refuses, so without a GPU the argument is removed. The keys of PROBE:

    log          file for the events: a JSON object per line, with its time in seconds
    started      time.monotonic() at the start of the process, from which the times count
    saving       function whose duration is logged as the wait for a save: "module:Class.method"
    kill_at      SIGKILL during the update after this many updates
    kill_saving  SIGKILL in the first torch.save after this many updates, when half of its bytes are written
    kill_naming  SIGKILL before the first rename of a checkpoint after this many updates
    stop_after   SIGKILL after this many updates

This file imports nothing from the project, so that a script of another checkout imports that checkout's packages.
"""

import functools
import importlib
import io
import json
import os
import runpy
import signal
import sys
import time
from typing import Any, Dict


class Probe:
    def __init__(self, settings: Dict[str, Any]):
        self.settings = settings
        self.file = os.open(settings["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.updates = 0

    def note(self, **event: Any) -> None:
        """Log an event, unbuffered: the process may be killed at any time."""
        event["seconds"] = time.monotonic() - self.settings["started"]
        os.write(self.file, (json.dumps(event) + "\n").encode())

    def due(self, key: str) -> bool:
        return self.updates >= self.settings.get(key, float("inf"))

    def before_update(self, *_: Any) -> None:
        if self.due("kill_at"):
            self.kill()

    def after_update(self, *_: Any) -> None:
        self.updates += 1
        self.note(update=self.updates)
        if self.due("stop_after"):
            self.kill()

    def kill(self) -> None:
        """Kill this process and its workers."""
        os.killpg(0, signal.SIGKILL)

    def install(self) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        register_optimizer_step_pre_hook(self.before_update)
        register_optimizer_step_post_hook(self.after_update)
        save, replace, loss = torch.save, os.replace, torch.nn.functional.cross_entropy

        def saving(state: Any, target: Any, *args: Any, **options: Any) -> None:
            if self.due("kill_saving"):
                whole = io.BytesIO()
                save(state, whole, *args, **options)
                file = target if hasattr(target, "write") else open(target, "wb")  # noqa: SIM115  (killed at once)
                file.write(whole.getbuffer()[: whole.tell() // 2])
                file.flush()
                self.kill()
            save(state, target, *args, **options)

        def naming(source: Any, target: Any, **options: Any) -> None:
            if self.due("kill_naming") and "tmp" in os.path.basename(source) and str(target).endswith(".pth.tar"):
                self.kill()
            replace(source, target, **options)

        def counting(logits: Any, targets: Any, *args: Any, **options: Any) -> Any:
            if torch.is_inference_mode_enabled():
                self.note(evaluated=len(targets))
            return loss(logits, targets, *args, **options)

        torch.save, os.replace, torch.nn.functional.cross_entropy = saving, naming, counting
        wrap = torch.nn.parallel.DistributedDataParallel.__init__

        def wrapping(ddp: Any, *args: Any, device_ids: Any = None, **options: Any) -> None:
            wrap(ddp, *args, device_ids=device_ids if torch.cuda.is_available() else None, **options)

        torch.nn.parallel.DistributedDataParallel.__init__ = wrapping
        if "saving" in self.settings:
            self.time_saves(*self.settings["saving"].split(":"))

    def time_saves(self, module: str, name: str) -> None:
        class_name, method = name.split(".")
        owner = getattr(importlib.import_module(module), class_name)
        real = getattr(owner, method)

        @functools.wraps(real)
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = real(*args, **options)
            self.note(save_s=time.perf_counter() - start, after=self.updates)
            return result

        setattr(owner, method, timed)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    Probe(json.loads(os.environ["PROBE"])).install()
    runpy.run_path(sys.argv[0], run_name="__main__")
