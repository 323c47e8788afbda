"""Distillation losses: student against teacher. One normalisation for all: the batch's mean, with an explicit T².

Each is a pure function ``(student, teacher, labels, temperature) -> scalar`` (``edgekd.protocols.Loss``); ``weighted``
mixes any number of them with the ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.data.truth import NO_LABEL, Truth
from edgekd.protocols import Loss
from edgekd.teachers.targets import Targets

__all__ = [
    "LABELS",
    "LOSSES",
    "Term",
    "decoupled",
    "dist",
    "gradient_shares",
    "hard_label",
    "jensen_shannon",
    "non_target_kl",
    "reverse_kl",
    "soft_target_kl",
    "standardized",
    "target_kl",
    "weighted",
]

LABELS = "labels"
"""Name of the ground truth among the parts of a mix."""


def soft_target_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of the softened classes (Hinton et al. 2015, arXiv:1503.02531), in nats.

    Args:
        student: Logits, (batch, classes).
        teacher: Logits, the same shape; no gradient flows into it.
        labels: Classes, int64 (batch,); not looked at.
        temperature: Above 0. The result is scaled by its square, so a weight need not change with it.

    Returns:
        Mean over the batch, shape (). Zero when both agree.

    Raises:
        ValueError: The shapes differ, or the temperature is not above 0.
    """
    log_student, log_teacher = _softened(student, teacher, temperature)
    return _kl(log_teacher, log_student) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student ‖ teacher): seeks the teacher's peak instead of covering its tail (Gu et al. 2023, arXiv:2306.08543).

    Arguments, result and errors as of :func:`soft_target_kl`.
    """
    log_student, log_teacher = _softened(student, teacher, temperature)
    return _kl(log_student, log_teacher) * temperature**2


def jensen_shannon(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen–Shannon divergence, β = 0.5: between both directions (Agarwal et al. 2023, arXiv:2306.13649).

    Arguments, result and errors as of :func:`soft_target_kl`; at most log 2 · T².
    """
    log_student, log_teacher = _softened(student, teacher, temperature)
    log_middle = torch.logsumexp(torch.stack([log_student, log_teacher]), dim=0) - torch.log(torch.tensor(2.0))
    return 0.5 * (_kl(log_teacher, log_middle) + _kl(log_student, log_middle)) * temperature**2


def target_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence over two classes, the labelled one and all others (TCKD of Zhao et al. 2022, arXiv:2203.08679).

    Arguments, result and errors as of :func:`soft_target_kl`, but the labels are looked at: the mean is over samples
    that have one, and zero when none has.
    """
    student, teacher, labels = _labelled(student, teacher, labels)
    log_student, log_teacher = _softened(student, teacher, temperature)
    return _kl(_target_or_not(log_teacher, labels), _target_or_not(log_student, labels)) * temperature**2


def non_target_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Divergence over all classes but the labelled one (NCKD of Zhao et al. 2022, arXiv:2203.08679).

    Arguments, result and errors as of :func:`target_kl`.
    """
    _check(student, teacher, temperature)
    student, teacher, labels = _labelled(student, teacher, labels)
    labelled = F.one_hot(labels, student.shape[1]).bool()
    others = (len(student), student.shape[1] - 1)
    log_student, log_teacher = _softened(student[~labelled].view(others), teacher[~labelled].view(others), temperature)
    return _kl(log_teacher, log_student) * temperature**2


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """DKD: target plus 8 times non-target (Zhao et al. 2022, arXiv:2203.08679; α and β as there for CIFAR-100).

    Other weights are a mix of :func:`target_kl` and :func:`non_target_kl`. Arguments as of those.
    """
    return target_kl(student, teacher, labels, temperature) + 8 * non_target_kl(student, teacher, labels, temperature)


