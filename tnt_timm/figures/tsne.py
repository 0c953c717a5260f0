"""t-SNE (scikit-learn's) of feature maps and of class tokens (paper, figure 5b)."""

from typing import Any, List, NamedTuple, Optional, Sequence

import numpy as np
from sklearn.manifold import TSNE

from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures import picture

PERPLEXITY = 30.0  # scikit-learn's default, where there are points enough
LEAST_POINTS = 4  # with fewer there is no neighbour to be near to


class Cloud(NamedTuple):
    """The points of one model."""

    title: str  # the model
    about: str  # what a point is, where the caption does not say it
    points: np.ndarray  # (n, 2)
    perplexity: float
    labels: Optional[np.ndarray] = None  # (n,) class numbers


def embed(
    title: str,
    about: str,
    features: np.ndarray,
    perplexity: Optional[float],
    seed: int,
    labels: Optional[np.ndarray] = None,
) -> Cloud:
    """Features (n, ...) -> points (n, 2); each feature is one point, all of its numbers its coordinates.

    It starts from the principal components, so the same features, perplexity and seed give the same points. Features that
    differ by rounding (another machine or number of threads) give points that drift apart: what is near stays near.

    Args:
        title, about: see Cloud.
        features: of one model.
        perplexity: None for 30, or (n - 1) / 3 where that is less.
        seed: of t-SNE.
        labels: (n,) class numbers.

    Raises:
        ConfigError: fewer features than the perplexity needs.
        UserError: features that t-SNE makes nothing of.
    """
    rows = features.reshape(len(features), -1).astype(np.float32)
    if len(rows) < LEAST_POINTS:
        raise UserError(f"{title}: {len(rows)} points for t-SNE, which needs {LEAST_POINTS}")
    if rows.shape[1] < 2:
        raise UserError(f"{title}: maps of one pixel, of which t-SNE makes nothing; raise --img-size")
    if not np.isfinite(rows).all():
        raise UserError(f"{title}: some features are not finite numbers; are the weights?")
    if perplexity is None:
        perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    if perplexity >= len(features):
        raise ConfigError(f"perplexity: {perplexity:g}: must be below the number of points, {len(features)}")
    points = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)
    return Cloud(title, about, points, perplexity, labels)


def how(clouds: Sequence[Cloud], seed: int) -> str:
    """What the caption says of t-SNE itself."""
    used = dict.fromkeys(f"{cloud.perplexity:.3g}" for cloud in clouds)
    scale = ", one scale for all panels" if len(clouds) > 1 else ""
    return f"perplexity {' and '.join(used)}, seed {seed}{scale}"


def numbers(clouds: Sequence[Cloud], classes: Optional[Sequence[str]], seed: int) -> List[dict]:
    """A row per point."""
    rows = []
    for cloud in clouds:
        for index, (x, y) in enumerate(cloud.points.tolist()):
            row = dict(model=cloud.title, point=index, x=x, y=y)
            if cloud.labels is not None:
                row["class"] = classes[cloud.labels[index]] if classes else int(cloud.labels[index])
            rows.append(row | dict(perplexity=cloud.perplexity, seed=seed))
    return rows


def draw(clouds: Sequence[Cloud], classes: Optional[Sequence[str]], caption: str) -> Any:
    """One panel per model, all of one size and scale, which is that of both axes; coloured by class where there are labels.

    The axes of t-SNE mean nothing, so they have no ticks.
    """
    labelled = any(cloud.labels is not None for cloud in clouds)
    width = picture.PAGE_IN if len(clouds) > 1 else picture.COLUMN_IN * 1.25
    legend_in = 0.7 if labelled else 0.0
    panel_in = (width - legend_in) / len(clouds)
    titles = [picture.fitted(f"{cloud.title}\n{cloud.about}".strip(), panel_in) for cloud in clouds]
    lowest, highest = ([edge(cloud.points, axis=0) for cloud in clouds] for edge in (np.min, np.max))
    half = 0.53 * np.max([high - low for low, high in zip(lowest, highest)], axis=0)
    half = np.maximum(half, half[::-1] / 2)  # no panel is longer than twice its height
    with picture.styled():
        figure = picture.new(width, panel_in * half[1] / half[0] + max(title.height_in for title in titles) + 0.1)
        panels = figure.subplots(1, len(clouds), squeeze=False)[0]
        for axes, cloud, title, low, high in zip(panels, clouds, titles, lowest, highest):
            _draw_points(axes, cloud, classes)
            picture.write_title(axes, title)
            left, bottom = (low + high) / 2 - half
            axes.set(xlim=(left, left + 2 * half[0]), ylim=(bottom, bottom + 2 * half[1]))
            axes.set(xticks=[], yticks=[], aspect="equal")
        handles, texts = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, texts, loc="outside right center", frameon=False, handletextpad=0.1, markerscale=2)
        picture.write_caption(figure, caption)
    return figure


def _draw_points(axes: Any, cloud: Cloud, classes: Optional[Sequence[str]]) -> None:
    if cloud.labels is None:
        axes.scatter(*cloud.points.T, s=6, linewidths=0, color="tab:blue")
        return
    present = np.unique(cloud.labels)
    for label, colour in zip(present, picture.colours(len(present))):
        text = (classes[label] if classes else str(label)) if len(present) <= 20 else None
        axes.scatter(*cloud.points[cloud.labels == label].T, s=6, linewidths=0, color=[colour], label=text)
