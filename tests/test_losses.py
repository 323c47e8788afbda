"""Losses against their formulas, written out in NumPy."""

import numpy as np
import pytest
import torch

from edgekd.data.truth import Truth
from edgekd.distillation.losses import (
    LOSSES,
    Term,
    decoupled,
    dist,
    gradient_shares,
    hard_label,
    jensen_shannon,
    non_target_kl,
    reverse_kl,
    soft_target_kl,
    standardized,
    target_kl,
    weighted,
)
from edgekd.recipes.arm_faults import LABEL_LOSSES, known_losses
from edgekd.teachers.targets import DenseTargets


def _logits(seed: int, batch: int = 6, classes: int = 4) -> torch.Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)) * 3


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_the_formula(temperature: float) -> None:
    student, teacher = _logits(0), _logits(1)
    p = _softmax(teacher.numpy().astype(np.float64) / temperature)
    q = _softmax(student.numpy().astype(np.float64) / temperature)
    expected = (p * np.log(p / q)).sum(1).mean() * temperature**2

    assert float(soft_target_kl(student, teacher, LABELS, temperature)) == pytest.approx(expected, rel=1e-5)


def test_kl_of_equal_distributions_is_zero() -> None:
    x = _logits(0)

    assert float(soft_target_kl(x, x, LABELS, 3.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(soft_target_kl(x, x + 5.0, LABELS, 1.0)) == pytest.approx(0.0, abs=1e-6)


def test_gradient_of_kl_keeps_its_size_over_temperatures() -> None:
    """T² is there so that the gradient does not vanish: at high T it tends to the logit difference over the classes."""
    sizes = []
    for temperature in (20.0, 40.0):
        student = _logits(0).requires_grad_()
        soft_target_kl(student, _logits(1), LABELS, temperature).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))

    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_dist_is_the_formula() -> None:
    student, teacher = _logits(0), _logits(1)
    p, q = _softmax(student.numpy().astype(np.float64)), _softmax(teacher.numpy().astype(np.float64))
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])

    assert float(dist(student, teacher, LABELS)) == pytest.approx(2 - rows - columns, rel=1e-4)


