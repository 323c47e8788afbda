"""Features of a student in training: listened to, pooled as the teacher's were, projected to the teacher's width.

A projector is a linear map over the width, which is what a 1×1 convolution is over channels. It is trained along, lies
in the checkpoint, and is left behind with this wrapper: what is exported is the student that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillation.embeddings import EmbeddingStudent
from edgekd.errors import DataError
from edgekd.recipes.recipe_models import Feature
from edgekd.teachers.outputs import StudentOutputs
from edgekd.teachers.pooling import MASK, pooled
from edgekd.teachers.taps import tapped

__all__ = ["FeatureStudent", "bare_student", "with_features"]


@dataclass(frozen=True)
class _Tap:
    """What is listened to, and as what."""

    name: str
    spec: Feature


class FeatureStudent(nn.Module):
    """A student that returns :class:`StudentOutputs` with features; see :func:`with_features`.

    Attributes:
        student: As it was.
    """

    def __init__(
        self, student: nn.Module, taps: Sequence[_Tap], projectors: Sequence[nn.Module], mask: int | None
    ) -> None:
        super().__init__()
        self.student, self.projectors = student, nn.ModuleList(projectors)
        self._taps, self._mask = tuple(taps), mask

    def forward(self, *inputs: Tensor) -> StudentOutputs:
        mask = None if self._mask is None else inputs[self._mask]
        with tapped(self.student, [tap.spec.student for tap in self._taps], "the student") as seen:
            logits: Any = self.student(*inputs)
            features = {
                tap.name: projector(pooled(seen(tap.spec.student), tap.spec, mask))
                for tap, projector in zip(self._taps, self.projectors, strict=True)
            }
        return StudentOutputs(logits, features)


def with_features(
    student: nn.Module,
    features: Mapping[str, Feature],
    shapes: Mapping[str, Sequence[int]],
    inputs: Mapping[str, Tensor],
    seed: int,
) -> nn.Module:
    """A student with what an arm's features need; the student itself when there are none.

    Args:
        features: Of the arm, by name.
        shapes: Of the teacher's features, by their name in the cache, without the batch.
        inputs: An example, by name in the order of ``forward``.
        seed: Of the projectors' start.

    Raises:
        UsageError: The student has no module of a feature's name.
        DataError: Student and teacher have a feature at different positions.
    """
    if not features:
        return student
    taps = [_Tap(name, spec) for name, spec in features.items()]
    mask = list(inputs).index(MASK) if MASK in inputs else None
    bare = FeatureStudent(student, taps, [nn.Identity() for _ in taps], mask)
    was_training = student.training
    with torch.no_grad():
        found = bare.eval()(*inputs.values()).features
    student.train(was_training)
    projectors = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for tap in taps:
            projectors.append(_projector(tap, tuple(found[tap.name].shape[1:]), tuple(shapes[tap.spec.stored])))
    return FeatureStudent(student, taps, projectors, mask)


def bare_student(module: nn.Module) -> nn.Module:
    """The student alone, without what only its training needs."""
    return module.student if isinstance(module, FeatureStudent | EmbeddingStudent) else module


def _projector(tap: _Tap, own: tuple[int, ...], wanted: tuple[int, ...]) -> nn.Module:
    if own[:-1] != wanted[:-1]:
        raise DataError(
            f"feature {tap.name!r}: the student's {tap.spec.student!r} is {own} and the teacher's "
            f'{tap.spec.teacher!r} {wanted} (positions, width); pool = "mean" compares them without positions'
        )
    return nn.Identity() if own == wanted else nn.Linear(own[-1], wanted[-1])
