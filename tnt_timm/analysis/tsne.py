"""t-SNE (scikit-learn's) of feature maps and of class tokens (paper, figure 5b)."""

from typing import Any, List, NamedTuple, Optional, Sequence

import numpy as np
from sklearn.manifold import TSNE

from tnt_timm.analysis import picture
from tnt_timm.errors import ConfigError


class Cloud(NamedTuple):
    """The points of one model."""

    title: str
    points: np.ndarray  # (n, 2)
    labels: Optional[np.ndarray] = None  # (n,) class numbers


def embed(features: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Features (n, ...) -> points (n, 2); each feature is one point, all of its numbers its coordinates.

    It starts from the principal components, so the same features, perplexity and seed give the same points.

    Raises:
        ConfigError: fewer features than the perplexity needs.
    """
    if perplexity >= len(features):
        raise ConfigError(f"perplexity: {perplexity:g}: must be below the number of points, {len(features)}")
    rows = features.reshape(len(features), -1).astype(np.float32)
    return TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)


def numbers(clouds: Sequence[Cloud], classes: Optional[Sequence[str]], perplexity: float, seed: int) -> List[dict]:
    """A row per point."""
    rows = []
    for cloud in clouds:
        for index, (x, y) in enumerate(cloud.points.tolist()):
            row = dict(model=cloud.title.split("\n")[0], point=index, x=x, y=y)
            if cloud.labels is not None:
                row["class"] = classes[cloud.labels[index]] if classes else int(cloud.labels[index])
            rows.append(row | dict(perplexity=perplexity, seed=seed))
    return rows


def draw(clouds: Sequence[Cloud], classes: Optional[Sequence[str]], caption: str) -> Any:
    """One panel per model; coloured by class where there are labels. The axes of t-SNE mean nothing, so they have no ticks."""
    with picture.styled():
        width = picture.PAGE_IN if len(clouds) > 1 else picture.COLUMN_IN * 1.25
        figure = picture.new(width, width / len(clouds) + 0.6)
        panels = figure.subplots(1, len(clouds), squeeze=False)[0]
        for axes, cloud in zip(panels, clouds):
            _draw_cloud(axes, cloud, classes)
        handles, texts = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, texts, loc="outside right center", frameon=False, handletextpad=0.1, markerscale=2)
        picture.write_caption(figure, caption)
    return figure


def _draw_cloud(axes: Any, cloud: Cloud, classes: Optional[Sequence[str]]) -> None:
    if cloud.labels is None:
        axes.scatter(*cloud.points.T, s=6, linewidths=0, color="tab:blue")
    else:
        present = np.unique(cloud.labels)
        for label, colour in zip(present, picture.colours(len(present))):
            text = (classes[label] if classes else str(label)) if len(present) <= 20 else None
            axes.scatter(*cloud.points[cloud.labels == label].T, s=6, linewidths=0, color=[colour], label=text)
    axes.set_title(cloud.title)
    axes.set_xticks([])
    axes.set_yticks([])
