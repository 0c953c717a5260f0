#!/usr/bin/env python3
"""Measure how fast training images are loaded, per core, with `python benchmarks/loader.py`, and write benchmarks/loader.md.

Four ways to load the same JPEGs, with the augmentation of configs/tnt_s.yaml, run in turns: ours with --augment-on worker and
device, timm's loader, and torchvision's reference pipeline.
"""

import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
import torchvision
from jpeg_folder import write_images
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import transforms as T

from tnt_timm.atomic_files import replace_text
from tnt_timm.commands.entry_point import run
from tnt_timm.console import say, show, table
from tnt_timm.costs.throughput import alternate
from tnt_timm.data.datasets import open_dataset
from tnt_timm.data.decoding import decode, decode_fast
from tnt_timm.data.device_augment import DeviceAugment
from tnt_timm.data.loader import TrainingSamples
from tnt_timm.data.sampling import TrainingSampler
from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.transforms import split_training_transform, training_transform
from tnt_timm.data.workers import WorkerLoader
from tnt_timm.errors import ConfigError
from tnt_timm.runtime import provenance
from tnt_timm.settings.command_line import setting
from tnt_timm.settings.schema import Group, OutputFile, PositiveInt

SIZE = (3, 224, 224)
NORMALISATION = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
POLICY = "rand-m9-mstd0.5-inc1"
BATCHES = (64, 128, 256, 512, 1024)
WAYS = ("--augment-on worker", "--augment-on device", "timm", "torchvision")


class Settings(Group):
    """Measure how fast training images are loaded in four ways, what a worker's time goes to, and what the device adds."""

    images: PositiveInt = setting(2048, "JPEGs of an epoch")
    workers: List[PositiveInt] = setting([1, 2], "numbers of workers to measure", min_length=1)
    rounds: PositiveInt = setting(5, "epochs of each way; the median counts")
    batch_size: PositiveInt = setting(64, "images per batch")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu, for the device's part")
    device_batches: List[PositiveInt] = setting(list(BATCHES), "images of a batch, for the device's part", min_length=1)
    output: OutputFile = setting("benchmarks/loader.md", "page for the figures")


class Epoch(NamedTuple):
    """One pass over the images."""

    wall_s: float
    workers_s: float  # CPU time of all workers


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    return run(measure, argv, Settings)


def measure(own: Settings) -> None:
    """Measure, print and write the tables.

    Raises:
        UserError: there is no such device, or the page cannot be written.
    """
    if own.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda: not available here; pass --device cpu")
    torch.set_num_threads(1)
    origin = provenance.describe(torch.device("cpu"), 1)
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = write_images(Path(folder), own.images)
        parts = [
            f"# Loading images\n\n`{' '.join(['python', *sys.argv])}`: {own.images:,} JPEGs of {mean_bytes:,} bytes and mostly "
            f"500 x 375 pixels, in batches of {own.batch_size}.\n{origin['device']} ({origin['instruction_set']}), torch "
            f"{origin['versions']['torch']}, torchvision {torchvision.__version__}, timm {origin['versions']['timm']}, commit "
            f"{str(origin['commit'])[:12]}.\n",
            *(_throughput(own, folder, workers) for workers in own.workers),
            _stages(folder, own.rounds),
        ]
    parts.append(_device_table(own))
    text = "\n".join(parts)
    show(text)
    replace_text(Path(own.output), text)


def _throughput(own: Settings, folder: str, workers: int) -> str:
    ways = {name: _epochs(name, folder, workers, own) for name in WAYS}
    for way in ways.values():
        way()  # caches, imports
    found = alternate(ways, own.rounds, lambda line: say(f"{workers} workers: {line}"))
    per_core = {name: own.images / median(epoch.workers_s for epoch in epochs) for name, epochs in found.items()}
    rows = []
    for name, epochs in found.items():
        rates = sorted(own.images / epoch.workers_s for epoch in epochs)
        wall = own.images / median(epoch.wall_s for epoch in epochs)
        times = [f"{per_core[name] / per_core[other]:.2f}" for other in ("timm", WAYS[0])]
        rows.append([name, f"{per_core[name]:.0f}", f"{rates[0]:.0f} to {rates[-1]:.0f}", *times, f"{wall:.0f}"])
    header = ("way", "images/s per core", "range", "times timm's", "times worker's", "images/s")
    about = (
        "Per core: per second of the workers' CPU time. Images/s: by the clock, with start and end of the workers.\n"
        "torchvision's workers also convert to float32 and normalise. The others leave that to the device, the second one its\n"
        "augmentation as well."
    )
    plural = "" if workers == 1 else "s"
    return f"## {workers} worker{plural}\n\n{about}\n\n{table(header, rows, 'markdown')}"


def _epochs(name: str, folder: str, workers: int, own: Settings) -> Callable[[], Epoch]:
    """Return a function that loads an epoch with new workers."""

    def epoch() -> Epoch:
        before, begun = _children_s(), time.monotonic()
        loader = LOADERS[name](folder, workers, own.batch_size)
        count = sum(len(batch[0]) for batch in loader)
        wall_s = time.monotonic() - begun
        del loader
        while torch.multiprocessing.active_children():  # their time counts once they have exited
            time.sleep(0.01)
        if count < own.images - own.batch_size:
            raise RuntimeError(f"{name}: {count} of {own.images} images")
        return Epoch(wall_s, _children_s() - before)

    return epoch


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _samples(folder: str, on_device: bool) -> TrainingSamples:
    images = open_dataset("", folder, "train", True, decoder=decode_fast if on_device else decode)
    options: Any = dict(auto_augment_policy=POLICY, **NORMALISATION)
    if on_device:
        transform, augment = split_training_transform(SIZE, **options)
        return TrainingSamples(images, transform, 42, augment)
    return TrainingSamples(images, training_transform(SIZE, **options), 42, None)


