"""Names beside the points of a plot, so that none covers another, a point or a line; one that stands apart has a line to its
point.

Each name is tried at 16 angles and several distances, and the places are chosen that cost least together.
"""

import itertools
from typing import Any, List, NamedTuple, Sequence, Tuple

import numpy as np

MARKER_PT = 3.0  # half the edge of the square that a point takes
DISTANCES_PT = (4, 8, 13, 19, 26, 34, 44, 56)  # from the point to the nearest edge of its name
ADJACENT_PT = 8  # up to here the eye needs no line
OTHERS_PT = 7.0  # nearer than this to another point, a name would be taken for that one's
PADDING_PT = 1.0  # around a name
ANGLES = 16
ROUNDS, STARTS = 50, 16  # of the search for places
# What is to be paid; a distance costs its points.
OUTSIDE, ON_POINT, ON_NAME, ON_LINE, NEAR_OTHER = 1e5, 1e4, 1e4, 1e4, 10.0
LEADER, LEADER_ON_NAME, LEADER_ON_POINT, LEADER_ON_LINE = 5.0, 3e3, 1e3, 12.0


class Label(NamedTuple):
    """A name, the point that it belongs to (in data coordinates), and its colour."""

    text: str
    point: Tuple[float, float]
    colour: Any


def write(axes: Any, labels: Sequence[Label], lines: Sequence[Sequence[Tuple[float, float]]], fontsize: float) -> None:
    """Write names into axes whose place in the figure and limits are settled.

    Args:
        axes: of matplotlib.
        labels: a name per point.
        lines: each a sequence of points in data coordinates, joined by straight strokes.
        fontsize: in points.
    """
    if not labels:
        return
    pt = axes.figure.dpi / 72
    spots = axes.transData.transform([label.point for label in labels])
    ends = [axes.transData.transform(line) for line in lines]
    strokes = np.array([[*a, *b] for line in ends for a, b in itertools.pairwise(line)]).reshape(-1, 4)
    sizes = _sizes(axes, labels, fontsize) + 2 * PADDING_PT * pt
    inside = axes.bbox.padded(-PADDING_PT * pt).extents
    options = [_Options(spot, size, inside, spots, strokes, pt) for spot, size in zip(spots, sizes)]
    for label, spot, option, choice in zip(labels, spots, options, _settle(options)):
        _annotate(axes, label, spot, option.boxes[choice], option.leads[choice], fontsize, pt)


def _sizes(axes: Any, labels: Sequence[Label], fontsize: float) -> np.ndarray:
    """(names, 2): width and height in pixels."""
    sizes = []
    for label in labels:
        text = axes.text(0, 0, label.text, fontsize=fontsize)
        extent = text.get_window_extent()
        sizes.append((extent.width, extent.height))
        text.remove()
    return np.array(sizes)


class _Options:
    """The places of one name: boxes (K, 4) and lines to the point (K, 4), in pixels, and what each costs by itself."""

    def __init__(
        self, spot: np.ndarray, size: np.ndarray, inside: np.ndarray, spots: np.ndarray, strokes: np.ndarray, pt: float
    ):
        turns = 2 * np.pi * np.arange(ANGLES) / ANGLES
        towards = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        aligned = np.clip(1.5 * towards, -1, 1)  # left, centred, right; below, beside, above
        distances = np.repeat(np.array(DISTANCES_PT, float), ANGLES)
        towards, aligned = (np.tile(part, (len(DISTANCES_PT), 1)) for part in (towards, aligned))
        centres = spot + towards * distances[:, None] * pt + aligned * size / 2
        self.boxes = np.concatenate([centres - size / 2, centres + size / 2], axis=1)
        nearest = np.clip(spot, self.boxes[:, :2], self.boxes[:, 2:])
        self.leads = distances > ADJACENT_PT
        self.leaders = np.concatenate([np.broadcast_to(spot, nearest.shape), nearest], axis=1)
        self.leaders[~self.leads] = np.nan  # which meets nothing
        radius = MARKER_PT * pt
        markers = np.concatenate([spots - radius, spots + radius], axis=1)
        others = markers[np.abs(spots - spot).max(axis=1) > 2 * radius]  # one underneath is met by every line
        near = (OTHERS_PT - MARKER_PT) * pt
        self.cost = distances + LEADER * self.leads
        self.cost += OUTSIDE * ((self.boxes[:, :2] < inside[:2]) | (self.boxes[:, 2:] > inside[2:])).any(axis=1)
        self.cost += ON_POINT * _overlap(self.boxes, markers).sum(axis=1)
        self.cost += NEAR_OTHER * _overlap(self.boxes, others + [-near, -near, near, near]).sum(axis=1)
        self.cost += ON_LINE * _meet(strokes, self.boxes).sum(axis=0)
        self.cost += LEADER_ON_POINT * _meet(self.leaders, others).sum(axis=1)
        self.cost += LEADER_ON_LINE * _cross(self.leaders, strokes).sum(axis=1)


