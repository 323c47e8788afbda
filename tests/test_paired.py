"""Losses on the same samples: against McNemar, against brute force, and what the intervals promise."""

import numpy as np
import pytest

from edgekd.benchmarks.paired import cosines, mean_drop, share_drop


def answers(both: int, lost: int, gained: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    old = [True] * (both + lost) + [False] * (gained + neither)
    new = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return np.array(old), np.array(new)


def test_at_a_margin_of_zero_the_test_is_mcnemars() -> None:
    from scipy.stats import chi2

    for lost, gained in ((12, 3), (7, 2), (30, 18)):
        drop = share_drop(*answers(200, lost, gained, 20), margin=0.0, confidence=0.95)
        mcnemar = chi2.sf((lost - gained) ** 2 / (lost + gained), 1)
        assert drop.p_worse == pytest.approx(mcnemar / 2)
        assert (drop.lost, drop.gained) == (lost, gained)


def test_the_interval_ends_where_the_test_falls() -> None:
    for table in ((200, 12, 3, 20), (95, 0, 0, 5), (40, 1, 9, 0)):
        drop = share_drop(*answers(*table), margin=0.0, confidence=0.95)
        assert share_drop(*answers(*table), margin=drop.low, confidence=0.95).p_worse == pytest.approx(0.025, abs=1e-3)
        assert share_drop(*answers(*table), margin=drop.high, confidence=0.95).p_worse == pytest.approx(0.975, abs=1e-3)


def test_the_interval_covers_the_true_drop_as_often_as_it_says() -> None:
    random, covered = np.random.default_rng(0), 0
    for _ in range(600):
        old = random.random(250) < 0.9
        new = np.where(random.random(250) < np.where(old, 0.05, 0.2), ~old, old)
        drop = share_drop(old, new, margin=0.0, confidence=0.95)
        covered += drop.low <= 0.9 * 0.05 - 0.1 * 0.2 <= drop.high
    assert 0.93 <= covered / 600 <= 0.97


def test_few_samples_that_all_agree_do_not_prove_a_small_drop_impossible() -> None:
    assert share_drop(*answers(100, 0, 0, 0), margin=0.01, confidence=0.95).high > 0.01
    assert share_drop(*answers(1000, 0, 0, 0), margin=0.01, confidence=0.95).high < 0.01


def test_a_mean_drop_is_that_of_the_same_samples() -> None:
    random = np.random.default_rng(0)
    old = random.random(400)
    drop = mean_drop(old, old - 0.02 + 0.001 * random.standard_normal(400), margin=0.01, confidence=0.95, seed=0)
    assert drop.estimate == pytest.approx(0.02, abs=2e-4)
    assert 0.0198 < drop.low < drop.estimate < drop.high < 0.0202, "far narrower than the spread of the scores"
    assert drop.p_worse < 0.001


def test_a_cosine_of_zeros_or_nan_is_zero() -> None:
    wanted = np.ones((3, 4))
    outputs = np.array([[2.0] * 4, [0.0] * 4, [np.nan] * 4])
    assert cosines(outputs, wanted).tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="cannot be compared"):
        cosines(outputs, wanted[:2])


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="the same samples twice"):
        share_drop(np.ones(3, bool), np.ones(4, bool), 0.01, 0.95)
    with pytest.raises(ValueError, match="the same samples twice"):
        mean_drop(np.ones(3), np.ones(4), 0.01, 0.95, 0)
