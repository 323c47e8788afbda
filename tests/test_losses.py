"""Losses against their formulas, written out in NumPy."""

import numpy as np
import pytest
import torch

from edgekd.losses import LOSSES, dist, mixed, soft_target_kl
from edgekd.reading import known_losses


def _logits(seed: int, batch: int = 6, classes: int = 4) -> torch.Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * 3


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_the_formula(temperature: float) -> None:
    student, teacher = _logits(0), _logits(1)
    p = _softmax(teacher.numpy().astype(np.float64) / temperature)
    q = _softmax(student.numpy().astype(np.float64) / temperature)
    expected = (p * np.log(p / q)).sum(1).mean() * temperature**2

    assert float(soft_target_kl(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


def test_kl_of_equal_distributions_is_zero() -> None:
    x = _logits(0)

    assert float(soft_target_kl(x, x, 3.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(soft_target_kl(x, x + 5.0, 1.0)) == pytest.approx(0.0, abs=1e-6)


def test_gradient_of_kl_keeps_its_size_over_temperatures() -> None:
    """T² is there so that the gradient does not vanish: at high T it tends to the logit difference over the classes."""
    sizes = []
    for temperature in (20.0, 40.0):
        student = _logits(0).requires_grad_()
        soft_target_kl(student, _logits(1), temperature).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))

    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_dist_is_the_formula() -> None:
    student, teacher = _logits(0), _logits(1)
    p, q = _softmax(student.numpy().astype(np.float64)), _softmax(teacher.numpy().astype(np.float64))
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])

    assert float(dist(student, teacher)) == pytest.approx(2 - rows - columns, rel=1e-4)


def test_dist_of_equal_outputs_is_zero() -> None:
    x = _logits(0)

    assert float(dist(x, x)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_gradient_flows_into_the_teacher(name: str) -> None:
    student, teacher = _logits(0).requires_grad_(), _logits(1).requires_grad_()

    LOSSES[name](student, teacher, 2.0).backward()

    assert teacher.grad is None
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_a_mean_over_the_batch(name: str) -> None:
    """Twice the same batch is the same loss: no sum over samples, no division by classes."""
    student, teacher = _logits(0), _logits(1)
    once = float(LOSSES[name](student, teacher, 1.0))
    twice = float(LOSSES[name](student.repeat(2, 1), teacher.repeat(2, 1), 1.0))

    assert once == pytest.approx(twice, rel=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_shapes_that_differ_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(6, 5\)"):
        LOSSES[name](_logits(0), _logits(1, classes=5), 1.0)


def test_temperature_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        soft_target_kl(_logits(0), _logits(1), 0.0)


def test_mixing_weighs_labels_and_teacher() -> None:
    student, teacher, labels = _logits(0), _logits(1), torch.tensor([0, 1, 2, 3, 0, 1])
    total, parts = mixed(student, teacher, labels, soft_target_kl, 2.0, 0.25)
    expected = 0.25 * torch.nn.functional.cross_entropy(student, labels) + 0.75 * soft_target_kl(student, teacher, 2.0)

    assert float(total) == pytest.approx(float(expected))
    assert parts["labels"] + parts["teacher"] == pytest.approx(float(total))


def test_the_recipe_knows_the_losses_without_importing_torch() -> None:
    assert known_losses() == tuple(LOSSES)
