"""Turn the records of finished runs into means, standard deviations and paired intervals over the seeds."""

import math
from typing import Dict, Iterable, List, NamedTuple, Optional

from records import Records
from scipy import stats

CONFIDENCE = 0.95


class Mean(NamedTuple):
    """Mean of values. The standard deviation and the half width of the interval are None for a single value."""

    count: int
    mean: float
    deviation: Optional[float]
    half_width: Optional[float]  # of the 95 % interval, from Student's t
    one_image: float = 0.0  # what one test image changes


def mean_of(values: Iterable[float]) -> Optional[Mean]:
    """Return the mean of values, None if there are none."""
    found = list(values)
    count = len(found)
    if not count:
        return None
    mean = sum(found) / count
    if count == 1:
        return Mean(1, mean, None, None)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / (count - 1))
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    return Mean(count, mean, deviation, float(quantile * deviation / math.sqrt(count)))


def test_accuracies(records: Records, network: str) -> Dict[int, float]:
    """Return the test accuracy of a network's finished runs, by seed."""
    return {
        record["seed"]: record["test_top1"]
        for record in records.values()
        if record["network"] == network and record["test_top1"] is not None
    }


def difference(records: Records, better: str, other: str) -> Optional[Mean]:
    """Return the mean of the differences in test accuracy, over the seeds that both networks have."""
    ours, theirs = test_accuracies(records, better), test_accuracies(records, other)
    found = mean_of(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))
    if found is None:
        return None
    images = min(r["test_images"] for r in records.values() if r["network"] == better and r["test_images"])
    return found._replace(one_image=100 / images)


def verdict(found: Optional[Mean], paper: Optional[float]) -> str:
    """Return what a difference says of the paper's, in a few words."""
    if found is None:
        return "not run yet"
    if found.half_width is None:
        return "one seed: no interval"
    sure = abs(found.mean) > max(found.half_width, found.one_image)  # seeds may agree to the image by chance
    if paper is None:
        return ("better" if found.mean > 0 else "worse") if sure else "undecided"
    agrees = found.mean * paper > 0
    if sure:
        return "agrees" if agrees else "**contradicts**"
    return f"undecided ({'same' if agrees else 'opposite'} sign)"


def rates(records: Records, network: str) -> List[float]:
    """Return the learning rates of a network's finished runs, without duplicates."""
    return sorted({record["lr"] for record in records.values() if record["network"] == network and record["seed"]})
