"""Convert images of every mode and depth to 8-bit RGB, by the range of values that the image itself states.

Pillow alone would clip or cut off what does not fit into 8 bits, and return a black or white image without a word.
"""

import re
from typing import Any, Optional, Tuple

import numpy as np
from PIL import Image

# Largest 8-bit value of an image that counts as nearly black: 12 bits stored in 16 reach 4,095 of 65,535
NEARLY_BLACK = 16
# Numbers of TIFF tags. MinSampleValue and MaxSampleValue (280, 281) are statistics, not the range, by the specification
BITS_PER_SAMPLE, PHOTOMETRIC, COLOUR_MAP, SAMPLE_FORMAT, LOWEST, HIGHEST = 258, 262, 320, 339, 340, 341

NARROWEST = 1000  # longer edge by shorter edge. Transforms scale by the shorter one, and memory must hold the result

Range = Tuple[float, float]  # the values that mean black and white


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image and convert it to RGB.

    8-bit images are converted as Pillow does: transparency is dropped, CMYK is computed without its colour profile.
    Of 16 bits the upper 8 remain. Other numbers are scaled by the range in the image's TIFF tags. Without one, floats
    from 0 to 1, and any numbers from 0 to 255, are taken for that.

    Args:
        image: opened, and better not decoded yet: the depth of 16-bit colour images is known only before.

    Raises:
        ValueError: the range is unknown or wrong, pixels are not finite, the image would be nearly black, its palette
            is missing, or it is as narrow as a line.
        Exception: anything else that a decoder raises for a damaged file.
    """
    check_shape(*image.size)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_numbers(image).convert("RGB")
    was_deep = is_deep(image)
    image.load()
    if image.mode in ("P", "PA"):
        _check_palette(image)
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if was_deep and _is_nearly_black(image if image.mode == "CMYK" else rgb):
        raise ValueError(_too_dark())
    return rgb


def check_shape(width: int, height: int) -> None:
    """Raise ValueError for an image as narrow as a line."""
    if max(width, height) > NARROWEST * min(width, height):
        raise ValueError(f"{width} x {height} pixels: too narrow to be scaled")


def is_deep(image: Image.Image) -> bool:
    """Return whether an image that is not decoded yet has more than 8 bits per channel."""
    if image.mode.startswith("I;16"):
        return True
    for codec, _, _, args in getattr(image, "tile", ()):
        if re.search(r";16[BLN]\b", str(args)) or (
            codec.startswith("ppm") and isinstance(args[-1], int) and args[-1] > 255
        ):
            return True
    return False


def _from_numbers(image: Image.Image) -> Image.Image:
    """Return the greyscale image (mode L) of one in mode I;16, I or F."""
    values = np.asarray(image)
    if image.mode == "I" and _tag(image, BITS_PER_SAMPLE) == 32 and _tag(image, SAMPLE_FORMAT, 1) == 1:
        values = values.view(np.uint32)  # Pillow has signed integers only
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("pixels that are NaN or infinite")
    black, white = _range(image, low, high)
    if low < black or high > white:
        raise ValueError(f"values from {low:g} to {high:g}, outside of its stated range from {black:g} to {white:g}")
    grey = _scale(values, black, white)
    if white > 255 and high > black and grey.max() <= NEARLY_BLACK:
        raise ValueError(_too_dark())
    if _tag(image, PHOTOMETRIC) == 0:  # WhiteIsZero, which Pillow applies to 8 bits only
        grey = 255 - grey
    return Image.fromarray(grey)


def _range(image: Image.Image, low: float, high: float) -> Range:
    """Return the range of an image whose values go from `low` to `high`."""
    stated = _stated_range(image)
    if stated is not None:
        return stated
    if image.mode == "F" and low >= 0 and high <= 1:
        return 0, 1
    if low >= 0 and (NEARLY_BLACK < high <= 255 or high == 0):
        return 0, 255
    raise ValueError(
        f"values from {low:g} to {high:g} in a range that it does not state; save it with 8 bits, or with the TIFF tags "
        "SMinSampleValue and SMaxSampleValue"
    )


def _stated_range(image: Image.Image) -> Optional[Range]:
    if _tag(image, HIGHEST) is not None:
        black, white = float(_tag(image, LOWEST, 0)), float(_tag(image, HIGHEST))
        if np.isfinite([black, white]).all() and black < white:
            return black, white
    if image.mode.startswith("I;16") and image.format != "FITS":  # FITS has signed numbers
        return 0, 2 ** int(_tag(image, BITS_PER_SAMPLE, 16)) - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 0, 2**16 - 1
    if image.mode == "I" and _tag(image, BITS_PER_SAMPLE) == 32 and _tag(image, SAMPLE_FORMAT, 1) == 1:
        return 0, 2**32 - 1
    return None


def _scale(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Return uint8 values, for numbers between black (0) and white (255)."""
    if (black, white) == (0, 255):
        return values.astype(np.uint8)
    if black == 0 and values.dtype.kind in "iu" and np.log2(white + 1).is_integer() and white > 255:
        return (values >> (int(white).bit_length() - 8)).astype(np.uint8)
    return np.rint((values.astype(np.float64) - black) * (255 / (white - black))).astype(np.uint8)


def _is_nearly_black(image: Image.Image) -> bool:
    highest = max(high for _, high in image.getextrema())
    return highest <= NEARLY_BLACK and (highest > 0 or image.mode != "CMYK")  # no ink at all is a white page


def _too_dark() -> str:
    return "16-bit values so small that it would be nearly black; scale 12 bits or less to the full 16, or save 8 bits"


def _check_palette(image: Image.Image) -> None:
    if image.format != "ICNS" and not (image.palette and image.palette.palette):  # Pillow does not show that of ICNS
        raise ValueError("its palette is missing")
    if 0 < max(getattr(image, "tag_v2", {}).get(COLOUR_MAP, (0,))) < 256:
        raise ValueError("the colours of its palette have 8 bits instead of 16, so it would be black")


def _tag(image: Image.Image, number: int, default: Any = None) -> Any:
    """Return the value of a TIFF tag, or the first of several."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) and value else value
