#!/usr/bin/env python3
"""What decoding JPEGs in reduced size would save, with `python benchmarks/reduced_size.py`. Writes benchmarks/reduced_size.md.

Our loader always decodes in full size: the other way changes pixels.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Dict, List, Sequence

import torch
from jpeg_folder import large_photograph, write_images
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.nn.functional import interpolate

from tnt_timm.atomic_files import replace_text
from tnt_timm.commands.entry_point import run
from tnt_timm.console import show, table
from tnt_timm.data.seeding import seed_everything
from tnt_timm.runtime import provenance
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.schema import Group, OutputFile, PositiveInt

EDGE = 224  # pixels of a crop
LARGE = ((1000, 750), (2000, 1500), (4000, 3000))


class Settings(Group):
    """Measure what decoding JPEGs in half size or less would save, where the random crop allows it."""

    images: PositiveInt = setting(256, "JPEGs of ImageNet's sizes")
    photographs: PositiveInt = setting(24, "JPEGs of each larger size")
    rounds: PositiveInt = setting(5, "measurements; the median counts")
    output: OutputFile = setting("benchmarks/reduced_size.md", "page for the figures")


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    return run(measure, argv, Settings)


def measure(own: Settings) -> None:
    """Measure, print and write the table.

    Raises:
        UserError: the page cannot be written.
    """
    torch.set_num_threads(1)
    origin = provenance.describe(torch.device("cpu"), 1)
    kinds: Dict[str, List[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), own.images)
        kinds["mostly 500 x 375"] = [file.read_bytes() for file in Path(folder).glob("train/*/*.jpg")]
    for width, height in LARGE:
        kinds[f"{width:,} x {height:,}"] = [
            large_photograph(width, height, number) for number in range(own.photographs)
        ]
    crop = RandomResizedCropAndInterpolation(EDGE, interpolation="bilinear")
    rows = []
    for name, contents in kinds.items():
        samples = [_Sample(content, crop, number) for number, content in enumerate(contents)]
        smaller = [sample for sample in samples if sample.divisor > 1]
        times = [[(sample.seconds(1), sample.seconds(sample.divisor)) for sample in samples] for _ in range(own.rounds)]
        sums = (map(sum, zip(*found)) for found in times)
        full, reduced = (1e3 * median(column) / len(samples) for column in zip(*sums))
        change = f"{mean(sample.change() for sample in smaller):.1f}" if smaller else ""
        rows.append([name, f"{100 * len(smaller) / len(samples):.0f} %", f"{full:.2f}", f"{reduced:.2f}", change])
    header = ("pixels of a file", "crops that allow it", "ms in full size", "ms if reduced", "change in grey levels")
    text = (
        f"# Decoding in reduced size\n\n`{' '.join(['python', *sys.argv])}`: CPU time to decode an image and crop it to\n"
        "224 x 224 pixels, in full size, and if a file were decoded at 1/2, 1/4 or 1/8 of its size wherever the crop still has\n"
        "224 pixels along each edge. The change is the mean difference of the pixels of these crops. The loader always decodes\n"
        "in full size, because the other way changes pixels.\n"
        f"{origin['device']} ({origin['instruction_set']}), torch {origin['versions']['torch']}, commit "
        f"{str(origin['commit'])[:12]}.\n\n{table(header, rows, 'markdown')}"
    )
    show(text)
    replace_text(Path(own.output), text)


class _Sample:
    """A file and a random crop, which could be taken from a smaller image."""

    def __init__(self, content: bytes, crop: RandomResizedCropAndInterpolation, number: int):
        self.content = content
        self.height, self.width = decode_jpeg_header(content)[:2]
        seed_everything(number)
        self.place = crop.get_params(Image.new("L", (self.width, self.height)), crop.scale, crop.ratio)
        fitting = (divisor for divisor in (8, 4, 2) if min(self.place[2:]) >= divisor * EDGE)
        self.divisor = next(fitting, 1)

    def cropped(self, divisor: int) -> torch.Tensor:
        edges = dict(min_height=-(-self.height // divisor), min_width=-(-self.width // divisor))
        pixels = torch.from_numpy(decode_jpeg(self.content, **(edges if divisor > 1 else {})))
        top, left, height, width = (round(edge / divisor) for edge in self.place)
        part = pixels[top : top + height, left : left + width].contiguous().unsqueeze(0).permute(0, 3, 1, 2)
        return interpolate(part, (EDGE, EDGE), mode="bilinear", antialias=True)

    def seconds(self, divisor: int) -> float:
        self.cropped(divisor)  # caches
        begun = time.process_time()
        self.cropped(divisor)
        return time.process_time() - begun

    def change(self) -> float:
        return float((self.cropped(self.divisor).float() - self.cropped(1).float()).abs().mean())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
