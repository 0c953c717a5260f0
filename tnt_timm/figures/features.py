"""Feature maps of chosen blocks, and the features that the head reads (paper, figure 5).

B images, D channels, h x w the grid of sentences. Blocks are counted from 1, as in the paper.
"""

import contextlib
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import nn

from tnt_timm.errors import ConfigError, UserError, one_line
from tnt_timm.figures import picture

NUM_MAPS = 12  # drawn per block, as in the paper's figure 5a


class Maps(NamedTuple):
    """Feature maps of one model."""

    title: str
    unit: str  # what the network is made of: block or stage
    blocks: List[int]
    channels: List[np.ndarray]  # per block, (n,): those that were drawn
    maps: List[np.ndarray]  # per block, (n, h, w)


def check_blocks(blocks: Optional[Sequence[int]], depth: int, name: str, unit: str = "block") -> List[int]:
    """The blocks to show: those asked for, else the first, the middle and the last (1, 6 and 12 of 12).

    Raises:
        ConfigError: there is no such block.
    """
    if blocks is None:
        return sorted({1, max(1, depth // 2), depth})
    for number in blocks:
        if number not in range(1, depth + 1):
            raise ConfigError(f"blocks: {number}: {name} has {unit}s 1 to {depth}")
    return list(blocks)


@torch.inference_mode()
def feature_maps(model: nn.Module, image: torch.Tensor, blocks: Optional[Sequence[int]], name: str) -> List[np.ndarray]:
    """The output of chosen blocks, put back on the grid of sentences.

    Args:
        model: any timm model that has `forward_intermediates`.
        image: (1, 3, H, W), normalised.
        blocks: None for the first, the middle and the last.
        name: of the model, for messages.

    Returns:
        Per block (D, h, w), before the final norm.

    Raises:
        UserError: the model cannot tell, or does not take images of this size.
    """
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"{name}: timm has no feature maps of this model's blocks (no forward_intermediates)")
    indices = [number - 1 for number in check_blocks(blocks, depth_of(model), name, unit_of(model))]
    wanted = sorted(set(indices))
    with as_one_line(name):
        found = model.eval().forward_intermediates(image, wanted, output_fmt="NCHW", intermediates_only=True)
    return [found[wanted.index(index)][0].float().numpy() for index in indices]


def depth_of(model: nn.Module) -> int:
    return len(model.feature_info)


def unit_of(model: nn.Module) -> str:
    """What timm gives the feature maps of: blocks, or in a network whose grid gets coarser (ResNet, PVT) stages."""
    return "block" if len({info["reduction"] for info in model.feature_info}) == 1 else "stage"


@contextlib.contextmanager
def as_one_line(name: str) -> Iterator[None]:
    """What a network says to an image that it does not take becomes one line with the network's name."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{name}: {one_line(error)}") from None


def draw_maps(
    model: nn.Module, image: torch.Tensor, blocks: Optional[Sequence[int]], name: str, title: str, seed: int
) -> Maps:
    """Twelve feature maps of each block, drawn at random (all of them where a block has fewer).

    The draw depends on the seed and the number of channels alone, so that models of one width show the same channels.
    """
    numbers = check_blocks(blocks, depth_of(model), name, unit_of(model))
    channels, maps = [], []
    for number, values in zip(numbers, feature_maps(model, image, numbers, name)):
        random = np.random.default_rng([seed, number])
        channels.append(np.sort(random.permutation(len(values))[:NUM_MAPS]))
        maps.append(values[channels[-1]])
    return Maps(title, unit_of(model), numbers, channels, maps)


@torch.inference_mode()
def head_features(model: nn.Module, images: torch.Tensor, name: str, batch_size: int = 64) -> np.ndarray:
    """What the head reads, (n, D): the class token of a TNT, after the final norm."""
    found = []
    with as_one_line(name):
        for batch in images.split(batch_size):
            found.append(model.eval().forward_head(model.forward_features(batch), pre_logits=True).float())
    return torch.cat(found).numpy()


def numbers(shown: Sequence[Maps], image: np.ndarray) -> dict:
    """The arrays behind the picture."""
    arrays: dict = {"image": image, "models": np.array([maps.title for maps in shown])}
    for index, each in enumerate(shown):
        for block, channels, maps in zip(each.blocks, each.channels, each.maps):
            arrays[f"model{index}_block{block}_channels"] = channels
            arrays[f"model{index}_block{block}_maps"] = maps
    return arrays


def draw(shown: Sequence[Maps], image: np.ndarray, caption: str) -> Any:
    """A row per block, a column per model, twelve maps in each cell; every map has its own range of colours."""
    rows = max(len(each.blocks) for each in shown)
    cell_in = picture.PAGE_IN / (len(shown) + 0.42)
    names = [picture.fitted(each.title, cell_in) for each in shown]
    with picture.styled():
        figure = picture.new(picture.PAGE_IN, rows * (cell_in / 3 + 0.2) + max(name.height_in for name in names))
        grid = figure.add_gridspec(rows, len(shown) + 1, width_ratios=[0.36] + [1] * len(shown))
        picture.show_map(figure.add_subplot(grid[0, 0]), image, picture.fitted("input", 0.36 * cell_in))
        for column, each in enumerate(shown, start=1):
            for row, (block, maps) in enumerate(zip(each.blocks, each.maps)):
                low, high = (edge(maps, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
                sheet = picture.mosaic((maps - low) / np.maximum(high - low, 1e-12), 6, gap=max(1, maps.shape[2] // 16))
                title = picture.fitted(f"{each.unit} {block}", cell_in)
                if row == 0:
                    title = names[column - 1]._replace(text=f"{names[column - 1].text}\n{title.text}")
                picture.show_map(figure.add_subplot(grid[row, column]), sheet, title, (0, 1))
        picture.write_caption(figure, caption)
    return figure
