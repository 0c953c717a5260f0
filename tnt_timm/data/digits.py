"""The dataset `digits`: scikit-learn's 1,797 scanned handwritten digits, real images that need no download.

`digits/0-4` holds only these classes: train on some digits and fine-tune on the others.
"""

import re
from typing import List, Tuple

import numpy as np
from PIL import Image

from tnt_timm.errors import UserError

IMG_SIZE = 32


class Digits:
    """One split as 32x32 RGB images, the 8x8 scans enlarged bicubically.

    The split is fixed and stratified, independent of the run's seed: 1,437 training and 360 validation images.

    Args:
        split: "train" or "validation".
        part: the digits to keep, such as "0-4", or empty for all. An image is in the same split either way.

    Raises:
        UserError: `part` is not a range of digits.
    """

    def __init__(self, split: str, part: str = ""):
        from sklearn.datasets import load_digits  # takes a second, which only this dataset needs
        from sklearn.model_selection import train_test_split

        found = re.fullmatch(r"(\d)-(\d)", part or "0-9")
        if not found or found[1] >= found[2]:
            raise UserError(f"dataset: 'digits/{part}': expected digits, or a range of them such as digits/0-4")
        first, last = int(found[1]), int(found[2])
        digits = load_digits()
        train, validation = train_test_split(
            np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
        )
        indices = np.sort(validation if split == "validation" else train)
        labels = digits.target[indices]
        self.indices = indices[(first <= labels) & (labels <= last)]
        self.scans = np.round(digits.images[self.indices] * (255 / 16)).astype(np.uint8)  # (n, 8, 8), ink is bright
        self.targets = (digits.target[self.indices] - first).tolist()
        self.classes: List[str] = [str(digit) for digit in range(first, last + 1)]
        self.split = f"{part} {split}".lstrip()

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        scan = Image.fromarray(self.scans[index])
        return scan.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).convert("RGB"), self.targets[index]

    def name(self, index: int) -> str:
        return f"digits {self.split} image {index}"
