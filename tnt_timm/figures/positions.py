"""Similarity of learned positions: which positions a network treats as near to each other."""

from typing import Any, Dict, Sequence

import numpy as np
import torch
from torch import nn

from tnt_timm.errors import UserError
from tnt_timm.figures import picture
from tnt_timm.figures.network import Network, NetworkSettings


def draw_positions(networks: Sequence[Network], own: NetworkSettings) -> picture.Drawn:
    """Draw the similarity of the learned positions."""
    found = similarities(networks[0])
    return draw(found, networks[0].title), {f"{kind}_similarity": values for kind, values in found.items()}


def similarities(network: Network) -> Dict[str, np.ndarray]:
    """Return cosine similarities of the absolute positions of a TNT, PyramidTNT or ViT, per kind (h, w, h, w).

    Cell [i, j] is a map: how similar the position in row i, column j is to each one. Kinds are 'sentence' (patches) and
    'word', as far as the network has them. Raise UserError if it has none.
    """
    model, found = network.model, {}
    embed = next(
        (getattr(model, name) for name in ("pixel_embed", "patch_embed", "stem") if hasattr(model, name)), None
    )
    patches = getattr(model, "patch_pos", getattr(model, "pos_embed", None))
    if isinstance(patches, torch.Tensor) and patches.ndim == 3 and hasattr(embed, "grid_size"):
        rows, columns = embed.grid_size
        found["sentence"] = _cosines(patches[0, -rows * columns :], rows, columns)  # class tokens come first
    words = getattr(model, "pixel_pos", None)
    if isinstance(words, torch.Tensor):
        found["word"] = _cosines(words[0].flatten(1).T, *words.shape[2:])
    if not found:
        raise UserError(f"{network.given}: has no learned positions")
    return found


def _cosines(positions: torch.Tensor, rows: int, columns: int) -> np.ndarray:  # (h*w, D) -> (h, w, h, w)
    unit = nn.functional.normalize(positions.detach().float(), dim=-1)
    return (unit @ unit.T).reshape(rows, columns, rows, columns).numpy()


def draw(found: Dict[str, np.ndarray], title: str) -> Any:
    """Draw a panel per kind: the maps of all positions, each at its position."""
    columns = []
    for kind, values in found.items():
        rows, count, h, w = values.shape
        sheet = picture.mosaic(values.reshape(-1, h, w), count)
        columns.append([picture.Panel(sheet, f"{kind} positions, {rows} x {count}")])
    figure = picture.draw_grid(
        columns, f"{title}\neach small map: how similar one absolute position is to all others", 2.8
    )
    figure.get_layout_engine().set(wspace=0.12)  # wider than the gaps between the maps of a panel
    for axes in figure.axes:
        axes.images[0].set_clim(-1, 1)
    figure.colorbar(axes.images[0], ax=figure.axes, shrink=0.7, label="cosine similarity")
    return figure
