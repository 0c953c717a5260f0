"""timm's transforms, with a fix for RandAugment on Pillow 13."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor

Transform = Callable[[Image.Image], Tensor]  # RGB image -> uint8 tensor (3, H, W)


def training_transform(
    input_size: Tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "random",
    auto_augment_policy: Optional[str] = None,
    **options: Any,
) -> Transform:
    """Return the augmentation of training images: random crop, flips, RandAugment (paper, section 4.1).

    Args:
        input_size, mean, std: of the model. The mean fills what RandAugment leaves empty.
        options: of `timm.data.create_transform`, such as `scale`, `hflip` or `color_jitter`.

    Raises:
        AssertionError, KeyError, ValueError: timm does not know the policy.
    """
    transform = create_transform(
        input_size,
        is_training=True,
        use_prefetcher=True,  # return uint8: normalisation, mixing and erasing follow on the device
        auto_augment=auto_augment_policy,
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
        **options,
    )
    for step in transform.transforms:
        sub_policies = getattr(step, "policy", None) or [
            getattr(step, "ops", ())
        ]  # AutoAugment, or RandAugment and AugMix
        for op in (op for ops in sub_policies for op in ops):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = posterize
    return transform


def evaluation_transform(data_config: Dict[str, Any]) -> Transform:
    """Return the resizing and cropping that a config of `timm.data.resolve_data_config` describes."""
    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(is_training=False, use_prefetcher=True, **{key: data_config[key] for key in wanted})


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, but a black image for 0 bits, which RandAugment asks for at the highest magnitudes.

    Pillow used to return black as well. Since version 13 it raises ValueError.
    """
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)
