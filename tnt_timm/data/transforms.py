"""timm's transforms, with a fix for RandAugment on Pillow 13, whole or split between worker and device."""

import random
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import Compose, InterpolationMode
from torchvision.transforms.functional import pil_to_tensor

from tnt_timm.data.device_augment import DeviceAugment

# RGB image -> uint8 tensor (3, H, W), or (H, W, 3) for a `DeviceAugment`. Images may be tensors already, if a dataset is
# opened with `decode_fast`
Transform = Callable[[Union[Image.Image, Tensor]], Tensor]


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
    options.update(interpolation=interpolation, auto_augment=auto_augment_policy)
    transform = _timms(input_size, mean, std, **options)
    for step in transform.transforms:
        sub_policies = getattr(step, "policy", None) or [
            getattr(step, "ops", ())
        ]  # AutoAugment, or RandAugment and AugMix
        for op in (op for ops in sub_policies for op in ops):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = posterize
    return transform


def split_training_transform(
    input_size: Tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    interpolation: str = "random",
    auto_augment_policy: Optional[str] = None,
    **options: Any,
) -> Tuple[Transform, DeviceAugment]:
    """Return the same augmentation in two parts: crop and flips for the workers, colours and shapes for the device.

    With the same random numbers, both parts together give the images of `training_transform`, except that crops are resized on
    tensors. This rounds differently: by one grey level in some pixels, and with the bicubic filter by more at a few sharp edges.

    Args:
        as of `training_transform`.

    Returns:
        The part for the workers, whose tensors are (H, W, 3) as decoders write them, and the part for the device.

    Raises:
        AssertionError, KeyError: timm does not know the policy.
        ValueError: a part of it needs `training_transform`. The message names the part.
    """
    options.update(interpolation=interpolation, auto_augment=auto_augment_policy)
    first, second, _ = _timms(input_size, mean, std, separate=True, **options)
    crop, *flips = first.transforms
    augment = DeviceAugment(second.transforms, input_size[1:])
    return Compose([_as_tensor, _Crop(crop), *flips, _channels_last]), augment


def _timms(input_size: Tuple[int, int, int], mean: Sequence[float], std: Sequence[float], **options: Any) -> Any:
    """Return timm's transform to uint8. Normalisation, mixing and erasing follow on the device."""
    settings = dict(is_training=True, use_prefetcher=True, mean=tuple(mean), std=tuple(std))
    return create_transform(input_size, **settings, **options)


def _as_tensor(image: Union[Image.Image, Tensor]) -> Tensor:
    return image if isinstance(image, Tensor) else pil_to_tensor(image)


def _channels_last(image: Tensor) -> Tensor:
    """Return (3, H, W) as (H, W, 3), which is its order in memory already: a view, not a copy."""
    return image.permute(1, 2, 0)


class _Crop:
    """timm's random crop of a tensor (3, H, W), uint8. Its channels are the last in memory, before and after."""

    def __init__(self, crop: RandomResizedCropAndInterpolation):
        self.crop = crop
        self.filters = crop.interpolation if isinstance(crop.interpolation, tuple) else (crop.interpolation,)
        if not {*self.filters} <= {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}:
            raise ValueError(f"the filter {self.filters[0].value} of train_interpolation")

    def __call__(self, image: Tensor) -> Tensor:
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        chosen = random.choice(self.filters) if len(self.filters) > 1 else self.filters[0]
        if not height or not width:  # of an image of a few pixels. From Pillow, it would be black as well
            return image.new_zeros(*self.crop.size, 3).permute(2, 0, 1)
        part = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
        packed = part.unsqueeze(0).permute(0, 3, 1, 2)  # as a view of `image`, it would be copied twice
        return interpolate(packed, self.crop.size, mode=chosen.value, antialias=True)[0]


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
