"""t-SNE (scikit-learn's) of feature maps and of class tokens (paper, figure 5b)."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
from pydantic import Field
from sklearn.manifold import TSNE

from tnt_timm.errors import ConfigError, UserError
from tnt_timm.figures import images, lettering, picture
from tnt_timm.figures.network import Network

MOST_NAMED = 20  # classes that a legend can show
PERPLEXITY = "perplexity of t-SNE (default: 30, or (points - 1) / 3 where that is less)"


class MapSettings(images.ImageSettings):
    """Networks, image and t-SNE"""

    img_size: int = Field(1024, gt=0, description="edge of the square input in pixels")
    block: Optional[int] = Field(None, gt=0, description="counted from 1 (default: the last)")
    perplexity: Optional[float] = Field(None, gt=0, description=PERPLEXITY)


class ClassSettings(images.DatasetSettings):
    """Networks, dataset and t-SNE"""

    perplexity: Optional[float] = Field(None, gt=0, description=PERPLEXITY)


class Cloud(NamedTuple):
    """The points of one network."""

    title: str
    points: np.ndarray  # (n, 2)
    perplexity: float
    classes: Optional[Sequence[str]] = None  # of each point
    about: str = ""  # what a point is, where the caption does not say it


def draw_maps(networks: Sequence[Network], own: MapSettings) -> picture.Drawn:
    """Draw the t-SNE of a block's feature maps, models side by side (paper, figure 5b)."""
    clouds = []
    for network in networks:
        shown = images.show(own, network.opened.data_config(own.img_size))
        block = network.block_numbers([own.block] if own.block else None)[-1]
        maps = network.feature_maps(shown.tensor, [block])[0][0]
        cloud = embed(network.title, maps, own.perplexity, own.seed)
        clouds.append(cloud._replace(about=f"{len(maps)} maps of {network.unit} {block}"))
    return draw(clouds, f"t-SNE of feature maps, {how(clouds, own.seed)}; {shown.caption}"), rows(clouds, own.seed)


def draw_classes(networks: Sequence[Network], own: ClassSettings) -> picture.Drawn:
    """Draw the t-SNE of class tokens, coloured by class, models side by side."""
    dataset = images.dataset_of(networks, own)
    clouds = []
    for network in networks:
        preprocessing = network.opened.data_config()
        pixels, targets = images.labelled(dataset, preprocessing, own.num_images, own.seed)
        classes = [dataset.classes[target] if dataset.classes else str(target) for target in targets]
        tokens = network.head_inputs(images.normalise(pixels, preprocessing))
        clouds.append(embed(network.title, tokens, own.perplexity, own.seed, classes))
    caption = f"t-SNE of what the head reads of {len(targets)} images, {how(clouds, own.seed)}"
    return draw(clouds, caption), rows(clouds, own.seed)


def embed(
    title: str, features: np.ndarray, perplexity: Optional[float], seed: int, classes: Optional[Sequence[str]] = None
) -> Cloud:
    """Turn features (n, ...) of one network into points (n, 2). All numbers of a feature are its coordinates.

    t-SNE starts from the principal components, so the same features, perplexity and seed give the same points. Features
    that differ by rounding (another machine or number of threads) give points that drift apart. Raise UserError if t-SNE
    cannot use the features.
    """
    features = features.reshape(len(features), -1).astype(np.float32)
    count, dimensions = features.shape
    if count < 4:
        raise UserError(f"{title}: {count} points for t-SNE, which needs 4")
    if dimensions < 2:
        raise UserError(f"{title}: maps of one pixel are too small for t-SNE; raise --img-size")
    if not np.isfinite(features).all():
        raise UserError(f"{title}: some features are not finite numbers; check the weights")
    perplexity = perplexity or min(30, (count - 1) / 3)
    if perplexity >= count:
        raise ConfigError(f"perplexity: {perplexity:g}: must be below the number of points, {count}")
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    return Cloud(title, points, perplexity, classes)


def how(clouds: Sequence[Cloud], seed: int) -> str:
    """Return the settings of t-SNE, for a caption."""
    used = dict.fromkeys(f"{cloud.perplexity:.3g}" for cloud in clouds)
    return f"perplexity {' and '.join(used)}, seed {seed}" + ", one scale for all panels" * (len(clouds) > 1)


def rows(clouds: Sequence[Cloud], seed: int) -> List[Dict[str, Any]]:
    """Return a row per point."""
    found = []
    for cloud in clouds:
        for index, (x, y) in enumerate(cloud.points.tolist()):
            named = {"class": cloud.classes[index]} if cloud.classes else {}
            found.append(
                dict(model=cloud.title, point=index, x=x, y=y, **named, perplexity=cloud.perplexity, seed=seed)
            )
    return found


def draw(clouds: Sequence[Cloud], caption: str) -> Any:
    """Draw a panel per network on one scale, coloured by class where there are classes.

    The axes of t-SNE mean nothing, so they have no ticks, and each cloud is moved to the middle of its panel.
    """
    width_in = picture.PAGE_IN if len(clouds) > 1 else 1.25 * picture.COLUMN_IN
    panel_in = width_in / len(clouds)
    figure = picture.new(width_in, panel_in + 1)
    panels = figure.subplots(1, len(clouds), sharex=True, sharey=True, squeeze=False)[0]
    for axes, cloud in zip(panels, clouds):
        points = cloud.points - (cloud.points.max(axis=0) + cloud.points.min(axis=0)) / 2
        classes = np.array(cloud.classes or [""] * len(points))
        present = np.unique(classes)
        for name, colour in zip(present, picture.colours(len(present))):
            label = lettering.legend_name(name) if len(present) <= MOST_NAMED else ""
            axes.scatter(*points[classes == name].T, s=6, linewidths=0, color=[colour], label=label)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_title(picture.wrapped(f"{cloud.title}\n{cloud.about}".strip(), panel_in))
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside right center", handletextpad=0.1, markerscale=2)
    picture.write_heading(figure, caption)
    return figure
