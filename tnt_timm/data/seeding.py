"""Random numbers as a function of a key, so that a checkpoint needs no generator states."""

import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch (of the GPUs too, if CUDA is in use) from a key.

    Args:
        key: non-negative integers, such as (seed, epoch, position). Different keys give unrelated random numbers.
    """
    # The key includes its length because NumPy pads it with zeros: otherwise (1, 2) and (1, 2, 0) would be the same.
    first, second, third = np.random.SeedSequence((len(key), *key)).generate_state(3, np.uint64).tolist()
    random.seed(first)
    np.random.seed(second % 2**32)
    # torch.manual_seed would do both, but records a stack trace (0.4 ms) wherever CUDA is not in use, as in workers.
    torch.default_generator.manual_seed(third % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(third % 2**63)
