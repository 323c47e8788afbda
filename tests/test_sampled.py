"""Draws that stand for a distribution: unbiased whatever room a record has, and seen by the loss as in the paper."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgekd.distillation.losses import soft_target_kl
from edgekd.errors import UsageError
from edgekd.teachers.records import make_records
from edgekd.teachers.sampled import Sampled, SampledTargets
from edgekd.teachers.targets import codec_of

CLASSES = 60


def distribution() -> np.ndarray:
    """A few likely classes and a long tail, so that the draws find no room."""
    return np.log(0.9 ** np.arange(CLASSES) / (0.9 ** np.arange(CLASSES)).sum()).astype(np.float32)


def drawn(codec: Sampled, logits: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, SampledTargets]:
    """Records of the same logits under many seeds."""
    records = np.zeros(len(seeds), np.dtype([("seed", "<u8"), *codec.fields(logits.shape[-1])]))
    records["seed"] = seeds
    codec.encode(np.broadcast_to(logits - logits.max(), (len(seeds), logits.shape[-1])), records)
    return records, codec.decode(records)


def as_distribution(targets: SampledTargets) -> np.ndarray:
    dense = torch.zeros(len(targets.classes), CLASSES)
    return dense.scatter_add_(1, targets.classes, targets.shares).numpy()


def test_a_record_of_fifty_draws_takes_thirty_six_bytes() -> None:
    codec = Sampled(50)

    assert codec_of("sampled50") == codec
    assert np.dtype(codec.fields(49_152)).itemsize == 36


def test_more_draws_than_a_byte_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="up to 255"):
        codec_of("sampled256")


@pytest.mark.parametrize("draws", [20, 50, 200])
def test_the_mean_of_many_records_is_the_distribution_although_the_draws_find_no_room(draws: int) -> None:
    codec, count = Sampled(draws), 6000
    records, targets = drawn(codec, distribution(), np.arange(count))
    shares = as_distribution(targets)
    p = np.exp(distribution().astype(np.float64))
    error = shares.std(axis=0) / count**0.5

    assert (records["drawn"] == 0).any(axis=1).mean() > 0.5  # most records lack room
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    assert (np.abs(shares.mean(axis=0) - p) < 4.5 * error + 1e-7).all()


def test_where_there_is_room_the_counts_are_those_of_the_draws() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125] + [1e-12] * 4, np.float32))
    records, targets = drawn(Sampled(40), logits, np.arange(200))
    shares = torch.zeros(200, 8).scatter_add_(1, targets.classes, targets.shares).numpy()

    assert (records["drawn"].sum(axis=1) == 40).all()
    np.testing.assert_allclose(shares * 40, np.rint(shares * 40), atol=1e-4)
    np.testing.assert_allclose(shares.mean(0)[:4], [0.5, 0.25, 0.125, 0.125], atol=0.02)


def test_the_same_seed_draws_the_same() -> None:
    a, b = (drawn(Sampled(50), distribution(), np.array([3, 9, 3]))[0] for _ in range(2))

    assert a.tobytes() == b.tobytes()
    assert a[0].tobytes() == a[2].tobytes() != a[1].tobytes()


def test_places_of_a_record_that_hold_no_draw_say_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stood in the memory before: shares that are not drawn must not come from there."""
    empty = np.empty

    def used(*asked: Any, **told: Any) -> np.ndarray:
        made = empty(*asked, **told)
        made.view(np.uint8)[...] = 255
        return made

    monkeypatch.setattr(np, "empty", used)
    codec, seeds = Sampled(50), np.arange(20, dtype=np.uint64)
    logits = np.log(np.array([[0.6, 0.3, 0.1, *[1e-9] * (CLASSES - 3)]] * 20, np.float32))
    records = make_records(seeds, None, logits, None, seeds, codec, {})
    targets = codec.decode(records)

    np.testing.assert_allclose(targets.shares.sum(1), 1, atol=1e-5)


def test_the_gradient_is_that_of_the_cross_entropy_with_the_drawn_shares() -> None:
    _, targets = drawn(Sampled(50), distribution(), np.arange(5))
    torch.manual_seed(0)
    student = torch.randn(5, CLASSES, requires_grad=True)
    own, wanted, _ = targets.paired(student, torch.zeros(5, dtype=torch.int64), 1.0)
    (gradient,) = torch.autograd.grad(soft_target_kl(own, wanted, torch.zeros(5), 1.0), student)
    expected = (F.softmax(student, dim=1) - torch.from_numpy(as_distribution(targets))) / 5

    torch.testing.assert_close(gradient, expected.detach(), atol=1e-6, rtol=1e-4)


def test_a_student_that_has_the_drawn_shares_loses_nothing() -> None:
    _, targets = drawn(Sampled(50), distribution(), np.arange(5))
    student = torch.from_numpy(as_distribution(targets)).clamp(min=1e-12).log()
    own, wanted, _ = targets.paired(student, torch.zeros(5, dtype=torch.int64), 1.0)

    assert float(soft_target_kl(own, wanted, torch.zeros(5), 1.0)) == pytest.approx(0, abs=1e-5)


def test_another_temperature_is_refused() -> None:
    _, targets = drawn(Sampled(50), distribution(), np.arange(5))

    with pytest.raises(UsageError, match="T = 1, not at T = 2"):
        targets.paired(torch.zeros(5, CLASSES), torch.zeros(5, dtype=torch.int64), 2.0)
