"""Ground truth: what is labelled counts, mixed samples by their shares."""

import pytest
import torch
import torch.nn.functional as F

from edgekd.data.truth import Truth

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])
SHARES = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.9])


def test_cross_entropy_is_the_mean_over_the_labelled_samples() -> None:
    some = CLASSES.clone()
    some[[0, 3]] = -1

    assert float(Truth(CLASSES).cross_entropy(LOGITS)) == pytest.approx(float(F.cross_entropy(LOGITS, CLASSES)))
    kept = some != -1
    assert float(Truth(some).cross_entropy(LOGITS)) == pytest.approx(
        float(F.cross_entropy(LOGITS[kept], CLASSES[kept]))
    )


def test_mixed_labels_are_what_soft_labels_of_the_same_shares_are() -> None:
    partners = CLASSES.flip(0)
    soft = SHARES[:, None] * F.one_hot(CLASSES, 4) + (1 - SHARES[:, None]) * F.one_hot(partners, 4)

    mixed = Truth(CLASSES, partners, SHARES).cross_entropy(LOGITS)
    assert float(mixed) == pytest.approx(float(F.cross_entropy(LOGITS, soft)), rel=1e-6)


def test_of_a_mix_with_an_unlabelled_partner_only_the_labelled_half_counts() -> None:
    partners = torch.full((6,), -1)
    losses = F.cross_entropy(LOGITS, CLASSES, reduction="none")

    mixed = Truth(CLASSES, partners, SHARES).cross_entropy(LOGITS)
    assert float(mixed) == pytest.approx(float((SHARES * losses).sum() / SHARES.sum()), rel=1e-6)


def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient() -> None:
    for partners, shares in ((None, None), (torch.full((6,), -1), SHARES)):
        logits = LOGITS.clone().requires_grad_()
        loss = Truth(torch.full((6,), -1), partners, shares).cross_entropy(logits)
        loss.backward()

        assert loss.item() == 0
        assert logits.grad is not None
        assert not logits.grad.any()


def test_a_loss_is_told_a_class_only_where_there_is_just_one() -> None:
    assert Truth(CLASSES).single().equal(CLASSES)
    mixed = Truth(CLASSES, torch.tensor([0, 2, -1, 3, 1, -1]), SHARES)
    assert mixed.single().tolist() == [0, -1, -1, 3, -1, -1]
