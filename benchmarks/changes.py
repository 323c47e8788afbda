"""Where a series of releases changed its level: what is too small for any one comparison, but stays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekd import plugins
from edgekd.errors import MissingToolchainError

__all__ = ["Change", "changes"]

FEWEST = 4  # values on each side of a change
PENALTY = 5.0
"""Of one change more, in units of the noise's variance times the logarithm of the length: so chosen that with normal
noise at most one in twenty series without a change has one (tests/test_history.py); heavier tails: docs/gate.md."""


@dataclass(frozen=True)
class Change:
    """A level that changed and stayed so.

    Attributes:
        index: Of the first value of the new level.
        before, after: Medians of the two levels.
    """

    index: int
    before: float
    after: float

    @property
    def share(self) -> float:
        """By how much, as a share of what was before."""
        return self.after / self.before - 1


def changes(values: Sequence[float]) -> list[Change]:
    """Changes of level, in order: PELT on the logarithms (Killick et al. 2012, arXiv:1101.1438), by ``ruptures``.

    The noise is taken from the differences of neighbours, which a few changes of level hardly touch.

    Args:
        values: Above zero, in the order of the releases.

    Returns:
        None where there are fewer than 8 values.

    Raises:
        MissingToolchainError: ``ruptures`` is not installed.
    """
    if len(values) < 2 * FEWEST:
        return []
    if plugins.missing(("ruptures",)):
        raise MissingToolchainError("changes of level", "ruptures", "history")
    import ruptures

    logs = np.log(np.asarray(values, float))
    steps = np.diff(logs)
    noise = 1.4826 * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2)
    noise = max(noise, 1e-4)  # values that are all alike: a change below a tenth of a per mille is none
    found = ruptures.Pelt(model="l2", min_size=FEWEST, jump=1).fit(logs / noise).predict(PENALTY * math.log(len(logs)))
    bounds = [0, *found]
    levels = [float(np.median(values[a:b])) for a, b in itertools.pairwise(bounds)]
    return [Change(index, a, b) for index, a, b in zip(found[:-1], levels, levels[1:], strict=False)]
