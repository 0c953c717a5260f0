"""Which image stands where: the order of training samples, and how evaluation is dealt to the processes."""

from typing import Iterator, List, NamedTuple, Tuple

import torch
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """Names one training sample of a run. Its augmentation is drawn from (seed, epoch, position) and nothing else."""

    epoch: int
    position: int  # in the epoch's order over all processes
    index: int  # in the data set
    attempt: int = 0  # how often the run went back to a checkpoint

    @property
    def randomness(self) -> Tuple[int, ...]:
        """What, after the seed, the sample's augmentation is drawn from."""
        return (self.epoch, self.position, *([self.attempt] if self.attempt else []))


class TrainingSampler(Sampler[SampleKey]):
    """The shuffled order of an epoch, each image `repeats` times in a row, dealt out one by one to the processes.

    With repeats = 3 this is repeated augmentation (Hoffer et al., arXiv 1901.09335; DeiT, section 6): the copies of an
    image fall into the same global batch, and an epoch of len(data set) samples sees a third of the images. On ImageNet
    with 8 processes of 128 that makes 1,251 updates, as in the official run.

    Args:
        num_images: size of the data set.
        num_samples: samples per process and epoch; whole global batches.
        repeats: copies of each image (1: plain shuffling).
        seed: of the shuffling.
        rank, world_size: this process among all.
    """

    def __init__(self, num_images: int, num_samples: int, repeats: int, seed: int, rank: int, world_size: int):
        if num_samples * world_size > num_images * repeats:
            raise ValueError(f"{world_size} x {num_samples} samples from {num_images} images, {repeats} times each")
        self.num_images = num_images
        self.num_samples = num_samples
        self.repeats = repeats
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self.attempt = 0

    def set_epoch(self, epoch: int, start: int = 0, attempt: int = 0) -> None:
        """Choose the epoch, and how many of this process's samples to leave out at its start (when resuming)."""
        self.epoch = epoch
        self.start = start
        self.attempt = attempt

    def __iter__(self) -> Iterator[SampleKey]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for i in range(self.start, self.num_samples):
            position = self.rank + i * self.world_size
            yield SampleKey(self.epoch, position, order[position // self.repeats], self.attempt)

    def __len__(self) -> int:
        return self.num_samples - self.start


class EvaluationBatches(Sampler[List[int]]):
    """Batches of consecutive images, dealt out whole to the processes: no image twice, none left out.

    A batch holds the same images however many processes there are, so its results have the same bits.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int):
        batches = [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]
        self.batches = batches[rank::world_size]

    def __iter__(self) -> Iterator[List[int]]:
        return (list(batch) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)