def test_dist_of_equal_outputs_is_zero() -> None:
    x = _logits(0)

    assert float(dist(x, x, LABELS)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_gradient_flows_into_the_teacher(name: str) -> None:
    student, teacher = _logits(0).requires_grad_(), _logits(1).requires_grad_()

    LOSSES[name](student, teacher, LABELS, 2.0).backward()

    assert teacher.grad is None
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_a_mean_over_the_batch(name: str) -> None:
    """Twice the same batch is the same loss: no sum over samples, no division by classes."""
    student, teacher = _logits(0), _logits(1)
    once = float(LOSSES[name](student, teacher, LABELS, 1.0))
    twice = float(LOSSES[name](student.repeat(2, 1), teacher.repeat(2, 1), LABELS.repeat(2), 1.0))

    assert once == pytest.approx(twice, rel=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_shapes_that_differ_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(6, 4\).*\(6, 5\)"):
        LOSSES[name](_logits(0), _logits(1, classes=5), LABELS, 1.0)


def test_temperature_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        soft_target_kl(_logits(0), _logits(1), LABELS, 0.0)


def _numpy(temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of teacher and student at a temperature."""
    teacher, student = (_logits(seed).numpy().astype(np.float64) / temperature for seed in (1, 0))
    return _softmax(teacher), _softmax(student)


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_reverse_kl_and_jensen_shannon_are_their_formulas(temperature: float) -> None:
    student, teacher = _logits(0), _logits(1)
    p, q = _numpy(temperature)
    middle = (p + q) / 2
    between = (_divergence(p, middle) + _divergence(q, middle)) / 2

    assert float(reverse_kl(student, teacher, LABELS, temperature)) == pytest.approx(
        _divergence(q, p) * temperature**2, rel=1e-5
    )
    assert float(jensen_shannon(student, teacher, LABELS, temperature)) == pytest.approx(
        between * temperature**2, rel=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_is_target_and_non_target_and_together_they_are_kl(temperature: float) -> None:
    """Equation 7 of arXiv:2203.08679: KL = TCKD + (1 − p of the target) · NCKD, sample by sample."""
    student, teacher = _logits(0), _logits(1)
    p, q = _numpy(temperature)
    rows, target = np.arange(len(p)), LABELS.numpy()
    pt, qt = p[rows, target], q[rows, target]
    tckd = pt * np.log(pt / qt) + (1 - pt) * np.log((1 - pt) / (1 - qt))
    others = np.ones_like(p, bool)
    others[rows, target] = False
    ph, qh = (x[others].reshape(len(x), -1) / (1 - x[rows, target])[:, None] for x in (p, q))
    nckd = (ph * np.log(ph / qh)).sum(1)
    scale = temperature**2

    assert float(target_kl(student, teacher, LABELS, temperature)) == pytest.approx(tckd.mean() * scale, rel=1e-5)
    assert float(non_target_kl(student, teacher, LABELS, temperature)) == pytest.approx(nckd.mean() * scale, rel=1e-5)
    assert float(decoupled(student, teacher, LABELS, temperature)) == pytest.approx(
        (tckd + 8 * nckd).mean() * scale, rel=1e-5
    )
    assert (tckd + (1 - pt) * nckd).mean() == pytest.approx(_divergence(p, q), rel=1e-9)


def test_hard_labels_are_the_teachers_top_classes() -> None:
    student, teacher = _logits(0), _logits(1)
    _, q = _numpy(1.0)
    expected = -np.log(q[np.arange(len(q)), teacher.numpy().argmax(1)]).mean()

    assert float(hard_label(student, teacher, LABELS)) == pytest.approx(expected, rel=1e-5)


def test_a_mix_weighs_labels_and_every_loss() -> None:
    student, teacher = _logits(0), _logits(1)
    terms = [Term("kd", 1.0, soft_target_kl), Term("dist", 2.0, dist)]
    parts = weighted(student, DenseTargets(teacher), Truth(LABELS), terms, 2.0, 0.25)

    assert list(parts) == ["labels", "kd", "dist"]
    assert float(parts["labels"]) == pytest.approx(0.25 * float(torch.nn.functional.cross_entropy(student, LABELS)))
    assert float(parts["kd"]) == pytest.approx(0.75 * float(soft_target_kl(student, teacher, LABELS, 2.0)))
    assert float(parts["dist"]) == pytest.approx(1.5 * float(dist(student, teacher, LABELS, 2.0)))


def test_standardized_logits_forgive_scale_and_shift_and_the_labels_do_not() -> None:
    student, teacher = _logits(0), _logits(1)
    terms = [Term("kd", 1.0, soft_target_kl)]
    plain = weighted(student, DenseTargets(teacher), Truth(LABELS), terms, 2.0, 0.5, standardize=True)
    moved = weighted(3 * student - 1, DenseTargets(5 * teacher + 2), Truth(LABELS), terms, 2.0, 0.5, standardize=True)

    assert standardized(student).std(1) == pytest.approx(torch.ones(6))
    assert float(moved["kd"]) == pytest.approx(float(plain["kd"]), rel=1e-4)
    assert float(moved["labels"]) != pytest.approx(float(plain["labels"]), rel=0.1)


@pytest.mark.parametrize("standardize", [False, True])
def test_a_student_that_says_nothing_yet_is_not_thrown_off_by_its_first_step(standardize: bool) -> None:
    """As with a head of zeros, which vision transformers begin with: all logits are the same."""
    student, name = torch.zeros(6, 4, requires_grad=True), "kd" if standardize else "dist"
    terms = [Term(name, 1.0, LOSSES[name])]
    parts = weighted(student, DenseTargets(_logits(1)), Truth(LABELS), terms, 1.0, 0.5, standardize)
    parts[name].backward()

    assert student.grad is not None
    assert 1e-3 < float(student.grad.abs().max()) < 100


def test_gradient_shares_tell_who_pulls() -> None:
    logits = _logits(0).requires_grad_()
    parts = {"one": logits.sum(), "three": 3 * logits.sum(), "none": torch.tensor(7.0, requires_grad=True) * 1}
    shares = gradient_shares(parts, [logits])

    assert shares == pytest.approx({"one": 0.25, "three": 0.75, "none": 0.0})
    sum(parts.values(), start=torch.zeros(())).backward()  # the graph is still there
    assert logits.grad is not None


def test_the_recipe_knows_the_losses_without_importing_torch() -> None:
    assert known_losses() == tuple(LOSSES)


def test_losses_that_look_at_labels_are_means_over_the_labelled_samples_and_known_to_the_recipe() -> None:
    student, teacher = _logits(0), _logits(1)
    some, none = LABELS.clone(), torch.full_like(LABELS, -1)
    some[[1, 4]] = -1
    kept = some != -1
    looking = []
    for name, loss in LOSSES.items():
        value = float(loss(student, teacher, some, 2.0))
        if value != pytest.approx(float(loss(student, teacher, LABELS, 2.0)), rel=1e-6):
            looking.append(name)
            assert value == pytest.approx(float(loss(student[kept], teacher[kept], LABELS[kept], 2.0)), rel=1e-6)
            assert float(loss(student, teacher, none, 2.0)) == 0

    assert tuple(looking) == LABEL_LOSSES
