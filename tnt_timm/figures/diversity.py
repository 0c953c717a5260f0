"""How diverse feature maps are, and how much local structure they keep (paper, figure 5), in numbers.

All numbers of a block follow from sums over its sentences, so features of many images need not be kept. A row [1, x, y] of a
sentence has its features x (D,) and the pixels y (P,) of its patch. The moments of n rows are the sum of their outer products.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from tnt_timm.errors import UserError
from tnt_timm.figures import images, picture
from tnt_timm.figures.network import Network

VARIANCE = 0.9  # that the principal components have to explain
RIDGE = 1e-4  # of the linear map, as a part of the features' variance
CONSTANT = 1e-12  # relative variance of a channel that is called constant
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
    """Return the numbers of every block of a network, for normalised images (B, 3, H, W). Raise UserError if it has none."""
    blocks = range(1, len(network.model.feature_info) + 1)
    half = len(inputs) // 2
    fitted, tested = (moments(network, part, blocks) for part in (inputs[:half], inputs[half:]))
    found = []
    for block, (width, fit), (_, test) in zip(blocks, fitted, tested):
        covariance = central(fit + test)[:width, :width]
        varying = np.diag(covariance) > CONSTANT * np.diag(fit + test)[1 : width + 1] / (fit + test)[0, 0]
        if not np.isfinite(fit + test).all() or varying.sum() < 2:
            raise UserError(
                f"{network.given}: {network.unit} {block}: features are constant or not finite; check the weights"
            )
        covariance = covariance[np.ix_(varying, varying)]
        local = explained(fit, test, width)
        found.append(Measured(network.title, block, correlation(covariance), components(covariance, width), local))
    return found


def moments(network: Network, inputs: Tensor, blocks: Sequence[int]) -> List[Tuple[int, np.ndarray]]:
    """Return, for each block, the number of features D and the moments (1+D+P, 1+D+P) of all sentences."""
    sums: List[Any] = [0.0] * len(blocks)
    widths = [0] * len(blocks)
    for batch in inputs.split(BATCH_SIZE):
        for at, maps in enumerate(network.feature_maps(batch, blocks)):  # (B, D, h, w)
            widths[at] = maps.shape[1]
            stride, (height, width) = network.model.feature_info[blocks[at] - 1]["reduction"], batch.shape[2:]
            if (height // stride, width // stride) != maps.shape[2:] or height % stride or width % stride:
                raise UserError(
                    f"{network.given}: {network.unit} {blocks[at]} has a map of {maps.shape[2]} x {maps.shape[3]}, whose cells "
                    f"are no equal parts of {height} x {width} pixels; choose an --img-size that is a multiple of {stride}"
                )
            features = maps.transpose(0, 2, 3, 1).reshape(-1, widths[at])
            pixels = patches(batch, maps.shape[2:])
            rows = np.concatenate([np.ones((len(pixels), 1)), features, pixels], axis=1, dtype=np.float64)
            sums[at] = sums[at] + rows.T @ rows
    return list(zip(widths, sums))


def patches(inputs: Tensor, grid: Sequence[int]) -> np.ndarray:
    """Return the pixels of the patches under a grid (h, w), without each patch's mean: (B*h*w, P), channels averaged."""
    size = inputs.shape[2] // grid[0], inputs.shape[3] // grid[1]
    columns = F.unfold(inputs.mean(dim=1, keepdim=True), size, stride=size)  # (B, P, h*w)
    pixels = columns.transpose(1, 2).flatten(0, 1).numpy()
    return pixels - pixels.mean(axis=1, keepdims=True)


def central(found: np.ndarray, around: Optional[np.ndarray] = None) -> np.ndarray:
    """Return the second moments of [x, y] around a mean (default: their own), from the moments of [1, x, y]."""
    around = found[0, 1:] / found[0, 0] if around is None else around
    shift = np.concatenate([-around[:, None], np.eye(len(around))], axis=1)
    return shift @ found @ shift.T / found[0, 0]


def correlation(covariance: np.ndarray) -> float:
    """Return the mean absolute correlation between two channels."""
    deviations = np.sqrt(np.diag(covariance))
    matrix = np.abs(covariance / np.outer(deviations, deviations))
    return float(matrix[np.triu_indices(len(matrix), k=1)].mean())


def components(covariance: np.ndarray, channels: int) -> float:
    """Return how many principal components explain 90 % of the variance, in % of the channels."""
    variances = np.linalg.eigvalsh(covariance)[::-1].clip(min=0)
    needed = int(np.searchsorted(variances.cumsum() / variances.sum(), VARIANCE)) + 1
    return 100 * needed / channels


def explained(fit: np.ndarray, test: np.ndarray, width: int) -> float:
    """Return the share of the pixels' variance that a linear map of the features explains.

    Args:
        fit, test: moments of the sentences to fit the map to (ridge regression), and of those to measure it on.
        width: number of features D.
    """
    own = central(fit)
    x, y = slice(width), slice(width, None)
    penalty = RIDGE * np.diag(np.diag(own)[x].clip(min=np.diag(own)[x].max() * CONSTANT))
    weights = np.linalg.solve(own[x, x] + penalty, own[x, y])  # (D, P)
    other = central(test, around=fit[0, 1:] / fit[0, 0])
    error = np.trace(other[y, y] - 2 * weights.T @ other[x, y] + weights.T @ other[x, x] @ weights)
    return float(1 - error / np.trace(other[y, y]))


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
