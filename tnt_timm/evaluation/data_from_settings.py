"""Open the dataset, preprocessing and evaluation loader that the settings ask for."""

from typing import Any, Dict, Optional, Union

from timm.data import resolve_data_config
from torch import nn

from tnt_timm.data.datasets import ImageSet, StreamSet, check_several_classes, open_dataset
from tnt_timm.data.decoding import Decoder, decode
from tnt_timm.data.loader import EvaluationLoader
from tnt_timm.data.transforms import evaluation_transform
from tnt_timm.runtime.distributed import World
from tnt_timm.settings.schema import Data


def open_split(
    data: Data,
    split: str,
    is_training: bool,
    num_samples: Optional[int] = None,
    seed: int = 0,
    decoder: Decoder = decode,
) -> Union[ImageSet, StreamSet]:
    options = {key: getattr(data, key) for key in ("class_map", "input_key", "target_key", "batch_size")}
    options.update(download=data.dataset_download, num_samples=num_samples, seed=seed, decoder=decoder)
    images = open_dataset(data.dataset, data.data_dir, split, is_training, **options)
    check_several_classes(images, f"{data.dataset}, split {split}")
    return images


def data_config(data: Data, img_size: Optional[int], model: nn.Module) -> Dict[str, Any]:
    """Return input size, normalization, resize and crop. The model's own values are the defaults of the settings."""
    keys = ("crop_pct", "mean", "std", "interpolation")
    return resolve_data_config({"img_size": img_size, **{key: getattr(data, key) for key in keys}}, model=model)


def evaluation_loader(
    images: Union[ImageSet, StreamSet], preprocessing: Dict[str, Any], batch_size: int, workers: int, world: World
) -> EvaluationLoader:
    return EvaluationLoader(
        images,
        evaluation_transform(preprocessing),
        batch_size=batch_size,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        device=world.device,
        workers=workers,
        rank=world.rank,
        world_size=world.size,
    )
