"""Records of windows: of fixed size, in each a part for each position (zeros where none counts):

=============  ===============================================================================================
part           bytes
=============  ===============================================================================================
teacher        what :mod:`edgekd.teachers.targets` makes of one view's logits: 36 for ``sampled50``, 212 for ``top50``
log of label   2, f16: log-probability of the next token itself, which makes the teacher's perplexity
=============  ===============================================================================================
"""

from __future__ import annotations

import numpy as np

from edgekd.data.windows import counted_positions
from edgekd.errors import DataError
from edgekd.recipes.recipe import DENSE_CLASSES
from edgekd.teachers.targets import PLAIN_CODEC, Codec

__all__ = ["encode_windows", "plain_codec", "window_type"]


def plain_codec(classes: int, positions: int) -> str:
    """For samples that are only judged: dense, and of windows the 50 largest where all of them would be too many.

    With these, agreement is exact, and a divergence is over the 50 largest and the rest.
    """
    return "top50" if positions and classes > DENSE_CLASSES else PLAIN_CODEC


def window_type(codec: Codec, classes: int, positions: int) -> np.dtype[np.void]:
    """Of one window's part of a record."""
    return np.dtype((_fields(codec, classes), (positions,)))


def _fields(codec: Codec, classes: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Of one position."""
    return [*codec.fields(classes), ("label", "<f2", ())]


def encode_windows(seeds: np.ndarray, logits: np.ndarray, labels: np.ndarray, codec: Codec) -> np.ndarray:
    """What a cache keeps of the teacher's outputs.

    Args:
        seeds: Of the windows, uint32 (windows,).
        logits: float32 (windows, positions, vocabulary).
        labels: Next tokens, int64 (windows, positions); -1 where a position does not count.

    Returns:
        Parts of the records, (windows, positions).

    Raises:
        DataError: The teacher looks at another number of positions than the labels have.
    """
    if logits.shape[:2] != labels.shape:
        raise DataError(
            f"the teacher gives {logits.shape} for windows of {labels.shape[1]} positions; "
            f"({len(labels)}, {labels.shape[1]}, vocabulary) is needed"
        )
    vocabulary = logits.shape[2]
    if labels.max() >= vocabulary:
        raise DataError(f"the data has the token {labels.max()}, the teacher's vocabulary only {vocabulary:,} tokens")
    counted = counted_positions(labels)
    fields = _fields(codec, vocabulary)
    found = np.zeros(int(counted.sum()), np.dtype([("seed", "<u8"), *fields]))
    found["seed"] = (seeds.astype(np.uint64)[:, None] << np.uint64(32) | np.arange(labels.shape[1], dtype=np.uint64))[
        counted
    ]
    shown = logits[counted]
    shown -= shown.max(axis=1, keepdims=True)
    codec.encode(shown, found)
    log_sum = np.log(np.exp(shown).sum(axis=1, dtype=np.float64))
    found["label"] = shown[np.arange(len(shown)), labels[counted]] - log_sum
    parts = np.zeros(labels.shape, np.dtype(fields))
    for name in parts.dtype.names or ():
        parts[name][counted] = found[name]
    return parts
