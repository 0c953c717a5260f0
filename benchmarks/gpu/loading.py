"""Stage 6: training from JPEG files: images per second of the loader alone and of train.py."""

import functools
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from stage import ROOT, Stage

from tnt_timm.runtime.distributed import choose_device, world
from tnt_timm.runtime.launch import ALONE
from tnt_timm.settings import config
from tnt_timm.training import build

CLASSES = 8
SIZE = (500, 375)  # of a typical ImageNet file


def main() -> None:
    stage = Stage("loading")
    images, workers, batch_size = (64, 2, 8) if stage.dry else (8192, 16, 256)
    folder = stage.work / "jpegs"
    stage.attempt("JPEG files", lambda: write_images(folder, images))
    argv = ["--config", str(ROOT / "configs/tnt_s.yaml"), "--data-dir", str(folder), "--device", stage.device]
    argv += "--epochs 1 --cooldown-epochs 0 --warmup-epochs 0".split()
    argv += ["--batch-size", str(batch_size), "--workers", str(workers)]
    argv += ["--model", "tnt_ti", "--img-size", "32", "--no-amp"] if stage.dry else ["--amp-dtype", "bfloat16"]
    stage.attempt("loader alone", lambda: loader_alone(argv, stage.device))
    output = ["--output", str(stage.work), "--experiment", "loading", "--log-interval", "1" if stage.dry else "4"]
    stage.attempt("train.py", lambda: trained([*argv, *output], batch_size, stage.left()))


def write_images(folder: Path, count: int) -> Dict[str, Any]:
    """Crop scikit-learn's two photographs, and write `count` images for training and a few for validation."""
    numbers = [
        (folder, split, n) for split, total in (("train", count), ("val", max(64, count // 64))) for n in range(total)
    ]
    for split in ("train", "val"):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
    photographs()  # before the processes are forked
    with ProcessPoolExecutor() as processes:
        sizes = list(processes.map(write_image, numbers, chunksize=64))
    return {"images": count, "mean_bytes": round(sum(sizes) / len(sizes))}


@functools.cache
def photographs() -> List[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def write_image(where: Any) -> int:
    folder, split, number = where
    rng = np.random.default_rng([number, split == "val"])
    photograph = photographs()[number % 2]
    left, top = int(rng.integers(0, 200)), int(rng.integers(0, 100))
    piece = photograph.crop((left, top, left + 420, top + 315)).resize(SIZE, Image.Resampling.BICUBIC)
    file = folder / split / f"class{number % CLASSES}" / f"{number}.jpg"
    piece.save(file, quality=92)
    return file.stat().st_size


def loader_alone(argv: List[str], device: str) -> Dict[str, Any]:
    """Return the images per second of an epoch without a model, counted after the first batch of each worker."""
    settings = config.resolve(argv)[0]
    with world(choose_device(device, ALONE)) as here:
        loader = build.build(settings, here).train_loader
        batches = iter(loader.epoch(0))
        sizes, begun = 0, 0.0
        for number, batch in enumerate(batches):
            if number == settings.data.workers - 1:
                begun = time.monotonic()
            elif number >= settings.data.workers:
                sizes += len(batch.images)
        seconds = time.monotonic() - begun
    return {"images_per_s": sizes / seconds, "workers": settings.data.workers}


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
