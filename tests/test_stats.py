"""Statistics against brute force and answers known from elsewhere."""

import itertools
import math
import random

import numpy as np
import pytest

from edgekd.benchmarks import stats
from edgekd.measurement import Block, Measurement


def block(latency_ms: list[float], **changes: float) -> Block:
    return Block(
        runtime_load_ms=changes.get("runtime_load_ms", 60.0),
        model_load_ms=changes.get("model_load_ms", 5.0),
        first_inference_ms=changes.get("first_inference_ms", 3.0),
        warmup_ms=(2.0,),
        latency_ms=tuple(latency_ms),
        peak_memory_bytes=None if "unreadable" in changes else int(changes.get("peak", 1000)),
        converged=True,
    )


def measurement(*blocks: Block) -> Measurement:
    return Measurement("0" * 64, "onnx", "fp32", "host", "measured", blocks=blocks)


@pytest.mark.parametrize(("percent", "fewest"), [(90, 64), (95, 130), (99, 662)])
def test_a_percentile_needs_the_samples_of_loadgen(percent: int, fewest: int) -> None:
    assert stats.percentile([1.0] * (fewest - 1), percent) is None
    assert stats.percentile([1.0] * fewest, percent) == 1.0


@pytest.mark.parametrize("percent", [90, 95, 99])
def test_a_percentile_is_the_smallest_sample_that_covers_its_share(percent: int) -> None:
    drawn = random.Random(percent)
    for count in (662, 700, 999, 1000, 1024):
        samples = [drawn.expovariate(1.0) for _ in range(count)]
        by_hand = min(s for s in samples if sum(other <= s for other in samples) * 100 >= percent * count)
        assert stats.percentile(samples, percent) == by_hand


@pytest.mark.parametrize(("percent", "fewest"), [(90, 64), (95, 130), (99, 662)])
def test_the_fewest_samples_follow_from_the_binomial_rule(percent: int, fewest: int) -> None:
    """Early stopping at 99 % confidence: fewer than 2 samples above the true percentile must be that unlikely."""
    above = 1 - percent / 100

    def fewer_than_two(count: int) -> float:
        return (1 - above) ** count + count * above * (1 - above) ** (count - 1)

    assert fewer_than_two(fewest) <= 0.01 < fewer_than_two(fewest - 1)


def test_the_median_needs_one_sample() -> None:
    assert stats.percentile([], 50) is None
    assert stats.percentile([3.0, 1.0], 50) == 2.0


def test_an_unknown_percentile_is_refused() -> None:
    with pytest.raises(KeyError):
        stats.percentile([1.0] * 1000, 42)


def test_latency_is_the_median_of_block_medians_and_not_of_all_samples() -> None:
    uneven = measurement(block([1.0] * 1000), block([2.0] * 3), block([3.0] * 3))
    assert stats.block_medians(uneven) == (1.0, 2.0, 3.0)
    assert stats.latency_ms(uneven) == 2.0


def test_what_was_not_run_has_no_latency() -> None:
    not_run = Measurement("0" * 64, "coreml", "fp32", "host", "not_run", "Apple only")
    assert stats.latency_ms(not_run) is None
    assert stats.summarize(not_run) is None


def test_spread_is_between_blocks() -> None:
    assert stats.spread([2.0, 2.2, 1.9]) == pytest.approx(0.15)
    assert stats.spread([2.0]) is None


def test_tukeys_outliers_are_counted_on_both_sides() -> None:
    samples = [float(value) for value in range(1, 12)]  # quartiles 3.5 and 8.5: fences at -4 and 16
    assert stats.outliers(samples) == 0
    assert stats.outliers([*samples, 30.0]) == 1
    assert stats.outliers([*samples, 30.0, -30.0]) == 2
    assert stats.outliers([1.0] * 10) == 0


def test_a_summary_is_derived_from_all_blocks() -> None:
    first = block([1.0] * 40 + [9.0], model_load_ms=4.0, peak=100)
    second = block([1.2] * 40, model_load_ms=6.0, peak=300)
    summary = stats.summarize(measurement(first, second))
    assert summary is not None
    assert summary.p50_ms == pytest.approx(1.1)
    assert summary.p90_ms == 1.2
    assert summary.p95_ms is None
    assert summary.p99_ms is None
    assert summary.spread == pytest.approx(0.2 / 1.1)
    assert (summary.model_load_ms, summary.peak_memory_bytes) == (5.0, 300)
    assert (summary.samples, summary.outliers, summary.blocks) == (81, 1, 2)
    assert stats.Summary.from_json(summary.to_json()) == summary


