"""How diverse feature maps are, and how much local structure they keep (paper, section 4.4 and figure 5), in numbers.

The features of a block are one row per sentence of all images and one column per channel: (B*N, D).
"""

from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from tnt_timm.errors import UserError
from tnt_timm.figures import images, picture
from tnt_timm.figures.network import Network

VARIANCE = 0.9  # that the principal components have to explain
BATCH_SIZE = 64
MEASURES = {
    "correlation": "mean |correlation|\nbetween feature maps",
    "components": f"components for {VARIANCE:.0%} of\nvariance (% of channels)",
    "local": "pixels of a patch explained\nby its sentence (R²)",
}


class DiversitySettings(images.DatasetSettings):
    """Networks and dataset"""


class Measured(NamedTuple):
    """The numbers of one block."""

    network: str
    block: int
    correlation: float
    components: float
    local: float


def draw_diversity(networks: Sequence[Network], own: DiversitySettings) -> picture.Drawn:
    """Draw how diverse the feature maps of each block are, and how much of its pixels a sentence keeps."""
    dataset = images.dataset_of(networks, own)
    found: List[Measured] = []
    for network in networks:
        preprocessing = network.opened.data_config()
        pixels, targets = images.labelled(dataset, preprocessing, own.num_images, own.seed)
        found += measure(network, images.normalise(pixels, preprocessing))
    figure = draw(found, f"{len(targets)} images drawn at random with seed {own.seed}")
    return figure, [each._asdict() for each in found]


def measure(network: Network, inputs: Tensor) -> List[Measured]:
    """Return the numbers of every block of a network, for normalised images (B, 3, H, W)."""
    depth = len(network.model.feature_info)
    blocks = range(1, depth + 1)
    batches = [network.feature_maps(batch, blocks) for batch in inputs.split(BATCH_SIZE)]
    found = []
    for block, maps in zip(blocks, map(np.concatenate, zip(*batches))):  # (B, D, h, w)
        features = maps.transpose(0, 2, 3, 1).reshape(-1, maps.shape[1]).astype(np.float64)
        if not np.isfinite(features).all():
            raise UserError(f"{network.given}: some features are not finite numbers; check the weights")
        local = explained(features, patches(inputs, maps.shape[2:]))
        found.append(Measured(network.title, block, correlation(features), components(features), local))
    return found


def correlation(features: np.ndarray) -> float:
    """Return the mean absolute correlation between two channels of features (n, D). Constant channels are left out."""
    centred = features - features.mean(axis=0)
    norms = np.linalg.norm(centred, axis=0)
    unit = centred[:, norms > 0] / norms[norms > 0]
    matrix = np.abs(unit.T @ unit)
    return float(matrix[np.triu_indices(len(matrix), k=1)].mean())


def components(features: np.ndarray) -> float:
    """Return how many principal components explain 90 % of the variance of features (n, D), in % of D."""
    centred = features - features.mean(axis=0)
    variances = np.linalg.eigvalsh(centred.T @ centred)[::-1].clip(min=0)
    needed = int(np.searchsorted(variances.cumsum() / variances.sum(), VARIANCE)) + 1
    return 100 * needed / features.shape[1]


def patches(inputs: Tensor, grid: Sequence[int]) -> np.ndarray:
    """Return the pixels of the patches under a grid (h, w), without each patch's mean: (B*h*w, pixels), channels averaged."""
    size = inputs.shape[2] // grid[0], inputs.shape[3] // grid[1]
    columns = F.unfold(inputs.mean(dim=1, keepdim=True), size, stride=size)  # (B, pixels, h*w)
    pixels = columns.transpose(1, 2).flatten(0, 1).numpy().astype(np.float64)
    return pixels - pixels.mean(axis=1, keepdims=True)


def explained(features: np.ndarray, pixels: np.ndarray) -> float:
    """Return the share of the variance of pixels (n, P) that a linear map of features (n, D) explains.

    The map is fitted to the first half of the rows (ridge regression of standardised features), and measured on the other.
    """
    deviation = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    half = len(features) // 2
    fitted = Ridge(alpha=1.0).fit(scaled[:half], pixels[:half])
    error = ((pixels[half:] - fitted.predict(scaled[half:])) ** 2).sum()
    return float(1 - error / ((pixels[half:] - pixels[:half].mean(axis=0)) ** 2).sum())


def draw(found: Sequence[Measured], caption: str) -> Any:
    """Draw a panel per measure and a line per network, over the blocks."""
    figure = picture.new(picture.PAGE_IN, 2.6)
    names = list(dict.fromkeys(each.network for each in found))
    styles: Dict[str, Dict[str, Any]] = {
        name: dict(color=colour, marker="o") for name, colour in zip(names, picture.colours(len(names)))
    }
    for axes, (measure_name, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items()):
        for name in names:
            points = [(each.block, getattr(each, measure_name)) for each in found if each.network == name]
            axes.plot(*zip(*points), **styles[name])
        axes.set(xlabel="block", xticks=sorted({each.block for each in found}))
        axes.set_title(label)
        axes.grid(True)
    picture.write_heading(figure, caption)
    picture.write_legend(figure, styles)
    return figure
