"""One image file: can it be read as training reads it, and what about it is worth knowing?"""

import hashlib
import os
import warnings
from typing import BinaryIO, List, NamedTuple, Tuple

from PIL import ExifTags, Image, UnidentifiedImageError

from tnt_timm.data.transforms import to_rgb
from tnt_timm.errors import one_line

TINY = 32  # pixels of the shorter edge
HEAD = 16  # bytes of a file that is no image, shown to tell what it is
BLOCK = 1 << 20
UPRIGHT, TURNED = 1, range(2, 9)  # EXIF's orientations

Notes = List[Tuple[str, str]]  # (kind, detail); kinds as in report.WARNINGS


class Look(NamedTuple):
    """What reading a file showed."""

    problem: str = ""  # why it cannot be read; empty where it can
    notes: Tuple[Tuple[str, str], ...] = ()
    format: str = ""  # as Pillow calls it: JPEG, PNG, ...
    mode: str = ""  # as Pillow calls it: RGB, L, CMYK, ...
    size: Tuple[int, int] = (0, 0)  # width, height in pixels
    num_bytes: int = 0
    digest: bytes = b""  # of the file's content


def look_at(path: str) -> Look:
    """Read and decode a file, whatever it is; nothing is raised but what ends a process."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        head = b""
        try:
            with open(path, "rb") as file:
                digest, num_bytes, head = _digest(file)
                if not num_bytes:
                    return Look("an empty file")
                look = _decode(file, path)
        except UnidentifiedImageError:
            return Look(f"no image: begins with {head!r}")
        except OSError as error:
            return Look(error.strerror or one_line(error))
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            return Look(one_line(error))
    notes = look.notes + tuple(("pillow_warns", text) for text in dict.fromkeys(_texts(heard)))
    return look._replace(notes=notes, num_bytes=num_bytes, digest=digest)


def _digest(file: BinaryIO) -> Tuple[bytes, int, bytes]:
    """Of the content, with its length and its start; leaves the file there."""
    state = hashlib.blake2b(digest_size=16)
    head = file.read(HEAD)
    state.update(head)
    while block := file.read(BLOCK):
        state.update(block)
    num_bytes = file.tell()
    file.seek(0)
    return state.digest(), num_bytes, head


def _decode(file: BinaryIO, path: str) -> Look:
    with Image.open(file) as image:
        look = Look(format=image.format, mode=image.mode, size=image.size)
        deep = image.mode.startswith("I;16") or any(";16" in str(tile.args) for tile in image.tile)  # gone once decoded
        to_rgb(image)
        notes: Notes = []
        for find in (_suffix_notes, _mode_notes, _exif_notes, _size_notes):
            try:
                notes += find(image, path)
            except Exception as error:  # training does not look at such things, so it is no damage
                notes.append(("pillow_warns", one_line(error)))
    if deep:
        notes.append(("sixteen_bit", look.mode))
    return look._replace(notes=tuple(notes))


def _suffix_notes(image: Image.Image, path: str) -> Notes:
    suffix = os.path.splitext(path)[1].lower()
    format = {"MPO": "JPEG"}.get(image.format, image.format)  # MPO: a JPEG with further views, as phones take them
    return [] if Image.registered_extensions().get(suffix) == format else [("suffix", f"holds {format}")]


def _mode_notes(image: Image.Image, path: str) -> Notes:
    mode, notes = image.mode, []
    if mode in ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L"):
        notes.append(("greyscale", mode))
    elif mode in ("P", "PA"):
        notes.append(("palette", mode))
    elif mode == "CMYK":
        notes.append(("cmyk", mode))
    elif mode not in ("RGB", "RGBA", "RGBX", "RGBa"):
        notes.append(("other_mode", mode))
    if _is_see_through(image):
        notes.append(("transparency", mode))
    return notes


def _is_see_through(image: Image.Image) -> bool:
    marked = image.info.get("transparency", b"")  # a colour, or for each colour of a palette how opaque it is
    if not isinstance(marked, bytes) or min(marked, default=255) < 255:
        return True
    return "A" in image.getbands() and image.getchannel("A").getextrema()[0] < 255


def _exif_notes(image: Image.Image, path: str) -> Notes:
    orientation = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    return [("rotated", f"orientation {orientation}")] if orientation in TURNED else []


def _size_notes(image: Image.Image, path: str) -> Notes:
    return [("tiny", f"{image.width}x{image.height}")] if min(image.size) < TINY else []


def _texts(heard: List[warnings.WarningMessage]) -> List[str]:
    """The warnings' texts, but for the one about transparency, which has a note of its own."""
    return [one_line(each.message) for each in heard if "Transparency expressed in bytes" not in str(each.message)]
