"""The images that figures show: one by name, or a labelled set."""

import re
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from sklearn.datasets import load_sample_image
from torch import Tensor

from tnt_timm.data.datasets import ImageSet, StreamSet
from tnt_timm.data.decoding import DamagedImage, read_image
from tnt_timm.data.digits import Digits
from tnt_timm.data.transforms import evaluation_transform
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures.network import NetworkSettings
from tnt_timm.settings.paths import PathText

PHOTOGRAPHS = ("china", "flower")  # these ship with scikit-learn


class ImageSettings(NetworkSettings):
    """Networks and image"""

    image: PathText = Field(
        "china", description="a file, china or flower (scikit-learn's), or digits/N (validation image N)"
    )
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square input in pixels (default: the model's)")

    @field_validator("image")
    @classmethod
    def _is_an_image(cls, image: str) -> str:
        if not (Path(image).is_file() or image in PHOTOGRAPHS or re.fullmatch(r"digits/\d+", image)):
            raise ValueError(f"{image}: no such file; give a file, {', '.join(PHOTOGRAPHS)} or digits/N")
        return image


class Shown(NamedTuple):
    """An image as people and as the network see it."""

    pixels: np.ndarray  # (H, W, 3) uint8, before normalisation
    tensor: Tensor  # (1, 3, H, W)
    caption: str


def open_image(name: str) -> Image.Image:
    """Return the RGB image of a name. Raise UserError if it cannot be read."""
    if name in PHOTOGRAPHS:
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    if not Path(name).exists():
        digits, index = Digits("validation"), int(name.removeprefix("digits/"))
        if index >= len(digits):
            raise ConfigError(f"image: {name}: the last digit is digits/{len(digits) - 1}")
        return digits.load(index)[0]
    try:
        return read_image(name)
    except DamagedImage as error:
        raise UserError(f"{name}: not a readable image: {error}") from None


def show(name: str, preprocessing: Dict[str, Any]) -> Shown:
    """Return the central square of an image, preprocessed as `timm.data.resolve_data_config` says.

    Only the longer edge is cropped.
    """
    transform = evaluation_transform({**preprocessing, "crop_pct": 1.0, "crop_mode": "center"})
    pixels = torch.as_tensor(transform(open_image(name)))
    caption = f"{Path(name).name if Path(name).exists() else name}, {pixels.shape[1]} pixels"
    return Shown(pixels.permute(1, 2, 0).numpy(), normalise(pixels[None], preprocessing), caption)


def normalise(images: Tensor, preprocessing: Dict[str, Any]) -> Tensor:
    """Turn uint8 images (B, 3, H, W) into normalised float32."""
    mean, std = (torch.tensor(preprocessing[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


def labelled(
    images: Union[ImageSet, StreamSet], preprocessing: Dict[str, Any], count: int, seed: int
) -> Tuple[Tensor, np.ndarray]:
    """Return at most `count` random images of a labelled set, uint8 (n, 3, H, W), and their classes (n,).

    Raise UserError if one cannot be read, or if the set is a stream.
    """
    if isinstance(images, StreamSet):
        raise UserError("dataset: images cannot be drawn at random from a stream (wds/); use another kind of dataset")
    transform = evaluation_transform(preprocessing)
    pixels, targets = [], []
    for index in np.sort(np.random.default_rng(seed).permutation(len(images))[:count]).tolist():
        try:
            image, target = images.load(index)
        except DamagedImage as error:
            raise UserError(f"{images.name(index)}: not a readable image: {error}; repair or remove the file") from None
        pixels.append(torch.as_tensor(transform(image)))
        targets.append(target)
    return torch.stack(pixels), np.array(targets)