def _settle(options: Sequence[_Options]) -> List[int]:
    """The place of each name, by annealing: in turns all take the best that the others leave, at first with some chance."""
    count, places = len(options), len(options[0].cost)
    alone = np.stack([option.cost for option in options])  # (names, K)
    boxes, leaders = (np.concatenate([getattr(o, part) for o in options]) for part in ("boxes", "leaders"))
    shared = np.zeros((count, places, count, places), np.float32)  # what two places cost each other
    for i, own in enumerate(options):
        both = ON_NAME * _overlap(own.boxes, boxes)
        both += LEADER_ON_NAME * _meet(own.leaders, boxes)
        both += LEADER_ON_NAME * _meet(leaders, own.boxes).T
        both += LEADER_ON_NAME * _cross(own.leaders, leaders)
        shared[i] = both.reshape(places, count, places)
        shared[i, :, i] = 0
    every, best, least = np.arange(count), [0] * count, np.inf
    heats = [
        *np.geomspace(50, 0.5, ROUNDS),
        0,
        0,
        0,
    ]  # chance and gentleness at first, so that names may pass each other
    weights = [*np.geomspace(0.003, 1, ROUNDS), 1, 1, 1]
    for seed in range(STARTS):
        rng, chosen = np.random.default_rng(seed), np.full(count, -1)
        for heat, weight in zip(heats, weights):
            for i in rng.permutation(count):
                placed = every[(chosen >= 0) & (every != i)]
                cost = alone[i] + weight * shared[placed, chosen[placed], i].sum(axis=0)
                chosen[i] = (cost + heat * rng.gumbel(size=places)).argmin()
        cost = alone[every, chosen].sum() + shared[every, chosen][:, every, chosen].sum() / 2
        if cost < least:
            best, least = chosen.tolist(), cost
    return best


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(A, 4) and (B, 4) boxes -> (A, B): do they share a pixel?"""
    ax0, ay0, ax1, ay1 = a.T[:, :, None]
    bx0, by0, bx1, by1 = b.T
    return (ax0 < bx1) & (ax1 > bx0) & (ay0 < by1) & (ay1 > by0)


def _meet(strokes: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(S, 4) strokes and (B, 4) boxes -> (S, B): does a stroke pass through a box? One of NaN passes through none."""
    enters, leaves = 0.0, 1.0  # where on its way a stroke is inside
    for start, end, low, high in zip(strokes.T[:2], strokes.T[2:], boxes.T[:2], boxes.T[2:]):
        way = np.where(end == start, 1e-9, end - start)[:, None]
        one, two = (low - start[:, None]) / way, (high - start[:, None]) / way
        enters, leaves = np.maximum(enters, np.minimum(one, two)), np.minimum(leaves, np.maximum(one, two))
    return enters <= leaves


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(A, 4) and (B, 4) strokes -> (A, B): do they cross? Those that begin at the same point do not."""

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0])

    p, q, r, s = a[:, None, :2], a[:, None, 2:], b[None, :, :2], b[None, :, 2:]
    return (side(p, q, r) * side(p, q, s) < 0) & (side(r, s, p) * side(r, s, q) < 0)


def _annotate(
    axes: Any, label: Label, spot: np.ndarray, box: np.ndarray, leads: bool, fontsize: float, pt: float
) -> None:
    from matplotlib.patheffects import withStroke

    centre = (box[:2] + box[2:]) / 2
    nearest = (np.clip(spot, box[:2], box[2:]) - box[:2]) / (box[2:] - box[:2])
    arrow = dict(arrowstyle="-", color=label.colour, linewidth=0.4, relpos=tuple(nearest), shrinkA=0, shrinkB=MARKER_PT)
    text = axes.annotate(
        label.text,
        label.point,
        tuple((centre - spot) / pt),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=fontsize,
        color=label.colour,
        arrowprops=arrow if leads else None,
        zorder=3,
    )
    text.set_in_layout(False)
    text.set_path_effects([withStroke(linewidth=1.2, foreground="white")])  # the grid makes way for it
