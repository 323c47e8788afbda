"""How good, how alike, how well calibrated: pure functions of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgekd.errors import DataError
from edgekd.types import JsonMixin

__all__ = [
    "ClassCount",
    "Quality",
    "accuracy",
    "agreement",
    "calibration_gap",
    "check_labels",
    "expected_calibration_error",
    "mean_kl",
    "quality",
    "softmax",
]


@dataclass(frozen=True)
class ClassCount(JsonMixin):
    """One class: how many samples, and how many of them were recognised."""

    support: int
    correct: int


@dataclass(frozen=True)
class Quality(JsonMixin):
    """A model on one split.

    Attributes:
        samples: How many; of windows, how many tokens count.
        accuracy: Share of right top classes.
        teacher_agreement: Share of samples with the teacher's top class.
        kl: Mean divergence from the teacher's distribution, in nats, at T = 1.
        ece: Expected calibration error, 15 bins.
        classes: Class by class, in the order of the labels; none of tokens.
        perplexity: Of tokens: exponential of the mean negative log-likelihood of the next one.
        window_losses: Of each window, the sum of those, nats: two models are compared window by window.
    """

    samples: int
    accuracy: float
    teacher_agreement: float
    kl: float
    ece: float
    classes: tuple[ClassCount, ...]
    perplexity: float | None = None
    window_losses: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """What choices are made by, the larger the better: accuracy, or how likely the next tokens are."""
        return self.accuracy if self.perplexity is None else -math.log(self.perplexity)

    @property
    def share(self) -> float:
        """Of right answers, 0 to 1."""
        return self.accuracy

    def words(self) -> str:
        """For people, in a line."""
        perplexity = "" if self.perplexity is None else f"perplexity {self.perplexity:.1f}  "
        return f"{self.accuracy:.2%}  {perplexity}agrees with the teacher {self.teacher_agreement:.2%}"


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Refuse labels that no answer can match: they make every file equally wrong, and nothing is ever lost.

    Args:
        labels: Right classes, (samples,): whole numbers from 0, of any numeric type.
        classes: How many the model has.
        where: What errors call the labels.

    Raises:
        DataError: They are something else, or there is no such class; the message has the range that was found.
    """
    needed = f"one class per sample, a whole number from 0 to {classes - 1}, is needed"
    if labels.ndim != 1:
        raise DataError(f"{where}: shape {labels.shape} was found; {needed}")
    if labels.dtype.kind not in "iubf":
        raise DataError(f"{where}: dtype {labels.dtype} was found; {needed}")
    low, high = float(labels.min()), float(labels.max())
    if not (labels == np.trunc(labels)).all():  # NaN equals nothing
        raise DataError(f"{where}: {low:g} to {high:g} was found, not all of it whole; {needed}")
    if low < 0 or high >= classes:
        raise DataError(f"{where}: {low:g} to {high:g} was found; the model has {classes} classes: {needed}")


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples whose largest logit is the label's; logits (samples, classes), labels (samples,)."""
    return float((logits.argmax(axis=1) == labels).mean())


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of samples with the same top class; both (samples, classes)."""
    return float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean())


def mean_kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean KL(teacher ‖ student) of the softmaxed logits, in nats; both (samples, classes). Zero when equal."""
    p, q = softmax(teacher), softmax(student)
    tiny = np.finfo(np.float64).tiny
    return float((p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(axis=1).mean())


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, arXiv:1706.04599), 0 to 1."""
    probabilities = softmax(logits)
    return calibration_gap(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels, bins)


def calibration_gap(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """See :func:`expected_calibration_error`; both (samples,)."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(right[index == b].mean() - confidence[index == b].mean()) * (index == b).mean()
        for b in range(bins)
        if (index == b).any()
    ]
    return float(sum(gaps))


def quality(logits: np.ndarray, labels: np.ndarray, teacher: np.ndarray) -> Quality:
    """Everything at once; logits and teacher (samples, classes), labels (samples,)."""
    right = logits.argmax(axis=1) == labels
    classes = tuple(ClassCount(int((labels == c).sum()), int(right[labels == c].sum())) for c in range(logits.shape[1]))
    return Quality(
        samples=len(labels),
        accuracy=accuracy(logits, labels),
        teacher_agreement=agreement(logits, teacher),
        kl=mean_kl(teacher, logits),
        ece=expected_calibration_error(logits, labels),
        classes=classes,
    )
