"""Find and read single images for prediction: files, folders (searched recursively) and URLs."""

import http.client
import io
import os
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

from PIL import ExifTags, Image, ImageOps
from timm.data.readers.img_extensions import get_img_extensions

from tnt_timm.data.datasets import DAMAGE
from tnt_timm.data.folders import OTHER_IMAGES
from tnt_timm.data.transforms import to_rgb
from tnt_timm.errors import one_line
from tnt_timm.version import __version__

SUFFIXES = get_img_extensions(as_set=True) | OTHER_IMAGES
URL = ("http://", "https://")
TIMEOUT_S = 30
MAX_DOWNLOAD = 200 * 2**20  # bytes; no image is larger, and a wrong link must not fill the memory


def find(inputs: Sequence[str]) -> Tuple[List[str], Counter]:
    """Return all files, URLs and images in folders, and how many files in folders were skipped, by suffix.

    The order is that of the inputs. The files of a folder are sorted by name.
    """
    names: List[str] = []
    skipped: Counter = Counter()
    for given in inputs:
        if given.startswith(URL) or not os.path.isdir(given):
            names.append(given)
            continue
        for path in _files(given):
            suffix = Path(path).suffix.lower()
            if suffix in SUFFIXES:
                names.append(path)
            else:
                skipped[suffix or "no suffix"] += 1
    return names, skipped


def _files(root: str) -> Iterator[str]:
    seen = set()  # a symbolic link may point to a folder above it
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))


class NamedImages:
    """A `data.datasets.ImageSet` of paths and URLs, without classes.

    `upright` applies the EXIF rotation, which training and evaluation ignore.
    """

    classes = None

    def __init__(self, names: Sequence[str], upright: bool = False):
        self.names = list(names)
        self.upright = upright

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Tuple[Image.Image, int]:
        """Return the RGB image and, as its target, 1 if its EXIF rotation was not applied, else 0."""
        name = self.names[index]
        try:
            file = io.BytesIO(_download(name)) if name.startswith(URL) else open(name, "rb")  # noqa: SIM115
            with file, Image.open(file) as image:
                rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                if rotated and self.upright:
                    return to_rgb(ImageOps.exif_transpose(image)), 0
                return to_rgb(image), int(rotated)
        except DAMAGE:
            raise
        except Exception as error:  # the file may be of any kind, and a decoder may raise anything
            raise ValueError(f"{type(error).__name__}: {one_line(error)}") from None


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": f"tnt-timm/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            content = response.read(MAX_DOWNLOAD + 1)
            missing = response.length  # announced bytes that did not arrive; None if the server announced no length
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from None
    if len(content) > MAX_DOWNLOAD:
        raise OSError(f"larger than {MAX_DOWNLOAD >> 20} MiB, so not an image")
    if missing:
        raise OSError(f"download incomplete: {missing:,} bytes are missing")
    return content
