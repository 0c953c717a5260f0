"""timm's transforms, mended where a fresh install breaks the recipe, and put together from the run's settings."""

from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision import transforms


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as the network is shown it; decodes what was only opened, so it raises as Pillow does for a damaged file."""
    if image.mode.startswith("I;16"):  # Pillow would cut every value above 255 down to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def training_transform(
    input_size: Tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "random",
    no_aug: bool = False,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: Optional[float] = 0.4,
    auto_augment_policy: Optional[str] = None,
) -> transforms.Compose:
    """RGB image -> uint8 tensor (3, H, W): random crop, flips, RandAugment (paper, section 4.1).

    Raises:
        Whatever timm raises for a policy that it does not know.
    """
    transform = create_transform(
        input_size,
        is_training=True,
        use_prefetcher=True,  # uint8 out; normalisation, mixing and erasing follow on the device
        no_aug=no_aug,
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter,
        auto_augment=auto_augment_policy,
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
    )
    for step in transform.transforms:
        for op in _augment_ops(step):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = posterize
    return transform


def evaluation_transform(data_config: Dict[str, Any]) -> transforms.Compose:
    """RGB image -> uint8 tensor (3, H, W): resize and centre crop as `timm.data.resolve_data_config` says."""
    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(is_training=False, use_prefetcher=True, **{key: data_config[key] for key in wanted})


def _augment_ops(step: Any) -> Sequence[auto_augment.AugmentOp]:
    if isinstance(step, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
        return step.ops
    if isinstance(step, auto_augment.AutoAugment):
        return [op for sub_policy in step.policy for op in sub_policy]
    return []


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, for 0 bits as well: at the highest magnitudes RandAugment asks for none, which means black.

    Pillow used to answer so and raises ValueError since version 13.
    """
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)
