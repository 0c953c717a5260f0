"""The images that figures show, as people see them and as the network does.

An image is named by its path, by `china` or `flower` (the two photographs that ship with scikit-learn), or by `digits/N`
(image N of the digits that the quick start validates on). A folder stands for the images right in it: a picture each.
"""

import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Set, Union

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from tnt_timm.data.datasets import DAMAGE, ImageSet, StreamSet
from tnt_timm.data.digits import Digits
from tnt_timm.data.folders import images_of
from tnt_timm.data.transforms import evaluation_transform, to_rgb
from tnt_timm.errors import ConfigError, UserError, one_line

PHOTOGRAPHS = ("china", "flower")


class Damaged(UserError):
    """An image that cannot be read; the line names it."""


class Shown(NamedTuple):
    """One image."""

    pixels: np.ndarray  # (H, W, 3) uint8, what is fed, before normalisation
    tensor: torch.Tensor  # (1, 3, H, W), what the network sees


def check_name(name: str) -> None:
    """Find out before the slow part whether a name can be one of an image.

    Raises:
        ConfigError: it cannot.
    """
    kind, _, number = name.partition("/")
    if not (Path(name).exists() or name in PHOTOGRAPHS or (kind == "digits" and number.isdecimal())):
        raise ConfigError(f"image: {name}: no such file or folder, nor {' or '.join(PHOTOGRAPHS)} or digits/NUMBER")


def images_in(folder: Path) -> List[str]:
    """The paths of the images right in a folder, sorted.

    Raises:
        UserError: there are none.
    """
    inside = [file for file, _ in images_of(folder) if Path(file).parent == folder]
    if not inside:
        raise UserError(f"image: {folder}: no images right in this folder")
    return inside


def open_image(name: str) -> Image.Image:
    """The RGB image of a name.

    Raises:
        ConfigError: there is none.
        Damaged: it cannot be read.
    """
    check_name(name)
    if Path(name).exists():
        return _open(Path(name))
    if name in PHOTOGRAPHS:
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    return _digit(int(name.partition("/")[2]))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # a decoder meets a file of any kind; what it stumbles over is its own
        raise Damaged(f"{path}: not a readable image: {one_line(error)}") from None


def _digit(number: int) -> Image.Image:
    digits = Digits("validation")
    if number >= len(digits):
        raise ConfigError(f"image: digits/{number}: there are {len(digits)} digits, counted from 0")
    return digits.load(number)[0]


def show(image: Image.Image, preprocessing: Dict[str, Any]) -> Shown:
    """The central square of an image as the network sees it.

    Args:
        image: RGB.
        preprocessing: as `timm.data.resolve_data_config` says it; nothing is cropped besides the longer edge.
    """
    pixels = evaluation_transform({**preprocessing, "crop_pct": 1.0, "crop_mode": "center"})(image)
    pixels = torch.as_tensor(pixels)
    return Shown(pixels.permute(1, 2, 0).numpy(), normalised(pixels[None], preprocessing))


def normalised(images: torch.Tensor, preprocessing: Dict[str, Any]) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32."""
    mean, std = (torch.tensor(preprocessing[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


def folders_of(images: Union[ImageSet, StreamSet]) -> Set[Path]:
    """The folders in which the files of a labelled set lie."""
    names = [] if isinstance(images, StreamSet) else map(images.name, range(len(images)))
    return {Path(folder) for folder in {os.path.dirname(name) for name in names} if folder}


class Labelled(NamedTuple):
    """Images of a labelled set."""

    pixels: torch.Tensor  # (n, 3, H, W) uint8
    targets: np.ndarray  # (n,)
    left_out: List[str]  # a line per image that could not be read


def labelled(images: Union[ImageSet, StreamSet], preprocessing: Dict[str, Any], count: int, seed: int) -> Labelled:
    """At most `count` images of a labelled set, drawn at random; those that cannot be read are left out.

    Raises:
        UserError: none can be read, or the set is a stream.
    """
    if isinstance(images, StreamSet):
        raise UserError("dataset: a stream (wds/) has no images to draw from; pass another kind of data set")
    transform = evaluation_transform(preprocessing)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(images))[:count])
    pixels, targets, left_out = [], [], []
    for index in drawn.tolist():
        try:
            image, target = images.load(index)
        except DAMAGE as error:
            left_out.append(f"{images.name(index)}: not a readable image: {one_line(error)}")
            continue
        pixels.append(torch.as_tensor(transform(image)))
        targets.append(target)
    if not pixels:
        raise UserError(f"dataset: none of its images can be read; the first: {left_out[0]}")
    return Labelled(torch.stack(pixels), np.array(targets), left_out)
