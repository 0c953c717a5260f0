"""Batches: images (B, 3, H, W), normalised, mixed and erased on the device, and their targets.

Loader processes decode and transform; they return uint8. The rest happens here: normalise, mix, erase, which is the
official recipe but for its rounding of mixed images to whole grey levels. What is random is drawn per sample or per batch
from (seed, epoch, position), so neither the number of loader processes nor a restart changes a bit of it. (A stream deals
its shards to the loader processes, so there their number belongs to the key.)
"""

import contextlib
import os
import signal
import threading
import time
from itertools import islice
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tnt_timm.data.datasets import DAMAGE, Damage, ImageSet, StreamSet
from tnt_timm.data.loader_processes import why_it_ended, without_torchs_count
from tnt_timm.data.sampling import EvaluationBatches, SampleKey, TrainingSampler
from tnt_timm.data.seeding import seed_everything
from tnt_timm.data.streams import StreamedSamples, blank_like
from tnt_timm.errors import UserError, one_line

REPLACEMENTS = 10  # images tried in a row for a damaged one before the data set is called unreadable


class TrainingBatch(NamedTuple):
    images: Tensor  # (B, 3, H, W), float32, on the device
    targets: Tensor  # (B,) class indices, or (B, classes) when mixing is on
    damaged: List[Damage]  # files met while loading it, each replaced by the next good image
    wait_s: float  # how long the loop stood waiting for the loader processes


class EvaluationBatch(NamedTuple):
    images: Tensor  # (B, 3, H, W), float32, on the device
    targets: Tensor  # (B,)
    indices: Tensor  # (B,), place in the data set; -1 in a stream
    damaged: List[Damage]  # files whose place in `images` is only zeros


class TrainingSamples(Dataset):
    """SampleKey -> (uint8 image, target, damage), the augmentation a function of the key."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor], seed: int):
        self.images = images
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> Tuple[Tensor, int, List[Damage]]:
        damaged: List[Damage] = []
        for attempt in range(REPLACEMENTS):
            index = (key.index + attempt) % len(self.images)
            try:
                image, target = self.images.load(index)
            except DAMAGE as error:
                damaged.append(Damage(self.images.name(index), one_line(error)))
                continue
            seed_everything(self.seed, *key.randomness)
            return self.transform(image), target, damaged
        raise UserError(f"{damaged[0].name}: this and the next {REPLACEMENTS - 1} training images cannot be read")


class EvaluationSamples(Dataset):
    """Index -> (uint8 image, target, index, damage); a damaged image is reported and stands as zeros."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor]):
        self.images = images
        self.transform = transform

    def __getitem__(self, index: int) -> Tuple[Tensor, int, int, List[Damage]]:
        try:
            image, target = self.images.load(index)
        except DAMAGE as error:
            return blank_like(self.transform), 0, index, [Damage(self.images.name(index), one_line(error))]
        return self.transform(image), target, index, []


def _collate(samples: List[Tuple[Any, ...]]) -> List[Any]:
    """Stack images, make tensors of numbers, and join the lists of damage at the end."""
    images, *numbers, damaged = zip(*samples)
    tensors = [torch.stack(images), *(torch.tensor(column) for column in numbers)]
    if get_worker_info() is not None:
        _hand_over(tensors)
    return [*tensors, [d for found in damaged for d in found]]


def _hand_over(tensors: List[Tensor]) -> None:
    """Into shared memory now: torch would do it in a thread whose errors nobody hears, and the loop would wait for ever.

    Raises:
        UserError: there is no room.
    """
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise why_it_ended(error) or error from None


class _DeviceLoader:
    """What both loaders share: a DataLoader of uint8 batches, and the way to the device."""

    def __init__(self, loader: DataLoader, mean: Tuple[float, ...], std: Tuple[float, ...], device: torch.device):
        self.loader = loader
        self.device = device
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self) -> Iterator[List[Any]]:
        try:
            with without_torchs_count(), _signals_held_back():
                batches = iter(self.loader)
            yield from batches
        except UserError as error:  # a loader process sends its traceback along; the user is told the last line
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from None
        except (RuntimeError, OSError, EOFError) as error:
            raise why_it_ended(error, fetching=True) or error from None

    def normalised(self, images: Tensor) -> Tensor:
        return images.to(self.device, non_blocking=True).float().sub_(self.mean).div_(self.std)


