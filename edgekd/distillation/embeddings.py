"""Embeddings instead of classes: a teacher whose output is a vector, the student that learns it, and how near it comes.

Vectors are compared by their angle: an embedding is asked which samples are alike, and the nearest ones answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.data.truth import NO_LABEL, Truth
from edgekd.distillation.feature_losses import FeatureLoss
from edgekd.distillation.losses import LABELS
from edgekd.errors import DataError
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.targets import VectorTargets
from edgekd.types import JsonMixin

__all__ = [
    "EMBEDDING",
    "NEIGHBOURS",
    "EmbeddingStudent",
    "Likeness",
    "check_embedding",
    "embedding_objective",
    "likeness",
    "nearest",
    "own_likeness",
    "with_head",
]

EMBEDDING = "embedding"
"""Name of the output, and what it means."""

NEIGHBOURS = 10
"""So many of the nearest are compared."""

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Likeness(JsonMixin):
    """An embedding on one split, beside the teacher's.

    Attributes:
        samples: How many.
        cosine: Mean cosine of the angle between its vector and the teacher's; a control has no reason to be near.
        neighbours: Of the teacher's ten nearest of each sample among the others, the share that is among its own ten.
        same_label: Share of labelled samples whose nearest other labelled one has their label; None without labels.
    """

    samples: int
    cosine: float
    neighbours: float
    same_label: float | None = None

    @property
    def score(self) -> float:
        """What choices are made by, the larger the better."""
        return self.neighbours

    @property
    def share(self) -> float:
        """Of the teacher's neighbours, 0 to 1."""
        return self.neighbours

    def words(self) -> str:
        """For people, in a line."""
        return f"{self.neighbours:.2%} of the teacher's neighbours  cosine {self.cosine:.3f}"


def likeness(vectors: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> Likeness:
    """Everything at once.

    Args:
        vectors, teacher: (samples, width), of the same width; more than one sample.
        labels: int64, (samples,); ``NO_LABEL`` for none.
    """
    own, wanted = _directions(vectors), _directions(teacher)
    count = min(NEIGHBOURS, len(own) - 1)
    shared = [
        len(np.intersect1d(mine, theirs, assume_unique=True))
        for mine, theirs in zip(nearest(own, count), nearest(wanted, count), strict=True)
    ]
    return Likeness(
        samples=len(own),
        cosine=float((own * wanted).sum(axis=1).mean(dtype=np.float64)),
        neighbours=float(np.mean(shared)) / count,
        same_label=_same_label(own, labels),
    )


def own_likeness(teacher: np.ndarray, labels: np.ndarray) -> Likeness:
    """Of the teacher itself."""
    return Likeness(len(teacher), 1.0, 1.0, _same_label(_directions(teacher), labels))


def nearest(vectors: np.ndarray, count: int) -> np.ndarray:
    """Positions of the nearest others by their angle, the nearest first; int64 (samples, count)."""
    directions = _directions(vectors)
    found = []
    for start in range(0, len(directions), _ROWS_AT_ONCE):
        alike = directions[start : start + _ROWS_AT_ONCE] @ directions.T
        rows = np.arange(len(alike))
        alike[rows, start + rows] = -np.inf  # a sample is no neighbour of itself
        best = np.argpartition(-alike, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(alike, best, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(best, order, axis=1))
    return np.concatenate(found)


def _directions(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    made: np.ndarray = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return made


def _same_label(directions: np.ndarray, labels: np.ndarray) -> float | None:
    known = labels != NO_LABEL
    if known.sum() < 2:
        return None
    some = labels[known]
    return float((some[nearest(directions[known], 1)[:, 0]] == some).mean())


class EmbeddingStudent(nn.Module):
    """A student in training: its output is the embedding, and a head that is left behind makes classes of it.

    Attributes:
        student: As it was.
        head: Linear, for what the labels say; None where they say nothing.
    """

    def __init__(self, student: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.student, self.head = student, head

    def forward(self, *inputs: Tensor) -> StudentOutputs:
        embedding: Tensor = self.student(*inputs)
        logits = embedding if self.head is None else self.head(embedding)
        return StudentOutputs(logits, {EMBEDDING: embedding})


def with_head(student: nn.Module, width: int, classes: int, seed: int) -> EmbeddingStudent:
    """A student with what its training needs.

    Args:
        width: Of its embedding.
        classes: That a head tells apart; 0 for no head.
        seed: Of the head's start.
    """
    if classes == 0:
        return EmbeddingStudent(student, None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EmbeddingStudent(student, nn.Linear(width, classes))


def embedding_objective(
    losses: Mapping[str, tuple[float, FeatureLoss]], label_weight: float
) -> Callable[[StudentOutputs, TeacherOutputs, Truth], dict[str, Tensor]]:
    """What an arm minimises: label_weight · cross-entropy of the head + (1 − label_weight) · Σ weight · loss.

    Args:
        losses: By name, with their weights; none for the control.
        label_weight: 0 where there are no labels.
    """

    def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
        parts = {LABELS: label_weight * truth.cross_entropy(student.logits)} if label_weight else {}
        assert isinstance(teacher.classes, VectorTargets)
        for name, (weight, loss) in losses.items():
            parts[name] = (1 - label_weight) * weight * loss(student.features[EMBEDDING], teacher.classes.vectors)
        return parts

    return objective


def check_embedding(output: object, width: int) -> None:
    """Whether student and teacher give vectors of one space.

    Raises:
        DataError: They do not; the message has the numbers.
    """
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] != width:
        raise DataError(f"the student returns {found}; the teacher's embedding is (batch, {width}), and so must its be")
