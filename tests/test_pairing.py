"""Paired differences: against scipy, and how often each test finds what is not there."""

import numpy as np
import pytest

from edgekd.reporting.pairing import paired, paired_means, t_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 7.5, 30, 1000, 1e9])
def test_students_t_is_that_of_scipy(freedom: float) -> None:
    stats = pytest.importorskip("scipy.stats")

    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-6)
    assert t_quantile(freedom, 0.8) == pytest.approx(stats.t.ppf(0.9, freedom), rel=2e-6)


def test_over_the_seeds_alone_it_is_the_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    own, other = [0.91, 0.93, 0.96, 0.95], [0.90, 0.91, 0.93, 0.95]
    found = paired_means(own, other)
    wanted = stats.ttest_rel(own, other)

    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert found.standard_error == pytest.approx(found.difference / wanted.statistic)


def test_two_seeds_have_no_interval() -> None:
    right = np.ones((2, 50), bool)

    assert paired(right, ~right).low is None
    assert not paired(right, ~right).is_told
    assert paired_means([0.9, 0.8], [0.1, 0.1]).high is None


def test_seeds_that_move_both_ways_alike_do_not_hide_a_difference() -> None:
    random = np.random.default_rng(0)
    common = random.normal(0, 3, (4, 1)) + random.normal(0, 1, (1, 300))
    found = paired(common + 0.1, common)

    assert found.difference == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert found.is_told


def students(random: np.random.Generator, seeds: int, samples: int, of_seed: float, of_sample: float) -> np.ndarray:
    """Right or wrong of two ways that are equally good in all the samples there are, (2, seeds, samples).

    The second way is better on some samples and worse on others; a seed makes a student better or worse as a whole.
    """
    ease, change = random.normal(2.2, 2.0, samples), random.normal(0, of_sample, samples)
    made = [
        ease + sign * change / 2 + random.normal(0, of_seed, (seeds, 1)) + random.normal(0, 0.7, (seeds, samples)) > 0
        for sign in (1, -1)
    ]
    return np.stack(made)


def mcnemar_p(own: np.ndarray, other: np.ndarray) -> float:
    from scipy.stats import binomtest

    gained, lost = int((own & ~other).sum()), int((~own & other).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


@pytest.mark.parametrize(
    ("seeds", "samples", "of_seed", "of_sample", "misled"),
    [
        (5, 2000, 0.0, 1.0, "the paired t-test over seeds"),
        (5, 2000, 0.2, 0.0, "McNemar's test over the samples of one seed"),
    ],
)
def test_where_there_is_no_difference_only_the_layout_of_both_stays_near_5_percent(
    seeds: int, samples: int, of_seed: float, of_sample: float, misled: str
) -> None:
    """Why the interval is not simply that of the seeds, or of the samples."""
    pytest.importorskip("scipy")
    random, trials = np.random.default_rng(1), 300
    found = {
        "the layout of both": 0,
        "the paired t-test over seeds": 0,
        "McNemar's test over the samples of one seed": 0,
    }
    for _ in range(trials):
        own, other = students(random, seeds, samples, of_seed, of_sample)
        found["the layout of both"] += paired(own, other).is_told
        by_seed = paired_means(own.mean(axis=1).tolist(), other.mean(axis=1).tolist())
        found["the paired t-test over seeds"] += by_seed.is_told
        found["McNemar's test over the samples of one seed"] += mcnemar_p(own[0], other[0]) < 0.05
    share = {name: count / trials for name, count in found.items()}

    assert share["the layout of both"] < 0.08, share
    assert share[misled] > 0.15, share


def test_a_difference_that_is_there_is_found() -> None:
    random = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        own, other = students(random, 3, 2000, 0.03, 0.5)
        own = own | (random.random(own.shape) < 0.25)  # right on a quarter of what it had wrong
        found += paired(own, other).is_told
    assert found > 80, found


def test_what_is_no_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there are \(2, 3\) and \(3, 3\)"):
        paired(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="there are 1 and 2"):
        paired_means([1.0], [1.0, 2.0])
