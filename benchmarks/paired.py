"""What the new file loses on the same samples: top classes by McNemar's pairs, other outputs by a paired bootstrap.

Pure functions of arrays. A drop is a share: 0.01 is one point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from edgekd.types import JsonMixin

__all__ = ["Drop", "cosines", "mean_drop", "share_drop"]

RESAMPLES = 4000


@dataclass(frozen=True)
class Drop(JsonMixin):
    """How much lower the new file scores.

    Attributes:
        old, new: Scores, means over the samples.
        estimate: old - new; above zero is worse.
        low, high: Of the interval.
        confidence: Of it, two-sided.
        samples: How many.
        lost, gained: Samples that only the old, or only the new file has right; None where a score is no yes or no.
        p_worse: How likely such a drop is when the true one is not above the margin: one-sided.
    """

    old: float
    new: float
    estimate: float
    low: float
    high: float
    confidence: float
    samples: int
    p_worse: float
    lost: int | None = None
    gained: int | None = None


def share_drop(old: np.ndarray, new: np.ndarray, margin: float, confidence: float) -> Drop:
    """Of right answers: the score interval for a difference of paired shares.

    Tango, Statistics in Medicine 17 (1998) 891-908: at a difference of zero its statistic is McNemar's, and it keeps
    its level where no sample, or hardly any, tells the files apart.

    Args:
        old, new: Whether each answer is right, (samples,), bool.

    Raises:
        ValueError: The lengths differ, or there is no sample.
    """
    if old.shape != new.shape or old.ndim != 1 or not len(old):
        raise ValueError(f"a drop needs the same samples twice; there are {old.shape} and {new.shape}")
    count, lost, gained = len(old), int(np.sum(old & ~new)), int(np.sum(~old & new))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    estimate = (lost - gained) / count

    def score(drop: float) -> float:
        return _tango(lost, gained, count, drop)

    low = _root(lambda drop: score(drop) - z, -1.0, estimate)
    high = _root(lambda drop: score(drop) + z, estimate, 1.0)
    p_worse = 1 - NormalDist().cdf(score(margin))
    return Drop(
        float(old.mean()), float(new.mean()), estimate, low, high, confidence, count, p_worse, lost, gained
    )  # fmt: skip


def _tango(lost: int, gained: int, count: int, drop: float) -> float:
    """The score statistic for a true drop; it falls as ``drop`` rises."""
    a = 2 * count
    b = -lost - gained + (2 * count - lost + gained) * drop
    c = -gained * drop * (1 - drop)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)  # of samples that only the new file has right
    variance = count * (2 * share + drop * (1 - drop))
    distance = lost - gained - count * drop
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero between two places, to 1e-9; an end where it does not."""
    for _ in range(64):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_drop(old: np.ndarray, new: np.ndarray, margin: float, confidence: float, seed: int) -> Drop:
    """Of a mean score: percentile bootstrap over the samples, the same samples for both files.

    Args:
        old, new: A score for each sample, (samples,).

    Raises:
        ValueError: The lengths differ, or there is no sample.
    """
    if old.shape != new.shape or old.ndim != 1 or not len(old):
        raise ValueError(f"a drop needs the same samples twice; there are {old.shape} and {new.shape}")
    drops = np.asarray(old, np.float64) - np.asarray(new, np.float64)
    random = np.random.default_rng(seed)
    means = np.array([drops[random.integers(0, len(drops), len(drops))].mean() for _ in range(RESAMPLES)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    # Never zero: so many resamples say nothing finer (Davison and Hinkley 1997, 4.2).
    p_worse = (1 + int(np.sum(means <= margin))) / (RESAMPLES + 1)
    return Drop(
        float(np.mean(old)), float(np.mean(new)), float(drops.mean()), float(low), float(high), confidence, len(drops),
        p_worse,
    )  # fmt: skip


def cosines(outputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Cosine of each sample's output with what is wanted, (samples,), in float64; 0 where one is zero or not finite.

    Raises:
        ValueError: The shapes differ.
    """
    if outputs.shape != wanted.shape:
        raise ValueError(f"outputs of {outputs.shape} cannot be compared with {wanted.shape}")
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (outputs, wanted))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.where(np.isfinite(found), found, 0.0)
