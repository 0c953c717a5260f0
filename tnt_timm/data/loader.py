"""Batches on the device: images (B, 3, H, W), normalised, mixed and erased, and their targets.

Workers decode and transform, and return uint8. The rest happens here: a `DeviceAugment` if there is one, then normalise, mix,
erase. This is the official recipe, except that it does not round mixed images to whole grey levels. Everything random is drawn
per sample or per batch from (seed, epoch, position), so neither the number of workers nor a restart changes a bit. (A stream
deals its shards to the workers, so there their number is part of the key.)
"""

import time
from itertools import islice
from typing import Any, Iterator, List, NamedTuple, Optional, Tuple

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from tnt_timm.data.datasets import Damage, Images, ImageSet, StreamSet
from tnt_timm.data.decoding import DamagedImage
from tnt_timm.data.device_augment import DeviceAugment
from tnt_timm.data.sampling import SampleKey, TrainingSampler, evaluation_batches
from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.stream_samples import StreamedSamples, blank_like
from tnt_timm.data.transforms import Transform
from tnt_timm.data.workers import WorkerLoader
from tnt_timm.errors import UserError

REPLACEMENTS = 10  # images tried in a row for a damaged one before the dataset counts as unreadable


class TrainingBatch(NamedTuple):
    images: Tensor  # (B, 3, H, W), float32, on the device
    targets: Tensor  # (B,) class indices, or (B, classes) when mixing is on
    damaged: List[Damage]  # files met while loading, each replaced by the next good image
    wait_s: float  # how long the loop waited for the workers


class EvaluationBatch(NamedTuple):
    images: Tensor  # (B, 3, H, W), float32, on the device
    targets: Tensor  # (B,)
    indices: Tensor  # (B,), place in the dataset; -1 in a stream
    damaged: List[Damage]  # files that are only zeros in `images`


class TrainingSamples(Dataset):
    """SampleKey -> (uint8 image, target, damage). The augmentation is a function of the key.

    With `augment`, its draw for the image comes second.
    """

    def __init__(self, images: ImageSet, transform: Transform, seed: int, augment: Optional[DeviceAugment]):
        self.images = images
        self.transform = transform
        self.augment = augment
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> Tuple[Any, ...]:
        damaged: List[Damage] = []
        for attempt in range(REPLACEMENTS):
            index = (key.index + attempt) % len(self.images)
            try:
                image, target = self.images.load(index)
            except DamagedImage as error:
                damaged.append(Damage(self.images.name(index), str(error)))
                continue
            seed_everything(self.seed, *key.randomness)
            image = self.transform(image)
            return (image, self.augment.draw(), target, damaged) if self.augment else (image, target, damaged)
        first = damaged[0]
        raise UserError(
            f"{first.name}: {first.reason}; this and the next {REPLACEMENTS - 1} training images cannot be read"
        )


class EvaluationSamples(Dataset):
    """Index -> (uint8 image, target, index, damage). A damaged image is reported and becomes zeros."""

    def __init__(self, images: ImageSet, transform: Transform):
        self.images = images
        self.transform = transform

    def __getitem__(self, index: int) -> Tuple[Tensor, int, int, List[Damage]]:
        try:
            image, target = self.images.load(index)
        except DamagedImage as error:
            return blank_like(self.transform), 0, index, [Damage(self.images.name(index), str(error))]
        return self.transform(image), target, index, []


class _DeviceLoader:
    """Move batches of a loader to the device and normalise them there."""

    def __init__(self, loader: WorkerLoader, mean: Tuple[float, ...], std: Tuple[float, ...], device: torch.device):
        self.loader = loader
        self.device = device
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255

    def to_device(self, images: Tensor, targets: Tensor) -> Tuple[Tensor, Tensor]:
        """Return copies on the device, without waiting for them."""
        return images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def normalised(self, images: Tensor) -> Tensor:
        """Return float32 images (B, 3, H, W)."""
        return images.float().sub_(self.mean).div_(self.std)


