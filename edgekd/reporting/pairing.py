"""Two ways of training on the same seeds and the same samples: how far apart they are, and how sure that is.

Pure functions of arrays. Each seed gives one student of both ways (a pair: same start, same order of samples), and all
students answer the same samples, so a difference d has a row for each seed and a column for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["CONFIDENCE", "FEWEST_SEEDS", "Paired", "paired", "paired_means", "t_quantile"]

CONFIDENCE = 0.95
"""Of the two-sided intervals."""

FEWEST_SEEDS = 3
"""With one seed, what a seed does is not known; with two, Student's t is 12.7 and every interval says nothing."""


@dataclass(frozen=True)
class Paired:
    """One way less the other.

    Attributes:
        difference: Of the mean scores.
        low, high: Ends of its interval; None with too few seeds.
        standard_error: Of the difference; None as above.
        seeds: How many pairs.
    """

    difference: float
    low: float | None
    high: float | None
    standard_error: float | None
    seeds: int

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired(own: np.ndarray, other: np.ndarray) -> Paired:
    """The difference of two ways with an interval for new seeds *and* new samples.

    Seeds and samples are both drawn from more than were seen, and cross: the variance of the mean is that of the
    two-way random-effects layout with one value in a cell, its degrees of freedom Satterthwaite's (1946,
    doi:10.2307/3002019). A paired t-test over the seeds alone knows nothing of samples that were not drawn, and
    McNemar's over the samples of one seed nothing of other seeds (Dietterich 1998, doi:10.1162/089976698300017197);
    ``tests/test_pairing.py`` has how often each of them finds a difference where there is none.

    Args:
        own, other: Scores (right or wrong, or any number), (seeds, samples), the same seeds and samples in both.

    Raises:
        ValueError: The shapes differ, or there is nothing to compare.
    """
    if own.shape != other.shape or own.ndim != 2 or not own.size:
        raise ValueError(f"pairs are (seeds, samples) twice; there are {own.shape} and {other.shape}")
    apart = np.asarray(own, np.float64) - np.asarray(other, np.float64)
    seeds, samples = apart.shape
    mean = float(apart.mean())
    if seeds < FEWEST_SEEDS:
        return Paired(mean, None, None, None, seeds)
    if samples == 1:
        return paired_means(own[:, 0].tolist(), other[:, 0].tolist())
    by_seed, by_sample = apart.mean(axis=1), apart.mean(axis=0)
    rest = apart - by_seed[:, None] - by_sample[None, :] + mean
    freedom = (seeds - 1, samples - 1, (seeds - 1) * (samples - 1))
    squares = (samples * by_seed.var() * seeds, seeds * by_sample.var() * samples, float((rest**2).sum()))
    of_seeds, of_samples, of_rest = (float(s) / f for s, f in zip(squares, freedom, strict=True))
    # A part cannot vary less than the rest does: what seems so is chance, and counts as the rest.
    of_seeds, of_samples = max(of_seeds, of_rest), max(of_samples, of_rest)
    together = of_seeds + of_samples - of_rest
    if together <= 0:
        return Paired(mean, mean, mean, 0.0, seeds)
    parts = sum(m**2 / f for m, f in zip((of_seeds, of_samples, of_rest), freedom, strict=True))
    error = (together / apart.size) ** 0.5
    reach = t_quantile(together**2 / parts) * error
    return Paired(mean, mean - reach, mean + reach, error, seeds)


def paired_means(own: Sequence[float], other: Sequence[float]) -> Paired:
    """The difference with Student's paired t interval over the seeds: for new seeds on the same samples.

    Args:
        own, other: A mean score for each seed, in the same order.

    Raises:
        ValueError: The lengths differ, or there is nothing to compare.
    """
    if len(own) != len(other) or not own:
        raise ValueError(f"pairs are the same seeds twice; there are {len(own)} and {len(other)}")
    apart = np.asarray(own, np.float64) - np.asarray(other, np.float64)
    mean, seeds = float(apart.mean()), len(apart)
    if seeds < FEWEST_SEEDS:
        return Paired(mean, None, None, None, seeds)
    error = float(apart.std(ddof=1)) / seeds**0.5
    reach = t_quantile(seeds - 1) * error
    return Paired(mean, mean - reach, mean + reach, error, seeds)


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """How many standard errors a two-sided Student's t interval reaches to each side.

    With t = √ν · tan θ the density over the angle is proportional to cos^(ν − 1) θ, so the integral needs no library.

    Args:
        freedom: Degrees of freedom ν, at least 1; need not be whole.
    """
    freedom = min(freedom, 1e6)  # a normal distribution by then
    widest = np.pi / 2 * min(1.0, 40 / freedom**0.5)  # beyond it nothing is left of the density
    angle = np.linspace(0, widest, 200_001)
    density = np.cos(np.minimum(angle, np.pi / 2)) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(freedom**0.5 * np.tan(np.interp(confidence, below / below[-1], angle)))
