"""Records of a teacher cache: one for each view of each sample, all of one size.

A record is the view's seed (u32), the position of the sample that was mixed in (u32, where samples are mixed), and what
:mod:`edgekd.teachers.targets` makes of the logits less their largest (shifting changes no softmax); that of a window
of tokens has such a part for each of its positions (:mod:`edgekd.teachers.window_records`). Features stand behind it.
"""

from __future__ import annotations

import numpy as np

from edgekd.data.windows import counted_positions
from edgekd.errors import DataError, NumericalError
from edgekd.teachers.feature_records import Layout, feature_fields
from edgekd.teachers.targets import Codec, shown
from edgekd.teachers.window_records import encode_windows, window_type

__all__ = ["make_records", "record_bytes", "record_type"]


def record_bytes(
    codec: Codec, classes: int, positions: int = 0, mixed: bool = False, features: Layout | None = None
) -> int:
    """Of one view on disk, with its seed, its partner where samples are mixed, and what is kept beside the logits."""
    return record_type(codec, classes, positions, mixed, features or {}).itemsize


def record_type(codec: Codec, classes: int, positions: int, mixed: bool, features: Layout) -> np.dtype[np.void]:
    """Its fields, as they lie on the disk."""
    head = [("seed", "<u4"), *([("partner", "<u4")] if mixed else [])]
    beside = feature_fields(features)
    if positions:
        return np.dtype([*head, ("positions", window_type(codec, classes, positions)), *beside])
    return np.dtype([*head, *codec.fields(classes), *beside])


def make_records(
    seeds: np.ndarray,
    partners: np.ndarray | None,
    logits: np.ndarray,
    labels: np.ndarray | None,
    ids: np.ndarray,
    codec: Codec,
    features: Layout,
) -> np.ndarray:
    """Records of some views, their features still to be put.

    Args:
        seeds, partners: Of the views, (records,); partners None without mixing.
        logits: (records, classes), or (records, positions, vocabulary) of windows.
        labels: Those of windows, (records, positions); None where a sample has one label.
        ids: Of the samples, for messages.
        features: The layout of what will be put.

    Raises:
        DataError: Logits and labels are not of the same kind.
        NumericalError: The logits have NaN or infinity where they count.
    """
    if logits.ndim != (2 if labels is None else 3):
        wanted = "(samples, classes)" if labels is None else "(windows, positions, vocabulary)"
        raise DataError(f"the teacher gives {logits.shape}, and the labels are those of {wanted}")
    finite = np.isfinite(logits).all(axis=-1)
    if labels is not None:
        finite = (finite | ~counted_positions(labels)).all(axis=1)
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise NumericalError(f"the teacher gives NaN or infinity for {len(bad)} samples, first id {ids[bad[0]]}")
    positions = 0 if labels is None else labels.shape[1]
    records = np.zeros(len(seeds), record_type(codec, logits.shape[-1], positions, partners is not None, features))
    records["seed"] = seeds
    if partners is not None:
        records["partner"] = partners
    if labels is None:
        codec.encode(shown(logits, codec), records)
    else:
        records["positions"] = encode_windows(seeds, logits, labels, codec)
    return records