def dist(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Relations instead of values (DIST, Huang et al. 2022, arXiv:2205.10536): 1 − Pearson, inter- plus intra-class.

    Inter-class compares each sample's distribution over classes; intra-class compares each class's column over the
    batch. Beta and gamma are 1, as in the paper.

    Args:
        student: Logits, (batch, classes), at least two of each.
        teacher: Logits, the same shape; no gradient flows into it.
        labels: Not looked at.
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


def hard_label(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy with the teacher's top class (DeiT's hard distillation, Touvron et al. 2020, arXiv:2012.12877).

    Arguments, result and errors as of :func:`soft_target_kl`; the temperature changes nothing.
    """
    _check(student, teacher, temperature)
    return F.cross_entropy(student, teacher.argmax(dim=1))


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "kd": soft_target_kl,
        "dist": dist,
        "reverse_kl": reverse_kl,
        "jsd": jensen_shannon,
        "dkd": decoupled,
        "tckd": target_kl,
        "nckd": non_target_kl,
        "hard": hard_label,
    }
)
"""By the name that a recipe uses in ``distill.arms`` and ``distill.overrides.<arm>.losses``."""


@dataclass(frozen=True)
class Term:
    """One loss of a mix.

    Attributes:
        name: In the log.
        weight: Above 0.
    """

    name: str
    weight: float
    loss: Loss


def weighted(
    student: Tensor,
    teacher: Targets,
    truth: Truth,
    terms: Sequence[Term],
    temperature: float,
    label_weight: float,
    standardize: bool = False,
) -> dict[str, Tensor]:
    """Ground truth and teacher together: label_weight · cross-entropy + (1 − label_weight) · Σ weight · loss.

    Args:
        student: Logits, (batch, classes).
        truth: What is known of the samples besides.
        teacher: As the cache has it; losses see both over the same classes
            (:meth:`edgekd.teachers.targets.Targets.paired`).
        label_weight: 0 (teacher only) to 1 (labels only).
        standardize: Compare z-scores of the logits (:func:`standardized`); the cross-entropy sees them as they are.

    Returns:
        The weighted parts by name, ground truth first; their sum is to be minimised.
    """
    parts = {LABELS: label_weight * truth.cross_entropy(student)}
    if not terms:
        return parts
    own, wanted, classes = teacher.paired(student, truth.single(), temperature)
    if standardize:
        own, wanted = standardized(own), standardized(wanted)
    for term in terms:
        loss = term.loss(own, wanted, classes, temperature)
        parts[term.name] = (1 - label_weight) * (loss if term.weight == 1 else term.weight * loss)
    return parts


def standardized(logits: Tensor, floor: float = 0.01) -> Tensor:
    """Logits less their mean, by their standard deviation, sample by sample (Sun et al. 2024, arXiv:2403.01427).

    A deviation below ``floor`` counts as that: where all logits are the same, as of a student with a head of zeros, the
    gradient would be without bound, and an optimizer's moments remember one such step for thousands.
    """
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(floor)


def gradient_shares(parts: Mapping[str, Tensor], pulled: Sequence[Tensor]) -> dict[str, float]:
    """How much each part pulls: the norm of its gradient, as a share of the sum of all norms.

    Equal weights of two losses say little about that. The graph is kept for the step that follows.

    Args:
        pulled: By what the gradient is taken: the logits where all parts look at these, else the student's weights.
    """
    norms = {}
    for name, part in parts.items():
        gradients = torch.autograd.grad(part, list(pulled), retain_graph=True, allow_unused=True)
        norms[name] = (
            float(sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None)) ** 0.5
        )
    total = sum(norms.values()) or 1.0
    return {name: norm / total for name, norm in norms.items()}


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities at a temperature."""
    _check(student, teacher, temperature)
    return F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher.detach() / temperature, dim=1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) from log-probabilities, mean over the batch; zero of an empty one."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / max(1, len(log_p))


def _labelled(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The samples that have a label."""
    known = labels != NO_LABEL
    return (student, teacher, labels) if bool(known.all()) else (student[known], teacher[known], labels[known])


def _target_or_not(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labelled class and of all others together, (batch, 2)."""
    labelled = F.one_hot(labels, log_probabilities.shape[1]).bool()
    target = log_probabilities[labelled]
    return torch.stack([target, torch.logsumexp(log_probabilities.masked_fill(labelled, -torch.inf), dim=1)], dim=1)


def _pearson(student: Tensor, teacher: Tensor, floor: float = 0.01) -> Tensor:
    """Correlation row by row; rows without variance correlate with nothing.

    A row that varies less than ``floor`` times as much as the teacher's counts as if it varied so much; see
    :func:`standardized`.
    """
    a, b = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    varies, least = b.square().sum(1), torch.finfo(b.dtype).tiny
    spread = torch.maximum(a.square().sum(1), floor**2 * varies).clamp_min(least).sqrt()
    return (a * b).sum(1) / (spread * varies.clamp_min(least).sqrt())


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be (batch, classes)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
