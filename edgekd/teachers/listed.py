"""Windows of tokens as an endpoint knows them: at each position the log-probabilities of a few tokens, at T = 1.

The mass of all other tokens is known as a whole, and spread evenly over them here, so that a softmax at T = 1 gives
back every number that was listed. The codec ``listed<k>`` keeps these and the mass alone; what the spread would mean at
another temperature is never asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgekd.errors import DataError

__all__ = ["spread_rest", "window_logits"]

SMALLEST = 1e-9
"""Mass that is left for what is not listed, where rounding says none."""


def window_logits(listed: Sequence[Mapping[int, float]], positions: int, vocabulary: int) -> tuple[np.ndarray, float]:
    """One window.

    Args:
        listed: Log-probabilities of the next token by its id, for each position that is no padding.
        positions: Of the window; those behind are zeros.

    Returns:
        Log-probabilities, float32 (positions, vocabulary), and the mean mass outside what is listed.

    Raises:
        DataError: A token is not in the vocabulary.
    """
    made, left = np.zeros((positions, vocabulary), np.float32), []
    for position, some in enumerate(listed):
        made[position], rest = spread_rest(some, vocabulary)
        left.append(rest)
    return made, float(np.mean(left))


def spread_rest(listed: Mapping[int, float], vocabulary: int) -> tuple[np.ndarray, float]:
    """One position: float32 (vocabulary,), and the mass outside what is listed."""
    ids = np.fromiter(listed, np.int64, len(listed))
    if ids.max(initial=0) >= vocabulary:
        raise DataError(f"the endpoint lists token {ids.max()}, and the vocabulary has {vocabulary:,}; say vocabulary")
    values = np.fromiter(listed.values(), np.float64, len(listed))
    rest = max(SMALLEST, 1 - float(np.exp(values).sum()))
    made = np.full(vocabulary, np.log(rest / max(1, vocabulary - len(ids))), np.float32)
    made[ids] = values
    return made, rest
