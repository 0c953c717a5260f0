"""Randomness as a function of a key, so that nothing hidden needs saving: not by workers, not by the loop."""

import random

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """Put Python's, NumPy's and torch's generators (the GPUs' too, where they are in use) where the key says.

    Args:
        key: non-negative integers, as (seed, epoch, position). Different keys give unrelated streams.
    """
    # The length goes in because NumPy pads with zeros: without it (1, 2) and (1, 2, 0) would be the same key.
    first, second, third = np.random.SeedSequence((len(key), *key)).generate_state(3, np.uint64).tolist()
    random.seed(first)
    np.random.seed(second % 2**32)
    # torch.manual_seed would do both, but records a stack trace (0.4 ms) wherever CUDA is not in use, as in loader processes
    torch.default_generator.manual_seed(third % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(third % 2**63)
