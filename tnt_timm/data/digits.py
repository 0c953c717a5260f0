"""The data set `digits`: scikit-learn's 1,797 scanned handwritten digits, real images that need no download.

`digits/0-4` is a part of its classes: to train on some and fine-tune on others.
"""

import re
from typing import List, Tuple

import numpy as np
from PIL import Image

from tnt_timm.errors import UserError

IMG_SIZE = 32


class Digits:
    """One split as 32x32 RGB images, the 8x8 scans enlarged bicubically.

    The split is fixed and stratified: 1,437 images to train with and 360 to validate on, whatever the seed of the run.

    Args:
        split: "train" or "validation".
        part: the digits to keep, as "0-4"; empty for all. The images of a part are in the same split as among all.

    Raises:
        UserError: a part that is none.
    """

    def __init__(self, split: str, part: str = ""):
        from sklearn.datasets import load_digits  # takes a second, which only the digits need
        from sklearn.model_selection import train_test_split

        kept = _digits_of(part)
        digits = load_digits()
        train, validation = train_test_split(
            np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
        )
        self.split = f"{part} {split}".lstrip()
        indices = np.sort(validation if split == "validation" else train)
        self.indices = indices[np.isin(digits.target[indices], kept)]
        self.classes: List[str] = [str(digit) for digit in kept]
        self.scans = np.round(digits.images[self.indices] * (255 / 16)).astype(np.uint8)  # (n, 8, 8), ink is bright
        self.targets = (digits.target[self.indices] - kept[0]).tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Tuple[Image.Image, int]:
        scan = Image.fromarray(self.scans[index])
        return scan.resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).convert("RGB"), self.targets[index]

    def name(self, index: int) -> str:
        return f"digits {self.split} image {index}"


def _digits_of(part: str) -> range:
    found = re.fullmatch(r"(\d)-(\d)", part or "0-9")
    if not found or found[1] >= found[2]:
        raise UserError(f"dataset: 'digits/{part}': expected digits, or a part of them as digits/0-4")
    return range(int(found[1]), int(found[2]) + 1)