def _ours(on_device: bool) -> Callable[[str, int, int], DataLoader]:
    def load(folder: str, workers: int, batch_size: int) -> DataLoader:
        samples = _samples(folder, on_device)
        sampler = TrainingSampler(len(samples.images), len(samples.images), 1, 42, 0, 1)
        sampler.set_epoch(0, 0, 0)
        options: Any = dict(batch_size=batch_size, sampler=sampler, drop_last=True)
        return WorkerLoader(samples, workers, torch.device("cpu"), **options)

    return load


def _timms(folder: str, workers: int, batch_size: int) -> DataLoader:
    """Return timm's loader without its prefetcher, which normalises and erases on the device."""
    options: Any = dict(auto_augment=POLICY, interpolation="random", device=torch.device("cpu"), **NORMALISATION)
    dataset = create_dataset("", root=folder, split="train", is_training=True)
    loader = create_loader(dataset, SIZE, batch_size, is_training=True, num_workers=workers, **options).loader
    dataset.transform = training_transform(
        SIZE, auto_augment_policy=POLICY, **NORMALISATION
    )  # the same, but for Pillow 13
    return loader


def _torchvisions(folder: str, workers: int, batch_size: int) -> DataLoader:
    """Return the pipeline of torchvision's training reference, with its Pillow backend, which normalises in the worker."""
    steps = [T.RandomResizedCrop(224, antialias=True), T.RandomHorizontalFlip(), T.RandAugment(2, 9), T.PILToTensor()]
    steps += [T.ConvertImageDtype(torch.float), T.Normalize(**NORMALISATION)]
    images = torchvision.datasets.ImageFolder(f"{folder}/train", T.Compose(steps))
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, drop_last=True)


LOADERS: Dict[str, Callable[[str, int, int], DataLoader]] = {
    WAYS[0]: _ours(False),
    WAYS[1]: _ours(True),
    WAYS[2]: _timms,
    WAYS[3]: _torchvisions,
}


def _stages(folder: str, rounds: int) -> str:
    """Return where the CPU time of a sample goes in our two ways."""
    worker, device = _samples(folder, False), _samples(folder, True)
    found: Dict[str, Dict[str, List[float]]] = {name: {} for name in WAYS[:2]}
    for _ in range(rounds):
        for name, samples in zip(WAYS, (worker, device)):
            spent: Dict[str, float] = {}
            for number in range(256):
                for stage, seconds in _sample_stages(samples, number):
                    spent[stage] = spent.get(stage, 0.0) + seconds
            for stage, seconds in spent.items():
                found[name].setdefault(stage, []).append(seconds / 256 * 1e3)
    names = list(dict.fromkeys(stage for stages in found.values() for stage in stages))
    rows = [
        [stage, *(f"{median(found[way][stage]):.2f}" if stage in found[way] else "" for way in found)]
        for stage in names
    ]
    rows.append(["together", *(f"{sum(median(times) for times in found[way].values()):.2f}" for way in found)])
    header = ("milliseconds of CPU time per image", *WAYS[:2])
    return f"## What a worker's time goes to\n\n{table(header, rows, 'markdown')}"


def _sample_stages(samples: TrainingSamples, number: int) -> Iterator[Tuple[str, float]]:
    """Yield the steps of a sample, in their order, with the CPU seconds of each."""
    begun = time.process_time()

    def spent() -> float:
        nonlocal begun
        before, begun = begun, time.process_time()
        return begun - before

    image, _ = samples.images.load(number % len(samples.images))
    yield "read and decode", spent()
    seed_everything(42, 0, number)
    yield "seed", spent()
    for step in samples.transform.transforms:
        image = step(image)
        yield STAGES.get(type(step).__name__, "colours and shapes"), spent()
    if samples.augment:
        samples.augment.draw()
        yield "draw colours and shapes", spent()


STAGES = {
    "RandomResizedCropAndInterpolation": "crop and flip",
    "_Crop": "crop and flip",
    "RandomHorizontalFlip": "crop and flip",
    "function": "to an array",
    "ToNumpy": "to an array",
    "MaybePILToTensor": "to an array",
    "PILToTensor": "to an array",
}


def _device_table(own: Settings) -> str:
    found = device_part(own.device, own.rounds, own.device_batches)
    rows = [[str(pixels), str(batch), f"{ms:.1f}", f"{ms / batch:.3f}"] for pixels, batch, ms in found]
    where = torch.cuda.get_device_name() if own.device == "cuda" else "the CPU, one thread"
    return f"## The device's part, on {where}\n\n{table(('pixels', 'batch', 'ms', 'ms per image'), rows, 'markdown')}"


def device_part(device: str, rounds: int, batches: Sequence[int]) -> List[Tuple[int, int, float]]:
    """Return what `DeviceAugment` costs: pixels of an edge, images of a batch, and milliseconds, the median of `rounds`."""
    found = []
    for pixels, batch_size in itertools.product((224, 384), batches):
        say(f"the device's part: {batch_size} images of {pixels} pixels")
        _, augment = split_training_transform((3, pixels, pixels), auto_augment_policy=POLICY, **NORMALISATION)
        images = torch.randint(0, 256, (batch_size, pixels, pixels, 3), dtype=torch.uint8, device=device)
        times = [_applied_s(augment, images, number) for number in range(rounds + 1)][1:]
        found.append((pixels, batch_size, 1e3 * median(times)))
    return found


def _applied_s(augment: DeviceAugment, images: torch.Tensor, number: int) -> float:
    drawn = []
    for position in range(len(images)):
        seed_everything(42, number, position)
        drawn.append(augment.draw())
    stacked = torch.stack(drawn)
    if images.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    augment.apply(images, stacked)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
