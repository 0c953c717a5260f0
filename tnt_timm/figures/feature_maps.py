"""Feature maps of blocks (paper, figure 5a), and words as maps."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from pydantic import Field
from torch import Tensor

from tnt_timm.figures import images, picture
from tnt_timm.figures.network import Network
from tnt_timm.figures.picture import Panel

NUM_MAPS = 12  # per block, as in the paper


class BlockSettings(images.ImageSettings):
    """Networks, image and blocks"""

    blocks: Optional[List[int]] = Field(None, min_length=1, description="counted from 1 (default: first, middle, last)")


class FeatureMapSettings(BlockSettings):
    """Networks, image and blocks"""

    img_size: int = Field(1024, gt=0, description="edge of the square input in pixels")


class Maps(NamedTuple):
    """Some feature maps of one block, and the channels that they are."""

    title: str
    channels: np.ndarray  # (n,)
    maps: np.ndarray  # (n, h, w)


def draw_feature_maps(networks: Sequence[Network], own: FeatureMapSettings) -> picture.Drawn:
    """Draw feature maps of some blocks, models side by side (paper, figure 5a)."""
    chosen, arrays = [], {}
    for index, network in enumerate(networks):
        shown = images.show(own, network.opened.data_config(own.img_size))
        blocks = choose(network, shown.tensor, own.blocks, own.seed)
        for number, block in blocks.items():
            arrays[f"model{index}_block{number}_channels"] = block.channels
            arrays[f"model{index}_block{number}_maps"] = block.maps
        chosen.append((network.title, list(blocks.values())))
    arrays |= {"image": shown.pixels, "models": np.array([title for title, _ in chosen])}
    caption = f"{NUM_MAPS} feature maps per block, drawn at random with seed {own.seed}; {shown.caption}"
    return draw(chosen, shown.pixels, caption), arrays


def choose(network: Network, image: Tensor, blocks: Optional[Sequence[int]], seed: int) -> Dict[int, Maps]:
    """Choose twelve feature maps of each block at random, or all of them where a block has fewer.

    The choice depends on the seed and the number of channels only, so models of one width show the same channels.
    """
    numbers, chosen = network.block_numbers(blocks), {}
    for number, (values,) in zip(numbers, network.feature_maps(image, numbers)):
        channels = np.sort(np.random.default_rng([seed, number]).permutation(len(values))[:NUM_MAPS])
        chosen[number] = Maps(f"{network.unit} {number}", channels, values[channels])
    return chosen


def draw(networks: Sequence[Tuple[str, Sequence[Maps]]], image: np.ndarray, caption: str) -> Any:
    """Draw a column per network (title, maps of each block) and a row per block; every map has its own colour range."""
    columns = [[Panel(image, "input")]]
    for name, blocks in networks:
        columns.append([])
        for title, _, maps in blocks:
            low, high = (edge(maps, axis=(1, 2), keepdims=True) for edge in (np.min, np.max))
            sheet = picture.mosaic((maps - low) / np.maximum(high - low, 1e-12), columns=6)
            columns[-1].append(Panel(sheet, title if columns[-1] else f"{name}\n{title}"))
    return picture.draw_grid(columns, caption)


def draw_words(networks: Sequence[Network], own: BlockSettings) -> picture.Drawn:
    """Draw words after some blocks, averaged over their channels."""
    (network,) = networks
    shown = images.show(own, network.opened.data_config(own.img_size))
    numbers = network.block_numbers(own.blocks)
    maps = dict(zip(numbers, network.word_maps(shown.tensor, numbers)))
    columns = [[Panel(shown.pixels, "input")], *([Panel(maps[number], f"words, block {number}")] for number in maps)]
    caption = f"words averaged over their channels; {shown.caption}; each map has its own colour range"
    figure = picture.draw_grid(columns, f"{network.title}\n{caption}", most_in=2.0)
    return figure, {"image": shown.pixels, **{f"block{number}": values for number, values in maps.items()}}
