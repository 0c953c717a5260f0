"""The data set `digits`: scikit-learn's 1,797 scanned handwritten digits, real images that need no download."""

from typing import List, Tuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMG_SIZE = 32


class Digits:
    """One split as 32x32 RGB images, the 8x8 scans enlarged bicubically.

    The split is fixed and stratified: 1,437 images to train with and 360 to validate on, whatever the seed of the run.

    Args:
        split: "train" or "validation".
    """

    classes: List[str] = [str(digit) for digit in range(10)]

    def __init__(self, split: str):
        digits = load_digits()
        train, validation = train_test_split(
            np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
        )
        self.split = split
        self.indices = np.sort(validation if split == "validation" else train)
        self.scans = np.round(digits.images[self.indices] * (255 / 16)).astype(np.uint8)  # (n, 8, 8), ink is bright
        self.targets = digits.target[self.indices].tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        scan = Image.fromarray(self.scans[index])
        return scan.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).convert("RGB"), self.targets[index]

    def name(self, index: int) -> str:
        return f"digits {self.split} image {index}"
