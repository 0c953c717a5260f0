"""Stage 6: training from JPEG files: images per second of the loader alone and of train.py, for each --augment-on."""

import re
import subprocess
import sys
import time
from typing import Any, Dict, List

import torch
from jpeg_folder import write_images
from loader import BATCHES, device_part
from stage import ROOT, Stage

from tnt_timm.runtime.distributed import choose_device, world
from tnt_timm.runtime.launch import ALONE
from tnt_timm.settings import config
from tnt_timm.training import build


def main() -> None:
    stage = Stage("loading")
    images, workers, batch_size = (64, 2, 8) if stage.dry else (8192, 16, 256)
    rounds, device_batches = (2, (4,)) if stage.dry else (10, BATCHES)
    folder = stage.work / "jpegs"
    stage.attempt("JPEG files", lambda: {"images": images, "mean_bytes": write_images(folder, images)})
    argv = ["--config", str(ROOT / "configs/tnt_s.yaml"), "--data-dir", str(folder), "--device", stage.device]
    argv += "--epochs 1 --cooldown-epochs 0 --warmup-epochs 0".split()
    argv += ["--batch-size", str(batch_size), "--workers", str(workers)]
    argv += ["--model", "tnt_ti", "--img-size", "32", "--no-amp"] if stage.dry else ["--amp-dtype", "bfloat16"]
    output = ["--output", str(stage.work), "--log-interval", "1" if stage.dry else "4"]
    stage.attempt("the device's part", lambda: {"ms": device_part(stage.device, rounds, device_batches)})
    for where, share in (("device", 0.45), ("worker", 1.0)):
        of_way = [*argv, "--augment-on", where, "--experiment", where]
        stage.attempt(f"loader alone, {where}", lambda: loader_alone(of_way, stage.device))  # noqa: B023
        seconds = share * stage.left()
        stage.attempt(f"train.py, {where}", lambda: trained([*of_way, *output], batch_size, seconds))  # noqa: B023


def loader_alone(argv: List[str], device: str) -> Dict[str, Any]:
    """Return the images per second of an epoch without a model, counted after the first batch of each worker."""
    settings = config.resolve(argv)[0]
    with world(choose_device(device, ALONE)) as here:
        loader = build.build(settings, here).train_loader
        batches = iter(loader.epoch(0))
        sizes, begun = 0, 0.0
        for number, batch in enumerate(batches):
            if number == settings.data.workers - 1:
                settle(device)
                begun = time.monotonic()
            elif number >= settings.data.workers:
                sizes += len(batch.images)
        settle(device)
        seconds = time.monotonic() - begun
    return {"images_per_s": sizes / seconds, "workers": settings.data.workers}


def settle(device: str) -> None:
    """Wait until the device has finished what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def trained(argv: List[str], batch_size: int, seconds: float) -> Dict[str, Any]:
    """Return the throughput of the second half of an epoch, from the log of train.py, which has averages since its start."""
    command = [sys.executable, "train.py", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1))
    print(done.stdout, done.stderr)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    lines = re.findall(r"update (\d+)/\d+  .*  (\d+) img/s  data wait (\d+) %", done.stdout)
    points = []
    for update, rate, wait in (map(int, line) for line in lines):
        images = update * batch_size
        points.append((images, images / rate, wait / 100 * images / rate))
    (images, end_s, wait_s), (images_before, begin_s, wait_before_s) = points[-1], points[len(points) // 2 - 1]
    interval_s = end_s - begin_s
    return {"images_per_s": (images - images_before) / interval_s, "data_wait": (wait_s - wait_before_s) / interval_s}


if __name__ == "__main__":
    main()
