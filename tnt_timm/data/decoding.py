"""Decode image files of any format to RGB, with one exception for everything that can be wrong with a file.

`decode` returns Pillow images and is the reference. `decode_fast` returns tensors of the same pixels.
"""

import contextlib
import errno
import io
import logging
import os
import warnings
from typing import BinaryIO, Callable, Iterator, Tuple, Type, Union

import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from PIL.Image import DecompressionBombError
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from tnt_timm.data.pixels import check_shape, to_rgb
from tnt_timm.data.workers import worker_failure
from tnt_timm.errors import UserError, one_line

MAX_PIXELS = 2**29  # 23,170 x 23,170: what 2 GiB hold. A small file that claims more would fill the memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above this, and refuses twice as many before it decodes
# Pillow refuses PNGs with a longer piece of metadata than 1 MiB, as image editors write them. Its limit for all remains
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
HEAD = 16  # bytes shown of a file that is no image
ORDINARY = 2**26  # bytes. If there is memory for these, but not for a file, it is the file that demands too much

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints Pillow's errors on the screen


class DamagedImage(Exception):
    """An image that cannot be used. The message is the reason, in one line."""


def decode(file: BinaryIO) -> Image.Image:
    """Return the RGB image of an open file, which stays open. Raise DamagedImage if it cannot be read."""
    with quiet(), open_image(file) as image:
        return to_rgb(image)


def decode_fast(file: BinaryIO) -> Tensor:
    """Return the pixels that `decode` returns, as uint8 (3, H, W), and raise what it raises.

    simplejpeg decodes the usual JPEGs. Pillow decodes all other files, and those that simplejpeg refuses. A few JPEGs with
    damaged metadata are read that `decode` refuses.
    """
    with as_damage():
        content = file.read()
    try:
        height, width, colours, _ = decode_jpeg_header(content)
        if colours in ("YCbCr", "Gray") and height * width <= MAX_PIXELS:
            check_shape(width, height)
            return torch.from_numpy(decode_jpeg(content)).permute(2, 0, 1)
    except Exception as error:  # Pillow says what is wrong, or decodes
        if worker_failure(error) is not None:
            raise
    return pil_to_tensor(decode(io.BytesIO(content)))


Decoder = Callable[[BinaryIO], Union[Image.Image, Tensor]]


def read_image(path: Union[str, os.PathLike], decoder: Decoder = decode) -> Union[Image.Image, Tensor]:
    """Return the RGB image of a file, as the decoder returns it. Raise DamagedImage if it cannot be read."""
    with as_damage(), open(path, "rb") as file:
        return decoder(file)


@contextlib.contextmanager
def open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """Open an image in Pillow's way, not decoded yet. What goes wrong in the body of the `with` is damage as well."""
    with as_damage():
        try:
            opened = Image.open(file)
        except UnidentifiedImageError:
            file.seek(0)
            head = file.read(HEAD)
            why = f"not an image that can be read: it begins with {head!r}" if head else "an empty file"
            raise DamagedImage(why) from None
        with opened as image:
            yield image


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of Pillow, e.g. one for each photograph with damaged EXIF data. `tnt-check` shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def as_damage(kinds: Tuple[Type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn whatever a decoder raises into DamagedImage, unless it is not the file's fault.

    Args:
        kinds: of errors that are damage.

    Raises:
        DamagedImage: the file is missing or damaged, or needs more memory than there is.
        UserError: the machine is short of memory or open files.
        RuntimeError: a worker died meanwhile, see `data.workers.worker_failure`.
    """
    try:
        yield
    except (DamagedImage, UserError):
        raise
    except MemoryError:
        try:
            bytearray(ORDINARY)
        except MemoryError:
            raise UserError("out of memory while decoding an image; lower --workers or --batch-size") from None
        raise DamagedImage("decoding it needs more memory than there is") from None
    except kinds as error:  # decoders raise anything
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit (ulimit -n 65536) or lower --workers"
            raise UserError(f"too many open files while reading an image; {remedy}") from None
        if worker_failure(error) is not None:
            raise
        raise DamagedImage(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels: a decompression bomb, or else an image to be scaled down"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, (OSError, ValueError, SyntaxError, EOFError)) and str(error):
        return one_line(error)
    text = one_line(error)
    kind = type(error).__name__
    return f"its decoder failed: {kind}" + (f": {text}" if text != kind else "")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a decoded image, from 1 (upright, or not stated) to 8.

    Raises:
        Exception: damaged EXIF data raises anything.
    """
    found = image.getexif().get(ExifTags.Base.Orientation)
    return int(found) if found in range(1, 9) else 1