class TrainingLoader(_DeviceLoader):
    """Training batches by epoch. Each epoch has exactly `batches_per_epoch` batches on every rank.

    Args:
        images, transform: the training set, and its augmentation.
        batch_size, batches_per_epoch: per rank.
        repeats: of repeated augmentation. A stream cannot repeat.
        augment, mixup, erasing: applied on the device. None is off.
        seed: of everything random.
        workers: worker processes per rank. 0 loads in the loop.
        rank, world_size: this rank among all.

    Raises:
        UserError: a stream has fewer shards than ranks.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        *,
        batch_size: int,
        batches_per_epoch: int,
        repeats: int,
        augment: Optional[DeviceAugment] = None,
        mixup: Optional[Mixup],
        erasing: Optional[RandomErasing],
        seed: int,
        mean: Tuple[float, ...],
        std: Tuple[float, ...],
        device: torch.device,
        workers: int,
        rank: int,
        world_size: int,
    ):
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.augment = augment
        self.mixup = mixup
        self.erasing = erasing
        self.seed = seed
        self.rank = rank
        self.stream: Optional[StreamSet] = None
        self.sampler: Optional[TrainingSampler] = None
        if isinstance(images, StreamSet):
            self.stream = images
            workers = stream_workers(images, workers, world_size)
            samples: Dataset = StreamedSamples(images, transform, seed, rank, world_size, augment)
        else:
            num_samples = batch_size * batches_per_epoch
            self.sampler = TrainingSampler(len(images), num_samples, max(1, repeats), seed, rank, world_size)
            samples = TrainingSamples(images, transform, seed, augment)
        options: Any = dict(batch_size=batch_size, sampler=self.sampler, drop_last=True)
        super().__init__(WorkerLoader(samples, workers, device, **options), mean, std, device)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def epoch(self, epoch: int, start: int = 0, attempt: int = 0) -> Iterator[TrainingBatch]:
        """Yield the batches of an epoch from batch `start` on. Another `attempt` draws other random numbers.

        Before each batch, the global generators are seeded with its key. So what the network draws during the step
        (dropout, stochastic depth) is a function of the key as well.
        """
        if self.stream is None:
            self.sampler.set_epoch(epoch, start * self.batch_size, attempt)
            batches = iter(self.loader)
        else:
            self.stream.dataset.set_epoch(epoch)
            batches = islice(self.loader, start, None)
        for number in range(start, self.batches_per_epoch):
            start_s = time.perf_counter()
            batch = next(batches, None)
            wait_s = time.perf_counter() - start_s
            if batch is None:
                raise UserError(
                    f"the stream ended after {number} of {self.batches_per_epoch} batches; check its shards for damage"
                )
            images, *drawn, targets, damaged = batch
            seed_everything(self.seed, epoch, number, self.rank, 1 + attempt)  # from 1: apart from the samples' keys
            images, targets = self.to_device(images, targets)
            if self.augment is not None:
                images = self.augment.apply(images, *drawn)
            images = self.normalised(images)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            if self.erasing is not None:
                images = self.erasing(images)
            yield TrainingBatch(images, targets, damaged, wait_s)


def stream_workers(stream: StreamSet, workers: int, world_size: int) -> int:
    """Return the number of workers per rank, at most one per shard: a worker without a shard has nothing to read."""
    if stream.num_shards < world_size:
        raise UserError(
            f"the stream has {stream.num_shards} shards for {world_size} ranks; "
            f"split it into more shards or start fewer processes"
        )
    return min(workers, stream.num_shards // world_size)


class EvaluationLoader(_DeviceLoader):
    """One pass over a dataset. Each image is in exactly one batch of one rank.

    Rank 0 alone reads a stream, because dealing its shards out would lose images.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform,
        *,
        batch_size: int,
        mean: Tuple[float, ...],
        std: Tuple[float, ...],
        device: torch.device,
        workers: int,
        rank: int,
        world_size: int,
    ):
        self.images = images
        if isinstance(images, StreamSet):
            self.num_batches = -(-len(images) // batch_size) if rank == 0 else 0
            workers = min(workers, images.num_shards)
            samples: Dataset = StreamedSamples(images, transform, None, rank=0, world_size=1)
            options: Any = dict(batch_size=batch_size)
        else:
            batches = evaluation_batches(len(images), batch_size, rank, world_size)
            self.num_batches = len(batches)
            samples = EvaluationSamples(images, transform)
            options = dict(batch_sampler=batches)
        super().__init__(WorkerLoader(samples, workers, device, **options), mean, std, device)

    def __len__(self) -> int:
        """Batches on this rank. For a stream a lower bound, because each worker may end with a partial batch."""
        return self.num_batches

    @property
    def num_images(self) -> int:
        """Number of images over all ranks."""
        return len(self.images)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for images, targets, indices, damaged in self.loader if self.num_batches else ():
            images, targets = self.to_device(images, targets)
            yield EvaluationBatch(self.normalised(images), targets, indices, damaged)
