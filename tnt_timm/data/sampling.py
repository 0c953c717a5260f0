"""Order of the training samples, and the batches of an evaluation, for each rank."""

from typing import Iterator, List, NamedTuple, Tuple

import torch
from torch.utils.data import Sampler


class SampleKey(NamedTuple):
    """Identifies one training sample of a run. Its augmentation depends on the seed and this key alone."""

    epoch: int
    position: int  # in the order of the epoch, over all ranks
    index: int  # in the dataset
    attempt: int = 0  # how often the run went back to a checkpoint

    @property
    def randomness(self) -> Tuple[int, ...]:
        """The part of the key that seeds the augmentation."""
        return (self.epoch, self.position, *([self.attempt] if self.attempt else []))


class TrainingSampler(Sampler[SampleKey]):
    """The shuffled order of an epoch, with each image `repeats` times in a row, dealt one by one to the ranks.

    With repeats = 3 this is repeated augmentation (Hoffer et al., arXiv 1901.09335; DeiT, section 6). The copies of an
    image fall into the same global batch, and an epoch of len(dataset) samples shows a third of the images. On ImageNet
    with 8 ranks of 128 images an epoch has 1,251 updates, as in the official run.

    Args:
        num_images: size of the dataset.
        num_samples: samples per rank and epoch. Together they make whole global batches.
        repeats: copies of each image (1: plain shuffling).
        seed: of the shuffling.
        rank, world_size: this rank among all.

    Raises:
        ValueError: an epoch would need more samples than there are.
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
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0, attempt: int = 0) -> None:
        """Choose the epoch, and how many of this rank's samples to skip at its start (when resuming)."""
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


def evaluation_batches(num_images: int, batch_size: int, rank: int, world_size: int) -> List[range]:
    """Return a rank's batches of consecutive image indices. Each image is in exactly one batch of one rank.

    A batch holds the same images for any number of ranks, so its results have the same bits.
    """
    batches = [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]
    return batches[rank::world_size]
