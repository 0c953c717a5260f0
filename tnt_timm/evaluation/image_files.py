"""The images that a person means: files, folders (with all that is in them) and URLs, read as evaluation reads them."""

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

URL = ("http://", "https://")
TIMEOUT_S = 30
LARGEST_DOWNLOAD = 200 * 2**20  # bytes; no image has as many, and a wrong link must not fill the memory


class NamedImages:
    """Images by their names, as `data.datasets.ImageSet` asks for them; none has a class.

    Args:
        names: paths and URLs.
        upright: turn photographs as their EXIF data says. Training and evaluation do not.
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
        """The RGB image, and as its target whether it is a photograph that lies on its side as it is shown to the network."""
        name = self.names[index]
        try:
            file = io.BytesIO(_download(name)) if name.startswith(URL) else open(name, "rb")  # noqa: SIM115
            with file, Image.open(file) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                if turned and self.upright:
                    return to_rgb(ImageOps.exif_transpose(image)), 0
                return to_rgb(image), int(turned)
        except DAMAGE:
            raise
        except Exception as error:  # a decoder meets a file of any kind; what it stumbles over is its own
            raise ValueError(f"{type(error).__name__}: {one_line(error)}") from None


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": f"tnt-timm/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content = answer.read(LARGEST_DOWNLOAD + 1)
            missing = answer.length  # bytes that were announced and did not come; None where nothing was announced
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {one_line(error)}") from None
    if len(content) > LARGEST_DOWNLOAD:
        raise OSError(f"larger than {LARGEST_DOWNLOAD >> 20} MiB, so no image")
    if missing:
        raise OSError(f"cut off: {missing:,} bytes are missing")
    return content


def find(inputs: Sequence[str]) -> Tuple[List[str], Counter]:
    """Names of all images that are meant.

    Args:
        inputs: files and URLs, which are taken as they are, and folders, whose files with an image's suffix are.

    Returns:
        The names in the order of the inputs, within a folder by name; and how many files of which other suffixes the
        folders hold.
    """
    names: List[str] = []
    passed_over: Counter = Counter()
    for given in inputs:
        if given.startswith(URL) or not os.path.isdir(given):
            names.append(given)
            continue
        for path in _files(given):
            suffix = Path(path).suffix.lower()
            if suffix in SUFFIXES:
                names.append(path)
            else:
                passed_over[suffix or "no suffix"] += 1
    return names, passed_over


SUFFIXES = get_img_extensions(as_set=True) | OTHER_IMAGES


def _files(folder: str) -> Iterator[str]:
    seen = set()  # a link may lead back to where the way began
    for path, below, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in seen:
            below.clear()
            continue
        seen.add(os.path.realpath(path))
        below.sort()
        yield from (os.path.join(path, name) for name in sorted(names))
