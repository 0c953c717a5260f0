"""The images that figures show: one by name, or a labelled set."""

import re
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from sklearn.datasets import load_sample_image
from torch import Tensor

from tnt_timm.data.datasets import ImageSet, StreamSet, open_dataset
from tnt_timm.data.decoding import DamagedImage, read_image
from tnt_timm.data.transforms import evaluation_transform
from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures.network import Network, NetworkSettings
from tnt_timm.settings.paths import PathText

PHOTOGRAPHS = ("china", "flower")  # these ship with scikit-learn
OF_DATASET = re.compile(r"(digits|torch/\w+)/(\d+)")  # an image by its number


class ImageSettings(NetworkSettings):
    """Networks and image"""

    image: PathText = Field(
        "china", description="a file, china or flower (scikit-learn's), or validation image N: digits/N, torch/NAME/N"
    )
    data_dir: PathText = Field("", description="folder of a torch/ dataset")
    img_size: Optional[int] = Field(None, gt=0, description="edge of the square input in pixels (default: the model's)")

    @field_validator("image")
    @classmethod
    def _is_an_image(cls, image: str) -> str:
        if not (Path(image).is_file() or image in PHOTOGRAPHS or OF_DATASET.fullmatch(image)):
            raise ValueError(f"{image}: no such file; give a file, {', '.join(PHOTOGRAPHS)}, digits/N or torch/NAME/N")
        return image


class DatasetSettings(NetworkSettings):
    """Networks and dataset"""

    dataset: PathText = Field(
        "", description="as in train.py (default: the validation data of the first network's run)"
    )
    data_dir: PathText = Field("", description="folder of the dataset")
    split: Optional[str] = Field(None, min_length=1, description="split (default: validation, or the run's val_split)")
    num_images: int = Field(1000, gt=3, description="use at most this many images, drawn at random")


class Shown(NamedTuple):
    """An image as people and as the network see it."""

    pixels: np.ndarray  # (H, W, 3) uint8, before normalisation
    tensor: Tensor  # (1, 3, H, W)
    caption: str


def open_image(name: str, data_dir: str = "") -> Image.Image:
    """Return the RGB image of a name. Raise UserError if it cannot be read."""
    if name in PHOTOGRAPHS:
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    try:
        if Path(name).exists():
            return read_image(name)
        dataset, number = OF_DATASET.fullmatch(name).groups()
        images = open_dataset(dataset, data_dir, "validation", False)
        if int(number) >= len(images):
            raise ConfigError(f"image: {name}: the last image is {dataset}/{len(images) - 1}")
        return images.load(int(number))[0]
    except DamagedImage as error:
        raise UserError(f"{name}: not a readable image: {error}") from None


def show(own: ImageSettings, preprocessing: Dict[str, Any]) -> Shown:
    """Return the central square of the image, preprocessed as `timm.data.resolve_data_config` says.

    Only the longer edge is cropped.
    """
    name = own.image
    transform = evaluation_transform({**preprocessing, "crop_pct": 1.0, "crop_mode": "center"})
    pixels = torch.as_tensor(transform(open_image(name, own.data_dir)))
    caption = f"{Path(name).name if Path(name).exists() else name}, {pixels.shape[1]} pixels"
    return Shown(pixels.permute(1, 2, 0).numpy(), normalise(pixels[None], preprocessing), caption)


def normalise(images: Tensor, preprocessing: Dict[str, Any]) -> Tensor:
    """Turn uint8 images (B, 3, H, W) into normalised float32."""
    mean, std = (torch.tensor(preprocessing[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


def dataset_of(networks: Sequence[Network], own: DatasetSettings) -> Union[ImageSet, StreamSet]:
    """Open the dataset of the settings, by default the one of the first network's run.

    Raise UserError if it cannot be opened, or if the figure would be written into it.
    """
    source = networks[0].opened.source
    settings = {} if own.dataset or own.data_dir or source is None else source.settings()
    name, data_dir = (settings.get(key) or getattr(own, key) for key in ("dataset", "data_dir"))
    split = own.split or settings.get("val_split") or "validation"
    dataset = open_dataset(split=split, is_training=False, name=name, data_dir=data_dir)
    if data_dir and Path(own.output).resolve().is_relative_to(Path(data_dir).resolve()):
        raise ConfigError(f"output: {own.output}: lies in the dataset that is read; choose another folder")
    return dataset


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
