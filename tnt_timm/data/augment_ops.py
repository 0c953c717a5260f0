"""timm's augmentation operations for a batch of images on any device, in Pillow's arithmetic and in timm's order.

Each takes uint8 images (n, 3, H, W), one number per image (n), and returns uint8 images. Shears, translations and rotations are
one warp. The tables at the end say which of timm's operations they stand for. Nothing here is random, loops over images, or
waits for the device.
"""

import math
import random
from typing import Callable, Dict, Sequence, Tuple

import torch
from timm.data import auto_augment as timms
from torch import Tensor
from torch.nn import functional as F

BLUR_PASSES = 3  # of the box blur that stands for a Gaussian
BLUR_REACH = 2  # pixels that it takes on each side. timm's largest standard deviation is 2


def warp(images: Tensor, matrices: Tensor, resample: int, fill: Tensor) -> Tensor:
    """Return images whose pixel at (x, y) is the given one's at (a x + b y + c, d x + e y + f).

    Args:
        images: (n, 3, H, W), uint8.
        matrices: (n, 6), float64: a to f. The centre of the first pixel is at (0.5, 0.5).
        resample: one of Pillow's numbers for bilinear and bicubic.
        fill: (3,), uint8, on the device: RGB of pixels from outside of an image.
    """
    height, width = images.shape[-2:]
    x, y = (torch.arange(size, device=images.device, dtype=torch.float64) + 0.5 for size in (width, height))
    by_x, by_y, constant = matrices.view(-1, 2, 3, 1, 1).unbind(2)
    place = by_x * x + by_y * y[:, None] + constant  # (n, 2, H, W): x and y in the given images
    taps, blend = FILTERS[resample]
    first = (place - 0.5).floor()
    between = (place - 0.5 - first).float()
    # the pixels around each place, `taps` in each direction, of which it is between the inner two
    reach = torch.arange(1 - taps // 2, 1 + taps // 2, device=images.device)
    columns, rows = (start.unsqueeze(1) + reach.view(-1, 1, 1) for start in first.long().unbind(1))  # (n, taps, H, W)
    columns, row_starts = columns.clamp_(0, width - 1), rows.clamp_(0, height - 1).mul_(width)
    pixels = images.flatten(2).float()

    def of_column(column: Tensor) -> Tensor:
        """Return the pixels in all rows, (n, 3, taps, H, W)."""
        index = (row_starts + column.unsqueeze(1)).flatten(1).unsqueeze(1).expand(-1, 3, -1)
        return pixels.gather(2, index).view(-1, 3, *row_starts.shape[1:])

    across, down = between[:, None, None, 0], between[:, None, 1]
    lines = blend(*(of_column(column) for column in columns.unbind(1)), across)
    blended = blend(*lines.unbind(2), down)
    inside = (place >= 0).all(1) & (place[:, 0] < width) & (place[:, 1] < height)
    return torch.where(inside.unsqueeze(1), _cut(blended), fill.view(3, 1, 1))


def _linear(first: Tensor, second: Tensor, between: Tensor) -> Tensor:
    return first.lerp(second, between)


def _cubic(v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor, between: Tensor) -> Tensor:
    """Return v2 + t (v3 - v1 + t (2 a + b - t (a + b))) with a = v1 - v2 and b = v3 - v4: equal pixels give the same again."""
    a, b = v1 - v2, v3 - v4
    slope = a + b
    inner = a.mul_(2).add_(b).addcmul_(between, slope, value=-1)
    return (v3 - v1).addcmul_(between, inner).mul_(between).add_(v2)


# Pillow's number of a filter -> pixels per direction, and how to blend them
FILTERS: Dict[int, Tuple[int, Callable[..., Tensor]]] = {2: (2, _linear), 3: (4, _cubic)}


def rotation(degrees: float, height: int, width: int) -> Tuple[float, ...]:
    """Return the matrix that turns counter-clockwise around the centre, as `Image.rotate` computes it."""
    angle = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to the range from 0 to 255."""
    pixels = images.flatten(2)
    low, high = (edge.double().unsqueeze(2) for edge in (pixels.amin(2), pixels.amax(2)))
    scale = 255.0 / (high - low)
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    stretched = _cut(levels * scale + -low * scale)
    return _look_up(images, torch.where(high > low, stretched, levels.to(torch.uint8)))


def invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Make the levels of each channel equally frequent."""
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    of_brightest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - of_brightest) // 255
    darker = counts.cumsum(2) - counts
    levels = torch.arange(256, device=images.device)
    equal = (step // 2 + darker) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, equal, levels).clamp(max=255).to(torch.uint8))


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert levels from a threshold on."""
    return torch.where(images < _each(threshold), images, 255 - images)


def solarize_add(images: Tensor, addend: Tensor) -> Tensor:
    """Brighten levels below 128."""
    return torch.where(images < 128, (images + _each(addend).short()).clamp(max=255).to(torch.uint8), images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the uppermost bits, none to all eight."""
    lower = 2 ** (8 - bits.clamp(0, 8).long()) - 1
    return images & _each(255 - lower).to(torch.uint8)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey of the image."""
    grey = _grey(images)
    size = grey[0].numel()
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + size) // (2 * size)  # rounded
    return _blend(mean, images, factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image. A factor of 0 leaves grey, 1 changes nothing."""
    return _blend(_grey(images), images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed image. A factor below 1 blurs, one above sharpens."""
    smooth = images.clone()
    centre = images[..., 1:-1, 1:-1].short()
    around = F.avg_pool2d(images.float(), 3, 1, divisor_override=1).short() + 4 * centre
    smooth[..., 1:-1, 1:-1] = (2 * around + 13) // 26  # a thirteenth, rounded. Edges stay as they are
    return _blend(smooth, images, factor)


def blur(images: Tensor, radius: Tensor) -> Tensor:
    """Blur like a Gaussian whose standard deviation is `radius`, by box blurs whose edges count in part."""
    variance = radius.float() ** 2 / BLUR_PASSES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    weight = (2**24 / (2 * (whole + part) + 1)).long()  # of a pixel, in parts of 2^24
    edge = (2**24 - (2 * whole.long() + 1) * weight) // 2
    whole = _each(whole.long())
    shares = [
        torch.where(whole >= distance, _each(weight), torch.where(whole + 1 == distance, _each(edge), 0))
        for distance in range(BLUR_REACH + 1)
    ]
    for _ in range(2):  # along the rows, then along the columns
        for _ in range(BLUR_PASSES):
            images = _box_blur(images, shares)
        images = images.transpose(2, 3)
    return images


def _box_blur(images: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """Average along the rows. `shares` are those of a pixel, of both beside it, and so on, in parts of 2^24."""
    reach, width = len(shares) - 1, images.shape[-1]
    wide = F.pad(images.float(), (reach, reach, 0, 0), mode="replicate").long()
    total = shares[0] * wide[..., reach : reach + width] + 2**23
    for distance in range(1, reach + 1):
        left, right = (wide[..., reach + offset : reach + offset + width] for offset in (-distance, distance))
        total += shares[distance] * (left + right)
    return (total >> 24).to(torch.uint8)


def _each(numbers: Tensor) -> Tensor:
    """Return one number per image (n) in a shape that meets images, (n, 1, 1, 1)."""
    return numbers.view(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    """Return the brightness of images, (n, 1, H, W), as Pillow computes it."""
    red, green, blue = images.int().unbind(1)
    return ((red * 19595).add(green, alpha=38470).add(blue, alpha=7471).add(2**15) >> 16).unsqueeze(1)


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return `other` for a factor of 0, `images` for 1, and what is between or beyond them for others."""
    other = other.float()
    return _cut(other + _each(factor).float() * (images.float() - other))


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each level by that of the channel's table (n, 3, 256)."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _cut(values: Tensor) -> Tensor:
    """Cut values off to 8 bits, as Pillow does: towards zero."""
    return values.clamp(0, 255).to(torch.uint8)


# timm's operation -> matrix of a warp, from timm's argument and the size of the image
MATRICES: Dict[Callable, Callable[[float, int, int], Tuple[float, ...]]] = {
    timms.shear_x: lambda factor, height, width: (1, factor, 0, 0, 1, 0),
    timms.shear_y: lambda factor, height, width: (1, 0, 0, factor, 1, 0),
    timms.translate_x_rel: lambda part, height, width: (1, 0, part * width, 0, 1, 0),
    timms.translate_y_rel: lambda part, height, width: (1, 0, 0, 0, 1, part * height),
    timms.translate_x_abs: lambda pixels, height, width: (1, 0, pixels, 0, 1, 0),
    timms.translate_y_abs: lambda pixels, height, width: (1, 0, 0, 0, 1, pixels),
    timms.rotate: rotation,
}
# timm's operation -> that for a batch, and its number for an image from timm's arguments
CHANGES: Dict[Callable, Tuple[Callable[[Tensor, Tensor], Tensor], Callable[..., float]]] = {
    timms.auto_contrast: (auto_contrast, lambda: 0),
    timms.invert: (invert, lambda: 0),
    timms.equalize: (equalize, lambda: 0),
    timms.solarize: (solarize, lambda threshold: threshold),
    timms.solarize_add: (solarize_add, lambda addend: addend),
    timms.posterize: (posterize, lambda bits: bits),
    timms.contrast: (contrast, lambda factor: factor),
    timms.color: (color, lambda factor: factor),
    timms.brightness: (brightness, lambda factor: factor),
    timms.sharpness: (sharpness, lambda factor: factor),
    timms.gaussian_blur: (blur, lambda radius: radius),
    timms.gaussian_blur_rand: (blur, lambda factor: random.uniform(0.1, 2.0 * factor)),
    timms.desaturate: (color, lambda factor: min(1.0, max(0.0, 1.0 - factor))),
}
