"""Write folders of JPEGs of ImageNet's sizes, cut from scikit-learn's two photographs, for measurements of speed."""

import functools
import io
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import List, Tuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

CLASSES = 8
# Most files of ImageNet have 500 pixels along one edge
SIZES = [(500, 375)] * 6 + [(375, 500)] * 2 + [(500, 333), (333, 500), (500, 500), (640, 480)]
QUALITY = 92
SENSOR_NOISE = 6  # grey levels, standard deviation


def write_images(folder: Path, count: int) -> int:
    """Write `count` images to FOLDER/train and a few to FOLDER/val, in class folders. Return the mean bytes of a file."""
    parts = {"train": count, "val": max(64, count // 64)}
    for split in parts:
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
    photographs()  # before the processes are forked
    places = [(folder / split, number) for split, total in parts.items() for number in range(total)]
    with ProcessPoolExecutor() as processes:
        sizes = list(processes.map(_write, places, chunksize=64))
    return round(sum(sizes) / len(sizes))


@functools.cache
def photographs() -> List[Image.Image]:
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def large_photograph(width: int, height: int, number: int) -> bytes:
    """Return a JPEG of an enlarged photograph. Without noise, as sensors add it, the file would be too small."""
    rng = np.random.default_rng(number)
    pixels = np.asarray(photographs()[number % 2].resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = pixels + rng.normal(0, SENSOR_NOISE, (height, width, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _write(place: Tuple[Path, int]) -> int:
    folder, number = place
    rng = np.random.default_rng([number, folder.name == "val"])
    width, height = SIZES[rng.integers(len(SIZES))]
    photograph = photographs()[rng.integers(2)]
    scale = rng.uniform(0.5, 0.85)  # of the photograph, which has 640 x 427 pixels
    part_width, part_height = (
        int(scale * edge) for edge in ((427 * width / height, 427) if width < height else (640, 427))
    )
    left, top = int(rng.integers(0, 640 - part_width + 1)), int(rng.integers(0, 427 - part_height + 1))
    part = photograph.crop((left, top, left + part_width, top + part_height))
    file = folder / f"class{number % CLASSES}" / f"{number}.jpg"
    part.resize((width, height), Image.Resampling.BICUBIC).save(file, quality=QUALITY)
    return file.stat().st_size
