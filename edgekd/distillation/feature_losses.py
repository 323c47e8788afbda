"""Losses between features: hidden states, activations, embeddings. Pure functions ``(student, teacher) -> scalar``.

Both are as wide as each other: a projector is trained where they were not (:mod:`edgekd.distillation.features`). A
vector of the teacher that is zero throughout is padding and does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEATURE_LOSSES", "FeatureLoss", "feature_cosine", "feature_mse"]

FeatureLoss = Callable[[Tensor, Tensor], Tensor]
"""(student, teacher), both (batch, …, width), to a scalar: the batch's mean."""


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference: of hints (FitNets, Romero et al. 2014, arXiv:1412.6550) and of embeddings (Reimers &
    Gurevych 2020, arXiv:2004.09813).

    The mean is over the width as well (FitNets halves the sum), so that a weight means the same at any width.

    Args:
        student: (batch, width) or (batch, positions, width).
        teacher: The same shape; no gradient flows into it.

    Returns:
        Mean over all vectors that count, shape (); zero when both agree.

    Raises:
        ValueError: The shapes differ.
    """
    return _mean((student - _checked(student, teacher)).square().mean(dim=-1), teacher)


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of the angle between vectors (DistilBERT, Sanh et al. 2019, arXiv:1910.01108): lengths do not matter.

    Arguments and errors as of :func:`feature_mse`.

    Returns:
        Mean over all vectors that count, 0 (same direction) to 2, shape ().
    """
    return _mean(1 - F.cosine_similarity(student, _checked(student, teacher), dim=-1), teacher)


FEATURE_LOSSES: Mapping[str, FeatureLoss] = MappingProxyType({"mse": feature_mse, "cosine": feature_cosine})
"""By the name that a recipe uses in ``distill.features.<name>.loss``."""


def _checked(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape")
    return teacher.detach()


def _mean(values: Tensor, teacher: Tensor) -> Tensor:
    """Over the vectors that count."""
    counted = teacher.detach().ne(0).any(dim=-1).to(values.dtype)
    return (values * counted).sum() / counted.sum().clamp(min=1)
