"""What a cache keeps of the teacher's outputs, and what a loss makes of it."""

import numpy as np
import pytest
import torch

from edgekd.distillation.losses import LOSSES, soft_target_kl
from edgekd.errors import UsageError
from edgekd.teachers.targets import DenseTargets, Targets, TopTargets, codec_of

CLASSES = 1000
LABELS = torch.tensor([3, 999, 0, 41])


def logits(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(4, CLASSES)).astype(np.float32) * 3
    values[np.arange(4), [3, 5, 7, 9]] += 12
    return values - values.max(1, keepdims=True)


def stored(name: str, values: np.ndarray) -> tuple[Targets, int]:
    """Through a record and back, and its size with the seed."""
    codec = codec_of(name)
    record = np.dtype([("seed", "<u4"), *codec.fields(values.shape[1])])
    records = np.zeros(len(values), record)
    codec.encode(values, records)
    return codec.decode(records), record.itemsize


def buckets(values: np.ndarray, kept: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of the kept classes and of all others together, in float64."""
    p = np.exp(values.astype(np.float64) / temperature)
    p /= p.sum(1, keepdims=True)
    head = np.take_along_axis(p, kept, 1)
    return np.concatenate([head, 1 - head.sum(1, keepdims=True)], axis=1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_top_classes_and_the_ghost_are_exact_at_the_stored_temperatures(temperature: float) -> None:
    teacher, student = logits(0), logits(1)
    targets, size = stored("top10", teacher)
    kept = np.argsort(-teacher, axis=1)[:, :10]
    p, q = buckets(teacher, kept, temperature), buckets(student, kept, temperature)
    own, wanted, _ = targets.paired(torch.from_numpy(student), LABELS, temperature)

    assert size == 56
    assert torch.softmax(wanted / temperature, 1).numpy() == pytest.approx(p, rel=3e-3)
    assert torch.softmax(own / temperature, 1).numpy() == pytest.approx(q, rel=1e-4)
    expected = (p * np.log(p / q)).sum(1).mean() * temperature**2
    assert float(soft_target_kl(own, wanted, LABELS, temperature)) == pytest.approx(expected, rel=1e-2)


def test_the_ghost_is_better_than_renormalising() -> None:
    """At T = 4 most of the mass lies outside: without it the student is pulled towards another distribution."""
    teacher = logits(0)
    targets, _ = stored("top10", teacher)
    assert isinstance(targets, TopTargets)
    kept = np.argsort(-teacher, axis=1)[:, :10]
    p = buckets(teacher, kept, 4.0)
    renormalised = torch.softmax(targets.logits / 4.0, 1).numpy()

    assert p[:, -1].mean() > 0.5
    assert np.abs(renormalised - p[:, :10]).max() > 10 * 3e-3


def test_a_perfect_student_of_the_top_classes_has_no_loss_and_no_gradient() -> None:
    teacher = logits(0)
    targets, _ = stored("top10", teacher)
    student = torch.from_numpy(teacher).requires_grad_()
    own, wanted, _ = targets.paired(student, LABELS, 2.0)
    loss = soft_target_kl(own, wanted, LABELS, 2.0)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-3


def test_labels_follow_their_class_or_become_the_ghost() -> None:
    teacher = logits(0)
    targets, _ = stored("top10", teacher)
    *_, place = targets.paired(torch.from_numpy(teacher), LABELS, 1.0)
    kept = np.argsort(-teacher, axis=1)[:, :10]

    for row, label in enumerate(LABELS.tolist()):
        assert place[row] == (list(kept[row]).index(label) if label in kept[row] else 10)
    assert place[0] == 0


def test_other_temperatures_are_refused_and_those_that_work_are_named() -> None:
    targets, _ = stored("top10", logits(0))

    with pytest.raises(UsageError, match=r"at T = 1, 2, 4, not at T = 3; take one of these, or .*dense-f16"):
        targets.paired(torch.zeros(4, CLASSES), LABELS, 3.0)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dist"])
def test_every_loss_but_dist_takes_the_top_classes(name: str) -> None:
    targets, _ = stored("top10", logits(0))
    student = torch.from_numpy(logits(1)).requires_grad_()
    loss = LOSSES[name](*targets.paired(student, LABELS, 2.0), 2.0)
    loss.backward()

    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.abs().max()) > 0


@pytest.mark.parametrize(("name", "bytes_a_view", "apart"), [("dense-f16", 2004, 1e-6), ("dense-u8", 1008, 1e-3)])
def test_dense_records_cost_so_much_and_lose_so_little(name: str, bytes_a_view: int, apart: float) -> None:
    teacher = logits(0)
    targets, size = stored(name, teacher)
    assert isinstance(targets, DenseTargets)

    assert size == bytes_a_view
    assert float(soft_target_kl(targets.logits, torch.from_numpy(teacher), LABELS)) < apart
    assert (targets.top_class().numpy() == teacher.argmax(1)).all()
    assert float(targets.errors(torch.from_numpy(teacher)).max()) < 1e-3


@pytest.mark.parametrize("name", ["dense-f16", "dense-u8", "top10"])
def test_another_teacher_is_told_apart_by_every_codec(name: str) -> None:
    targets, _ = stored(name, logits(0))

    assert float(targets.errors(torch.from_numpy(logits(0))).max()) < 1e-3
    assert float(targets.errors(torch.from_numpy(logits(1))).max()) > 0.1


def test_more_classes_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match="top10 keeps 10 classes, and there are 10; take dense-f16"):
        codec_of("top10").fields(10)


def test_unknown_codecs_are_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no codec called 'top'; there are dense-f16, dense-u8, top10"):
        codec_of("top")
