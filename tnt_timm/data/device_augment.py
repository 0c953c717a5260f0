"""timm's augmentation of colours and shapes in two parts: a worker draws it for each image, the device does it for a batch.

timm's own policies draw, but each of their operations is replaced by one that only notes what it would do. So the same random
numbers give the same operations as in timm.
"""

from typing import Any, Callable, List, Sequence, Tuple

import numpy as np
import torch
from timm.data import auto_augment as timms
from torch import Tensor
from torchvision.transforms import ColorJitter

from tnt_timm.data.augment_ops import CHANGES, MATRICES, warp

# (kind, Pillow's number of a resampling filter, and the six of a matrix) for a warp, (kind, 0, number, 0, ...) for others
Operation = Tuple[float, float, float, float, float, float, float, float]
Drawn = Tuple[Operation, ...]
NOTHING: Operation = (0.0,) * 8
# The places in this list are the kinds
KINDS: List[Any] = [None, warp, *dict.fromkeys(change for change, _ in CHANGES.values())]


class DeviceAugment:
    """Draw the operations of one image, and apply them to a batch.

    Args:
        steps: of a transform of `timm.data.create_transform`: RandAugment, AutoAugment or colour jitter. They are changed.
        size: of the images, (height, width) in pixels.

    Raises:
        ValueError: a step or an operation is another one, such as AugMix. The message names it.
    """

    def __init__(self, steps: Sequence[Any], size: Tuple[int, int]):
        self.steps = [_Jitter(step) if isinstance(step, ColorJitter) else _Policy(step, size) for step in steps]
        fills = [step.fill for step in self.steps if isinstance(step, _Policy)] or [(0, 0, 0)]
        self.fill = torch.tensor(fills[0], dtype=torch.uint8)  # RGB of what a warp takes from outside of an image

    def draw(self) -> Tensor:
        """Return as many operations for each image, (operations, 8), float64. Some are `NOTHING`."""
        drawn: Drawn = ()
        for step in self.steps:
            drawn = step(drawn)
        missing = sum(step.length for step in self.steps) - len(drawn)
        return torch.from_numpy(np.array((*drawn, *[NOTHING] * missing), dtype=np.float64).reshape(-1, len(NOTHING)))

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Apply to each image of a batch the operations that were drawn for it, in their order.

        Args:
            images: (B, H, W, 3), uint8, as the workers' part of the transform returns them.
            drawn: (B, operations, 8), on the CPU.

        Returns:
            (B, 3, H, W), uint8.
        """
        images = images.permute(0, 3, 1, 2).contiguous()
        fill = _copied(self.fill, images)
        place = torch.arange(len(images))  # of each image in the batch
        for number in range(drawn.shape[1]):
            order = torch.argsort(len(KINDS) * drawn[:, number, 1] + drawn[:, number, 0], stable=True)
            images, drawn, place = images[_copied(order, images)], drawn[order], place[order]
            numbers = _copied(drawn[:, number, 2:], images)
            runs, lengths = torch.unique_consecutive(drawn[:, number, :2], dim=0, return_counts=True)
            start = 0
            for (kind, resample), length in zip(runs.int().tolist(), lengths.tolist()):
                same = slice(start, start + length)  # these images get the same operation
                if KINDS[kind] is warp:
                    images[same] = warp(images[same], numbers[same], resample, fill)
                elif kind:
                    images[same] = KINDS[kind](images[same], numbers[same, 0])
                start += length
        return images[_copied(torch.argsort(place), images)]


class _Jitter:
    """torchvision's colour jitter: brightness, contrast and saturation, in random order."""

    OPERATIONS = (timms.brightness, timms.contrast, timms.color)
    length = len(OPERATIONS)

    def __init__(self, jitter: ColorJitter):
        if jitter.hue is not None:
            raise ValueError("jitter of the hue")
        self.ranges = jitter.brightness, jitter.contrast, jitter.saturation

    def __call__(self, drawn: Drawn) -> Drawn:
        order, *factors, _ = ColorJitter.get_params(*self.ranges, None)
        for number in order.tolist():
            if number < self.length and factors[number] is not None:
                drawn = _Note(self.OPERATIONS[number], (0, 0))(drawn, factors[number])
        return drawn


class _Policy:
    """timm's RandAugment or AutoAugment, with notes as its operations."""

    def __init__(self, policy: Any, size: Tuple[int, int]):
        if isinstance(policy, timms.RandAugment):
            operations, self.length = list(policy.ops), policy.num_layers
        elif isinstance(policy, timms.AutoAugment):
            operations, self.length = [op for ops in policy.policy for op in ops], max(map(len, policy.policy))
        else:
            raise ValueError(type(policy).__name__)
        self.policy = policy
        self.fill = operations[0].kwargs["fillcolor"]
        for operation in operations:
            if operation.aug_fn not in MATRICES and operation.aug_fn not in CHANGES:  # of a newer timm
                raise ValueError(operation.name)
            operation.aug_fn = _Note(operation.aug_fn, size)

    def __call__(self, drawn: Drawn) -> Drawn:
        return self.policy(drawn)


class _Note:
    """In place of a function of timm's that changes an image: append what it would do to what was drawn before."""

    def __init__(self, function: Callable, size: Tuple[int, int]):
        self.function = function
        self.size = size

    def __call__(self, drawn: Drawn, *arguments: float, **options: Any) -> Drawn:
        if self.function in MATRICES:
            resample = timms._interpolation(options)  # timm may draw it, too
            return (*drawn, (KINDS.index(warp), resample, *MATRICES[self.function](*arguments, *self.size)))
        change, number = CHANGES[self.function]
        return (*drawn, (KINDS.index(change), 0, number(*arguments), 0, 0, 0, 0, 0))


def _copied(tensor: Tensor, images: Tensor) -> Tensor:
    """Return a copy on the device of the images. From pinned memory, copying does not wait for the device."""
    return (tensor.pin_memory() if images.is_cuda else tensor).to(images.device, non_blocking=True)