def _data_loader(samples: Dataset, workers: int, device: torch.device, **options: Any) -> DataLoader:
    with without_torchs_count():
        return DataLoader(
            samples,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_loop,
            **options,
        )


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """While loader processes start: they begin with the signals held back, and so does every thread of theirs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_loop(worker: int) -> None:
    """Whoever asks the run to stop may ask all its processes: these serve the loop until it has saved and ends them."""
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_loop_says_so, daemon=True).start()


def _end_when_the_loop_says_so() -> None:
    """By SIGTERM, which Python sends at its exit to processes that are left, and waits for them then; others send it too."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class TrainingLoader(_DeviceLoader):
    """Endless supply of epochs; each has exactly `batches_per_epoch` batches on every process.

    Args:
        images: the training set.
        transform: RGB image -> uint8 tensor.
        batch_size, batches_per_epoch: per process.
        repeats: of repeated augmentation; a stream cannot repeat.
        mixup, erasing: timm's, applied on the device; None is off.
        seed: of everything random.
        workers: loader processes.
        rank, world_size: this process among all.

    Raises:
        UserError: fewer shards than processes in a stream.
    """

    def __init__(
        self,
        images: Union[ImageSet, StreamSet],
        transform: Callable[[Image.Image], Tensor],
        *,
        batch_size: int,
        batches_per_epoch: int,
        repeats: int,
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
        self.stream = images if isinstance(images, StreamSet) else None
        self.sampler: Optional[TrainingSampler] = None
        options = dict(batch_size=batch_size, drop_last=True)
        if self.stream is not None:
            workers = stream_workers(self.stream, workers, world_size)
            reader = self.stream.dataset.reader
            reader.dist_rank, reader.dist_num_replicas = rank, world_size
            samples: Any = StreamedSamples(self.stream, transform, seed, rank)
        else:
            samples = TrainingSamples(images, transform, seed)
            num_samples = batch_size * batches_per_epoch
            self.sampler = TrainingSampler(len(images), num_samples, max(1, repeats), seed, rank, world_size)
            options["sampler"] = self.sampler
        super().__init__(_data_loader(samples, workers, device, **options), mean, std, device)
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.mixup = mixup
        self.erasing = erasing
        self.seed = seed
        self.rank = rank

    def epoch(self, epoch: int, start: int = 0, attempt: int = 0) -> Iterator[TrainingBatch]:
        """The batches of an epoch from batch `start` on; another `attempt` draws other random numbers.

        The global generators stand where the batch's key says, so what the network draws during the step (dropout,
        stochastic depth) is a function of the key as well.
        """
        batches = self.batches()
        if self.sampler is not None:
            self.sampler.set_epoch(epoch, start * self.batch_size, attempt)
        else:
            self.stream.dataset.set_epoch(epoch)
            batches = islice(batches, start, None)
        for number in range(start, self.batches_per_epoch):
            start_s = time.perf_counter()
            batch = next(batches, None)
            wait_s = time.perf_counter() - start_s
            if batch is None:
                raise UserError(f"the stream ended after {number} of {self.batches_per_epoch} batches; mend its shards")
            images, targets, damaged = batch
            seed_everything(self.seed, epoch, number, self.rank, 1 + attempt)  # from 1: apart from the samples' keys
            images = self.normalised(images)
            targets = targets.to(self.device, non_blocking=True)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            if self.erasing is not None:
                images = self.erasing(images)
            yield TrainingBatch(images, targets, damaged, wait_s)


def stream_workers(stream: StreamSet, workers: int, world_size: int) -> int:
    """No more loader processes than shards, for one without a shard has nothing to give."""
    if stream.num_shards < world_size:
        raise UserError(
            f"the stream has {stream.num_shards} shards for {world_size} processes; "
            f"split it into more shards or start fewer processes"
        )
    return min(workers, stream.num_shards // world_size)


class EvaluationLoader(_DeviceLoader):
    """One pass over a data set, every image exactly once over all processes.

    A stream is read by the first process alone, because its shards cannot be dealt out without losing the count.
    """

    def __init__(
        self,
        images: Union[ImageSet, StreamSet],
        transform: Callable[[Image.Image], Tensor],
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
        self.batch_size = batch_size
        if isinstance(images, StreamSet):
            reader = images.dataset.reader
            reader.dist_rank, reader.dist_num_replicas = 0, 1
            workers = min(workers, images.num_shards)
            self.reads = rank == 0
            samples: Any = StreamedSamples(images, transform, None, rank)
            options: dict = dict(batch_size=batch_size)
        else:
            self.reads = True
            samples = EvaluationSamples(images, transform)
            options = dict(batch_sampler=EvaluationBatches(len(images), batch_size, rank, world_size))
        super().__init__(_data_loader(samples, workers, device, **options), mean, std, device)

    def __len__(self) -> int:
        """Batches on this process; of a stream, about as many, for each loader process ends with a part of one."""
        if isinstance(self.images, StreamSet):
            return -(-self.num_images // self.batch_size) if self.reads else 0
        return len(self.loader)

    @property
    def num_images(self) -> int:
        """How many images there are to count."""
        return len(self.images)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for images, targets, indices, damaged in self.batches() if self.reads else ():
            yield EvaluationBatch(self.normalised(images), targets.to(self.device, non_blocking=True), indices, damaged)