def test_unreadable_memory_stays_unknown() -> None:
    summary = stats.summarize(measurement(block([1.0], unreadable=1)))
    assert summary is not None
    assert summary.peak_memory_bytes is None


def test_the_cut_of_the_signed_rank_interval_is_that_of_the_tables() -> None:
    """Published two-sided 5 % critical values of Wilcoxon's test, plus one; and no interval at n = 5."""
    assert {n: stats.signed_rank_cut(n, 0.05) for n in (5, 6, 8, 10, 15, 20)} == {
        5: 0,
        6: 1,
        8: 4,
        10: 9,
        15: 26,
        20: 53,
    }
    assert {n: stats.signed_rank_cut(n, 0.025) for n in (8, 10, 20)} == {8: 3, 10: 6, 20: 46}


@pytest.mark.parametrize("pairs", [6, 7, 9, 11])
def test_the_cut_agrees_with_counting_every_sign(pairs: int) -> None:
    totals = [
        sum(rank for rank, positive in zip(range(1, pairs + 1), signs, strict=True) if positive)
        for signs in itertools.product((False, True), repeat=pairs)
    ]
    by_hand = sum(sum(total <= t for total in totals) / 2**pairs <= 0.025 for t in range(max(totals) + 1))
    assert stats.signed_rank_cut(pairs, 0.05) == by_hand


def test_the_estimate_and_interval_agree_with_brute_force() -> None:
    drawn = random.Random(0)
    first = [drawn.uniform(1, 2) for _ in range(8)]
    second = [value * drawn.uniform(0.9, 1.3) for value in first]
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    walsh = sorted((x + y) / 2 for x, y in itertools.combinations_with_replacement(logs, 2))
    found = stats.ratio(first, second)
    assert found.estimate == pytest.approx(math.exp(float(np.median(walsh))))
    assert found.low == pytest.approx(math.exp(walsh[3]))
    assert found.high == pytest.approx(math.exp(walsh[-4]))
    assert found.pairs == 8


def test_fewer_than_six_pairs_give_an_estimate_and_no_interval() -> None:
    found = stats.ratio([1.0] * 5, [1.1] * 5)
    assert found.estimate == pytest.approx(1.1)
    assert (found.low, found.high) == (None, None)
    assert stats.ratio([1.0] * 6, [1.1] * 6).low == pytest.approx(1.1)


def test_swapping_the_two_inverts_the_ratio() -> None:
    drawn = random.Random(1)
    first, second = ([drawn.uniform(1, 2) for _ in range(9)] for _ in range(2))
    there, back = stats.ratio(first, second), stats.ratio(second, first)
    assert there.estimate == pytest.approx(1 / back.estimate)
    assert there.low is not None
    assert back.high is not None
    assert there.low == pytest.approx(1 / back.high)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """2000 sessions of 10 pairs with a true ratio of 1.05 and a drift that both sides share."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        drift = np.exp(np.cumsum(generator.normal(0, 0.02, 10)))
        first = drift * np.exp(generator.laplace(0, 0.02, 10))
        second = 1.05 * drift * np.exp(generator.laplace(0, 0.02, 10))
        found = stats.ratio(first.tolist(), second.tolist())
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1.05 <= found.high
    assert 0.94 <= covered / 2000 <= 0.97  # nominal 95 %; exact coverage of the discrete interval is 95.1 %


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 2 and 1 blocks"):
        stats.ratio([1.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="pairs"):
        stats.ratio([], [])
    with pytest.raises(ValueError, match="above zero"):
        stats.ratio([0.0], [1.0])


def test_minutes_are_told_apart_and_a_short_rest_is_left_out() -> None:
    second = [10.0] * 100  # ten milliseconds each
    slower = [20.0] * 50
    latency = second * 60 + slower * 60 + slower * 10
    assert stats.per_minute(latency) == (10.0, 20.0)
    assert stats.per_minute(second * 3) == (10.0,)
    assert stats.per_minute(second * 60 + slower * 40) == (10.0, 20.0), "more than half a minute counts"
    assert stats.per_minute([]) == ()
    assert stats.per_minute([1.0] * 60 + [2.0] * 30, inferences=1000) == (1.0, 2.0), "each sample took a second or two"
