"""Features in the records of a teacher cache: dense, f16; whole numbers as i4. Their layout is in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import DataError, NumericalError

__all__ = ["Layout", "describe_features", "feature_fields", "layout_of", "put_features", "read_features"]

Layout: TypeAlias = Mapping[str, tuple[str, Sequence[int]]]
"""Dtype and shape of each feature by name, without the batch; as JSON in the manifest."""

_PREFIX = "feature "


def feature_fields(layout: Layout) -> list[tuple[str, str, tuple[int, ...]]]:
    """Of a record, as NumPy writes them."""
    return [(_PREFIX + name, dtype, tuple(shape)) for name, (dtype, shape) in layout.items()]


def layout_of(features: Mapping[str, np.ndarray]) -> dict[str, tuple[str, list[int]]]:
    """Of features of a batch."""
    return {
        name: ("<f2" if feature.dtype.kind == "f" else "<i4", list(feature.shape[1:]))
        for name, feature in features.items()
    }


def put_features(records: np.ndarray, features: Mapping[str, np.ndarray]) -> None:
    """Fill the fields of a batch.

    Raises:
        NumericalError: A feature has NaN, infinity, or numbers too large for f16.
        DataError: A feature has another shape than in the batches before.
    """
    for name, feature in features.items():
        if not np.isfinite(feature).all():
            raise NumericalError(f"the teacher gives NaN or infinity in feature {name!r}")
        if feature.dtype.kind == "f" and (largest := float(np.abs(feature).max(initial=0))) > float(
            np.finfo(np.float16).max
        ):
            raise NumericalError(f"feature {name!r} reaches {largest:.3g}; what is kept of it ends at 65504 (f16)")
        field = records[_PREFIX + name]
        if field.shape != feature.shape:
            raise DataError(f"feature {name!r} is {feature.shape[1:]} here and was {field.shape[1:]} before")
        field[...] = feature


def describe_features(records: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean and largest value of some features of some records."""
    values = {name: records[_PREFIX + name].astype(np.float64) for name in names}
    return {name: {"mean": float(value.mean()), "largest": float(value.max())} for name, value in values.items()}


def read_features(records: np.ndarray, layout: Layout) -> dict[str, Tensor]:
    """Of some records, float32, batch first."""
    return {name: torch.from_numpy(records[_PREFIX + name].astype(np.float32)) for name in layout}
