"""What decoding JPEGs in reduced size would save, for the page of loader.py. Our loader does not do it: it changes pixels."""

import time
from pathlib import Path
from statistics import mean, median

import torch
from jpeg_folder import large_photograph
from PIL import Image
from simplejpeg import decode_jpeg, decode_jpeg_header
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from tnt_timm.console import table
from tnt_timm.data.seeding import seed_everything

EDGE = 224  # pixels of a crop
LARGE = ((1000, 750), (2000, 1500), (4000, 3000))
FILES = 256  # of the folder


def section(folder: str, rounds: int, photographs: int) -> str:
    """Return a section of benchmarks/loader.md.

    Args:
        folder: of JPEGs, as `jpeg_folder.write_images` leaves it.
        rounds: the median counts.
        photographs: of each larger size.
    """
    files = [file.read_bytes() for file in sorted(Path(folder).glob("train/*/*.jpg"))[:FILES]]
    kinds = {"as above": files}
    for width, height in LARGE:
        kinds[f"{width:,} x {height:,}"] = [large_photograph(width, height, number) for number in range(photographs)]
    crop = RandomResizedCropAndInterpolation(EDGE, interpolation="bilinear")
    rows = []
    for name, contents in kinds.items():
        samples = [_Sample(content, crop, number) for number, content in enumerate(contents)]
        smaller = [sample for sample in samples if sample.divisor > 1]
        times = [[(sample.seconds(1), sample.seconds(sample.divisor)) for sample in samples] for _ in range(rounds)]
        sums = (map(sum, zip(*found)) for found in times)
        full, reduced = (1e3 * median(column) / len(samples) for column in zip(*sums))
        change = f"{mean(sample.change() for sample in smaller):.1f}" if smaller else ""
        rows.append([name, f"{100 * len(smaller) / len(samples):.0f} %", f"{full:.2f}", f"{reduced:.2f}", change])
    header = ("pixels of a file", "crops that allow it", "ms in full size", "ms if reduced", "change in grey levels")
    about = (
        "CPU time to decode and crop an image (bilinear) in full size, and if a file were decoded at 1/2, 1/4 or 1/8 of its\n"
        "size wherever the crop then keeps 224 x 224 pixels. The change is the mean difference of the pixels of these crops.\n"
        "The loader always decodes in full size: the other way changes pixels, and few crops of ImageNet's sizes allow it."
    )
    return f"## Decoding in reduced size\n\n{about}\n\n{table(header, rows, 'markdown')}"


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
        part = pixels[top : top + height, left : left + width].contiguous().permute(2, 0, 1)
        return resize(part, [EDGE, EDGE], InterpolationMode.BILINEAR, antialias=True)

    def seconds(self, divisor: int) -> float:
        begun = time.process_time()
        self.cropped(divisor)
        return time.process_time() - begun

    def change(self) -> float:
        return float((self.cropped(self.divisor).float() - self.cropped(1).float()).abs().mean())
