"""Windows: samples of many positions, each with a label of its own, as a causal language model has them.

The label of a position is its next token, and -1 where none counts: in the padding and in the prompt. Losses and
metrics see the counted positions alone, as (tokens, vocabulary).
"""

from __future__ import annotations

import numpy as np

__all__ = ["counted_positions", "positions_of"]


def positions_of(labels: np.ndarray | None) -> int:
    """Positions of each sample; 0 where a sample has one label, or none."""
    return labels.shape[1] if labels is not None and labels.ndim == 2 else 0


def counted_positions(labels: np.ndarray) -> np.ndarray:
    """Which positions count, bool, in the shape of the labels."""
    counted: np.ndarray = labels >= 0
    return counted
