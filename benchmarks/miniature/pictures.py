"""Draw the study's pictures with the figures command."""

from pathlib import Path
from typing import Sequence

from tnt_timm.commands.figures import figures

IMAGE = ["--image", "torch/fashion_mnist/0"]
MAP_SIZE = ["--img-size", "256"]  # a grid of 32 x 32 sentences


def draw(pair: Sequence[Path], sizes: Path, folder: Path, data_dir: Sequence[str] = ()) -> None:
    """Draw accuracy against cost, and the features of trained networks.

    Args:
        pair: run folders of the networks.
        sizes: table of accuracy and cost.
        folder: to write the pictures to.
        data_dir: flag that says where Fashion-MNIST is.

    Raises:
        UserError: a picture cannot be drawn.
    """
    networks = [str(run) for run in pair]
    cost = ["accuracy-cost", str(sizes), "--no-published", "--costs", "gmacs", "params_m"]
    diversity = ["diversity", *networks, "--split", "test"]
    maps = [
        ["feature-maps", *networks, *IMAGE, *data_dir, *MAP_SIZE],
        ["tsne-maps", *networks, *IMAGE, *data_dir, *MAP_SIZE],
    ]
    for name, command in zip(("miniature-cost", "diversity", "feature-maps", "tsne-maps"), (cost, diversity, *maps)):
        figures([*command, "--dpi", "110", "--output", str(folder / f"{name}.png")])
