"""Find and read single images for prediction: files, folders (searched recursively) and URLs."""

import io
import os
import re
from collections import Counter
from pathlib import Path
from typing import List, Sequence, Tuple

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from tnt_timm.data.decoding import DamagedImage, as_damage, open_image, orientation, quiet
from tnt_timm.data.folders import OTHER_IMAGES, Survey
from tnt_timm.data.pixels import to_rgb
from tnt_timm.errors import one_line
from tnt_timm.evaluation.downloads import download, is_url

SUFFIXES = get_img_extensions(as_set=True) | OTHER_IMAGES
# EXIF orientation -> what makes the image upright
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def find(inputs: Sequence[str]) -> Tuple[List[str], Counter]:
    """Return all files, URLs and images in folders, and how many files in folders were left out, by kind.

    The order is that of the inputs. In folders, the rules of `data.folders.Survey` apply; the files of each are sorted by name.

    Raises:
        UserError: a folder cannot be listed.
    """
    names: List[str] = []
    left_out: Counter = Counter()
    for given in inputs:
        if is_url(given) or not os.path.isdir(given):
            names.append(given)
            continue
        survey = Survey(Path(given), SUFFIXES)
        survey.check_listed()
        names += [path for path, _ in survey.images()]
        left_out.update(survey.skipped)
        left_out.update({"hidden": survey.hidden.count} if survey.hidden.count else {})
    return names, left_out


def unknown_scheme(name: str) -> str:
    """Return what is wrong with a URL that is not of http or https. Empty for those, and for paths."""
    scheme = re.match(r"[A-Za-z][\w.+-]+:", name)
    if is_url(name) or not scheme or os.path.exists(name):
        return ""
    return f"no such file, and of URLs only http:// and https:// are read, not {scheme[0]}; download it first"


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
        with as_damage(), quiet():
            if why := unknown_scheme(name):
                raise DamagedImage(why)
            with io.BytesIO(download(name)) if is_url(name) else open(name, "rb") as file, open_image(file) as image:
                rgb = to_rgb(image)
                turned = self._orientation(image)
        if turned != 1 and self.upright:
            return rgb.transpose(TO_UPRIGHT[turned]), 0
        return rgb, int(turned != 1)

    def _orientation(self, image: Image.Image) -> int:
        try:
            return orientation(image)
        except Exception as error:  # damaged EXIF data raises anything
            if self.upright:
                raise DamagedImage(
                    f"its EXIF data is damaged, so its rotation is unknown ({one_line(error)})"
                ) from None
            return 1  # the image is used as stored, as by training and validation
