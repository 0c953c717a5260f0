"""Similarity of the learned positions: which sentence positions, and which word positions, a network takes for near."""

from typing import Any, Dict

import numpy as np
import torch
from torch import nn

from tnt_timm.errors import UserError
from tnt_timm.figures import picture

NAMES = {"sentence": "sentence positions", "word": "word positions"}


def similarities(model: nn.Module, name: str) -> Dict[str, np.ndarray]:
    """Cosine similarities of the positions of a TNT or a vision transformer: kind -> (h, w, h, w).

    The cell [i, j] is a map: how similar the position in row i, column j is to each. Kinds are 'sentence' (patches) and
    'word'; those that the network does not have are left out.

    Raises:
        UserError: the network has no learned positions.
    """
    found = {}
    embed = getattr(model, "pixel_embed", None) or getattr(model, "patch_embed", None)
    patches = getattr(model, "patch_pos", None)
    if patches is None:
        patches = getattr(model, "pos_embed", None)
    if isinstance(patches, torch.Tensor) and patches.ndim == 3 and hasattr(embed, "grid_size"):
        rows, columns = embed.grid_size
        found["sentence"] = _cosines(patches[0, -rows * columns :], rows, columns)  # class tokens stand in front
    words = getattr(model, "pixel_pos", None)
    if isinstance(words, torch.Tensor):
        found["word"] = _cosines(words[0].flatten(1).T, *words.shape[2:])
    if not found:
        raise UserError(f"{name}: has no learned positions")
    return found


def _cosines(positions: torch.Tensor, rows: int, columns: int) -> np.ndarray:  # (h*w, D) -> (h, w, h, w)
    unit = nn.functional.normalize(positions.detach().float(), dim=-1)
    return (unit @ unit.T).reshape(rows, columns, rows, columns).numpy()


def numbers(found: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """The arrays behind the picture."""
    return {f"{kind}_similarity": values for kind, values in found.items()}


def draw(found: Dict[str, np.ndarray], title: str, caption: str) -> Any:
    """One panel per kind: the maps of all positions, each where its position is."""
    with picture.styled():
        side_in = (picture.PAGE_IN - 1.5) / 2  # beside the scale of colours
        figure = picture.new(side_in * len(found) + 1.5, side_in + 0.25)
        figure.get_layout_engine().set(wspace=0.12)  # wider than the gaps between the maps of a panel
        for axes, (kind, values) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
            rows, columns, h, w = values.shape
            sheet = picture.mosaic(values.reshape(-1, h, w), columns, gap=max(1, h // 8))
            picture.show_map(axes, sheet, picture.fitted(f"{NAMES[kind]}, {rows} x {columns}", side_in), (-1, 1))
        figure.colorbar(axes.images[0], ax=figure.axes, shrink=0.7, label="cosine similarity")
        picture.write_heading(figure, title)
        picture.write_caption(figure, caption)
    return figure
