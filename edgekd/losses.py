"""Distillation losses: student against teacher. One normalisation for all: the batch's mean, with an explicit T².

Each is a pure function ``(student, teacher, temperature) -> scalar`` (``edgekd.protocols.Loss``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from edgekd.protocols import Loss

__all__ = ["LOSSES", "dist", "mixed", "soft_target_kl"]


def soft_target_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence of the student's softened classes from the teacher's (Hinton et al. 2015, arXiv:1503.02531), in nats.

    Args:
        student: Logits, (batch, classes).
        teacher: Logits, the same shape; no gradient flows into it.
        temperature: Above 0. The result is scaled by its square, so a weight need not change with it.

    Returns:
        Mean over the batch, shape (). Zero when both agree.

    Raises:
        ValueError: The shapes differ, or the temperature is not above 0.
    """
    _check(student, teacher, temperature)
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Relations instead of values (DIST, Huang et al. 2022, arXiv:2205.10536): 1 − Pearson, inter- plus intra-class.

    Inter-class compares each sample's distribution over classes; intra-class compares each class's column over the
    batch. Beta and gamma are 1, as in the paper.

    Args:
        student: Logits, (batch, classes), at least two of each.
        teacher: Logits, the same shape; no gradient flows into it.
        temperature: Above 0; softens both before the comparison. The result is scaled by its square.

    Returns:
        Between 0 (perfectly correlated) and 4 T², shape ().

    Raises:
        ValueError: The shapes differ, or the temperature is not above 0.
    """
    _check(student, teacher, temperature)
    p = F.softmax(student / temperature, dim=1)
    q = F.softmax(teacher.detach() / temperature, dim=1)
    inter = 1 - _pearson(p, q).mean()
    intra = 1 - _pearson(p.t(), q.t()).mean()
    return (inter + intra) * temperature**2


def mixed(
    student: Tensor, teacher: Tensor, labels: Tensor, loss: Loss, temperature: float, label_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Ground truth and teacher together: label_weight · cross-entropy + (1 − label_weight) · loss.

    Args:
        labels: Classes, int64 (batch,).
        label_weight: 0 (teacher only) to 1 (labels only).

    Returns:
        The scalar to minimise, and its weighted parts for the log.
    """
    hard = label_weight * F.cross_entropy(student, labels)
    soft = (1 - label_weight) * loss(student, teacher, temperature)
    return hard + soft, {"labels": float(hard.detach()), "teacher": float(soft.detach())}


def _pearson(a: Tensor, b: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Correlation row by row; rows without variance correlate with nothing."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=epsilon)


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be (batch, classes)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")


LOSSES: Mapping[str, Loss] = MappingProxyType({"kd": soft_target_kl, "dist": dist})
"""By the name that a recipe uses in ``distill.arms``."""
