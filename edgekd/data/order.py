"""In which order a training sees samples and views: a function of the seed alone, so it can go on from any step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

__all__ = ["Order"]


@dataclass(frozen=True)
class Order:
    """An endless row of draws, (sample, view) each.

    It goes in rounds: a round shuffles the samples and takes ``per_decode`` views of each in turn, side by side, so
    that one decoding of a file serves them all (FKD, Shen & Xing 2021, arXiv:2112.01528). In ``views`` draws of each
    sample, every one of its views comes once.

    Attributes:
        pool: Positions of the samples that are drawn, (samples,).
        ids: Theirs, uint64: at which view a sample begins depends on its id.
        views: That were captured of each.
        per_decode: How many of them come side by side.
        seed: Of the shuffling.
    """

    pool: np.ndarray
    ids: np.ndarray
    views: int
    per_decode: int
    seed: int

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and views of the draws from ``first`` up to ``last``, int64 each."""
        size = len(self.pool) * self.per_decode
        rounds, places = np.divmod(np.arange(first, last), size)
        chosen, turn = np.divmod(places, self.per_decode)
        within = np.concatenate([self._shuffled(int(r))[chosen[rounds == r]] for r in np.unique(rounds)])
        passes = rounds * self.per_decode + turn
        begin = (self.ids[within] % np.uint64(self.views)).astype(np.int64)
        return self.pool[within], (passes + begin) % self.views

    def _shuffled(self, number: int) -> np.ndarray:
        return _permutation(self.seed & 0xFFFFFFFF, number, len(self.pool))


@lru_cache(maxsize=4)
def _permutation(seed: int, number: int, samples: int) -> np.ndarray:
    """Kept for the steps of a round: shuffling a million takes longer than a step of a small student."""
    return np.random.default_rng((seed, number)).permutation(samples)
