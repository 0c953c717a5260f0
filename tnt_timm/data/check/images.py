"""Inspect one image file: can training read it, and what is unusual about it?"""

import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple

from PIL import Image

from tnt_timm.data.decoding import DamagedImage, as_damage, open_image, orientation
from tnt_timm.data.pixels import is_deep, to_rgb
from tnt_timm.errors import one_line

TINY = 32  # pixels of the shorter edge
# Pillow's mode -> kind of finding (see report.KINDS), if it has one. Other modes are unusual.
MODES = {
    **dict.fromkeys(("RGB", "RGBA", "RGBX", "RGBa"), ""),
    **dict.fromkeys(("1", "L", "LA", "La", "I;16", "I;16B", "I;16L"), "greyscale"),
    **dict.fromkeys(("P", "PA"), "palette"),
    "CMYK": "cmyk",
}

Note = Tuple[str, str]  # kind of finding, detail


class Inspection(NamedTuple):
    """What reading a file showed."""

    problem: str = ""  # why it cannot be read; empty if it can
    notes: Tuple[Note, ...] = ()
    format: str = ""  # Pillow's name: JPEG, PNG, ...
    mode: str = ""  # Pillow's name: RGB, L, CMYK, ...
    size: Tuple[int, int] = (0, 0)  # width, height in pixels
    num_bytes: int = 0
    digest: bytes = b""  # of the file's content


def inspect_image(path: str) -> Inspection:
    """Read and decode a file, whatever is wrong with it. A decoder may crash the process.

    Raises:
        UserError: the machine is short of memory or open files.
    """
    content, notes = b"", []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with as_damage():
                content = Path(path).read_bytes()
            with open_image(io.BytesIO(content)) as image:
                format, mode, size = image.format, image.mode, image.size
                if is_deep(image):
                    notes.append(("sixteen_bit", mode))  # no longer known after decoding
                to_rgb(image)
                _add_notes(notes, image, path)
        except DamagedImage as error:
            return Inspection(str(error))
    # Transparency has a note of its own
    texts = [one_line(warning.message) for warning in caught if "Transparency expr" not in str(warning.message)]
    notes += [("pillow_warns", text) for text in dict.fromkeys(texts)]
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return Inspection("", tuple(notes), format, mode, size, len(content), digest)


def _add_notes(notes: List[Note], image: Image.Image, path: str) -> None:
    try:
        for note in _notes(image, path):
            notes.append(note)
    except Exception as error:  # training does not read transparency or EXIF data, so this is no damage
        notes.append(("pillow_warns", one_line(error)))


def _notes(image: Image.Image, path: str) -> Iterator[Note]:
    format = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with more views, as phones take them
    if Image.registered_extensions().get(os.path.splitext(path)[1].lower()) != format:
        yield "suffix", f"holds {format}"
    if kind := MODES.get(image.mode, "other_mode"):
        yield kind, image.mode
    if min(image.size) < TINY:
        yield "tiny", f"{image.width}x{image.height}"
    if (turned := orientation(image)) != 1:
        yield "rotated", f"orientation {turned}"
    transparency = image.info.get("transparency", b"")  # a colour, or the opacity of each colour of a palette
    if (
        not isinstance(transparency, bytes)
        or min(transparency, default=255) < 255
        or ("A" in image.getbands() and image.getchannel("A").getextrema()[0] < 255)
    ):
        yield "transparency", image.mode
