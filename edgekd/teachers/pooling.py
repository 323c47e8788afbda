"""Features pooled: the form in which those of student and teacher are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.recipes.recipe_models import Feature

__all__ = ["MASK", "pooled"]

MASK = "attention_mask"
"""The input that says which positions are padding."""


def pooled(feature: Tensor, spec: Feature, mask: Tensor | None = None) -> Tensor:
    """A feature in the form in which student and teacher are compared.

    Args:
        feature: As a module returned it, batch first.
        mask: Nonzero where a position counts, (batch, positions); used where the feature has these positions.

    Returns:
        (batch, width), or (batch, positions, width) where nothing is pooled.
    """
    if spec.pool == "flat" or feature.ndim < 2:
        return feature.flatten(1) if feature.ndim > 1 else feature[:, None]
    first = (spec.channels or ("first" if feature.ndim == 4 else "last")) == "first"
    vectors = feature.movedim(1, -1) if first else feature
    if vectors.ndim == 2:
        return vectors
    vectors = vectors.flatten(1, -2)
    if spec.pool == "first":
        return vectors[:, 0]
    weights = torch.ones_like(vectors[..., :1])
    if mask is not None and mask.shape == vectors.shape[:2]:
        weights = mask.ne(0).to(vectors.dtype)[..., None]
    if spec.pool == "mean":
        return (vectors * weights).sum(1) / weights.sum(1).clamp(min=1)
    return vectors * weights
