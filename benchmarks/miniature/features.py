"""Measure the features of trained networks: what the paper's figure 5 shows, and whether words attend to each other."""

from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor

from tnt_timm.data.datasets import open_dataset
from tnt_timm.figures import images
from tnt_timm.figures.diversity import measure
from tnt_timm.figures.network import Network, NetworkSettings, open_networks

NUM_IMAGES, SEED = 1000, 0  # of the test images
ATTENTION_IMAGES = 64


def measure_features(runs: Sequence[Path], data_dir: str = "") -> List[Dict[str, Any]]:
    """Return a row per run and block: the numbers of `tnt_timm.figures.diversity`, and `words_attended` of a TNT.

    Args:
        runs: folders of runs.
        data_dir: folder of Fashion-MNIST.
    """
    test_images = open_dataset("torch/fashion_mnist", data_dir, "test", False)
    rows = []
    for run in runs:
        (network,) = open_networks([str(run)], NetworkSettings())
        preprocessing = network.opened.data_config()
        pixels, _ = images.labelled(test_images, preprocessing, NUM_IMAGES, SEED)
        inputs = images.normalise(pixels, preprocessing)
        attended = words_attended(network, inputs[:ATTENTION_IMAGES]) if run.name.startswith("tnt") else []
        for place, found in enumerate(measure(network, inputs)):
            row = {**found._asdict(), "network": run.name.partition("-")[0], "run": run.name}
            rows.append({**row, "words_attended": attended[place] if attended else ""})
    return rows


def words_attended(network: Network, inputs: Tensor) -> List[float]:
    """Return, for each block of a TNT, the effective number of words that a word attends to.

    It is the exponential of the entropy of the attention weights, the mean over words and heads: M if a word attends to all M
    words of its sentence alike, 1 if to a single one.
    """
    blocks = range(1, len(network.model.blocks) + 1)
    weights = network.inner_attention(inputs, blocks)  # of each block (B*N, H, M, M)
    return [torch.special.entr(block).sum(dim=-1).exp().mean().item() for block in weights]
