"""Statistics of measurements: pure functions from samples to numbers. Why these: docs/measuring.md.

The unit of replication is the block (one fresh process), not the inference: inferences of one process agree with each
other far better than processes do, so an interval or a test over pooled inferences claims too much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.measurement import Measurement
from edgekd.types import JsonMixin

__all__ = [
    "PERCENTILE_SAMPLES",
    "Ratio",
    "Summary",
    "block_medians",
    "first_token_medians",
    "first_token_ms",
    "latency_ms",
    "latency_ratio",
    "outliers",
    "per_minute",
    "percentile",
    "ratio",
    "ratio_of_logs",
    "signed_rank_cut",
    "signed_rank_p",
    "spread",
    "summarize",
]

PERCENTILE_SAMPLES = {50: 1, 90: 64, 95: 130, 99: 662}
"""Fewest samples by percentile: those of MLPerf LoadGen's early stopping at 99 % confidence. With fewer, the largest
samples decide, and the percentile is not reported."""

TUKEY_FENCE = 1.5  # interquartile ranges beyond the quartiles


@dataclass(frozen=True)
class Summary(JsonMixin):
    """What is reported of one measurement; all of it can be taken again from the raw samples.

    Attributes:
        p50_ms: Median of the block medians: the latency that is compared and shown.
        p90_ms, p95_ms, p99_ms: Over the samples of all blocks; None with too few (``PERCENTILE_SAMPLES``).
        spread: Between the blocks: see ``spread``; None with one block.
        runtime_load_ms, model_load_ms, first_inference_ms: Median over the blocks.
        warm_load_ms: The same, of loading the file again; None where no block did.
        peak_memory_bytes: Largest of the blocks; None when unreadable.
        samples: All timed samples.
        outliers: Those beyond Tukey's fences of their own block; counted, never dropped.
        blocks: How many fresh processes.
        first_token_ms: Of a language model with caches: median of the block medians.
        tokens_per_second: Of such: those after the first of an answer, 1000 / ``p50_ms``.
    """

    p50_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    spread: float | None
    runtime_load_ms: float
    model_load_ms: float
    first_inference_ms: float
    peak_memory_bytes: int | None
    samples: int
    outliers: int
    blocks: int
    warm_load_ms: float | None = None
    first_token_ms: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Ratio(JsonMixin):
    """One latency as a multiple of another.

    Attributes:
        estimate: Above 1 when the second is slower.
        low, high: Ends of the interval; None with too few pairs for one.
        confidence: Of the interval, two-sided.
        pairs: How many.
    """

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    pairs: int


def percentile(samples: Sequence[float], percent: int) -> float | None:
    """Smallest sample with at least ``percent`` of all samples at or below it; the median for 50.

    Args:
        percent: 50, 90, 95 or 99.

    Returns:
        None when there are fewer samples than the percentile needs.

    Raises:
        KeyError: Another percentile.
    """
    count = len(samples)
    if count < PERCENTILE_SAMPLES[percent]:
        return None
    if percent == 50:
        return float(np.median(samples))
    return float(np.sort(samples)[-(-count * percent // 100) - 1])  # integers: 0.9 * 70 is more than 63 in floats


def block_medians(measurement: Measurement) -> tuple[float, ...]:
    """Median latency of each block in milliseconds, in the order they ran."""
    return tuple(float(np.median(block.latency_ms)) for block in measurement.blocks)


def latency_ms(measurement: Measurement) -> float | None:
    """Median of the block medians in milliseconds; None when nothing was measured."""
    medians = block_medians(measurement)
    return float(np.median(medians)) if medians else None


def first_token_medians(measurement: Measurement) -> tuple[float, ...]:
    """The same, of the time to an answer's first token; empty for what is no language model with caches."""
    return tuple(float(np.median(block.first_token_ms)) for block in measurement.blocks if block.first_token_ms)


def first_token_ms(measurement: Measurement) -> float | None:
    """Median of the block medians in milliseconds; None where no answers were timed."""
    medians = first_token_medians(measurement)
    return float(np.median(medians)) if medians else None


def spread(medians: Sequence[float]) -> float | None:
    """Largest minus smallest block median, as a share of their median; None with one block.

    A difference between two artifacts that is smaller than this is not one.
    """
    if len(medians) < 2:
        return None
    return (max(medians) - min(medians)) / float(np.median(medians))


def per_minute(latency_ms: Sequence[float], inferences: int = 1) -> tuple[float, ...]:
    """Median of each minute of inferences without a pause, in milliseconds, in order: what a warm device keeps up.

    A last part shorter than half a minute is left out, unless there is no other.

    Args:
        inferences: Behind each sample, which is their mean.
    """
    samples = np.asarray(latency_ms, dtype=float)
    minute_ms = 60_000.0 / inferences
    minutes = np.floor((np.cumsum(samples) - samples) / minute_ms).astype(int)
    found = [samples[minutes == minute] for minute in range(int(minutes[-1]) + 1)] if len(samples) else []
    if len(found) > 1 and found[-1].sum() < minute_ms / 2:
        found.pop()
    return tuple(float(np.median(part)) for part in found if len(part))


def outliers(samples: Sequence[float]) -> int:
    """How many lie more than 1.5 interquartile ranges beyond the quartiles (Tukey 1977)."""
    values = np.asarray(samples, dtype=float)
    first, third = np.quantile(values, [0.25, 0.75])
    reach = TUKEY_FENCE * (third - first)
    return int(np.sum((values < first - reach) | (values > third + reach)))


def summarize(measurement: Measurement) -> Summary | None:
    """All statistics of a measurement; None when it was not run."""
    blocks = measurement.blocks
    p50 = latency_ms(measurement)
    if p50 is None:
        return None
    samples = [value for block in blocks for value in block.latency_ms]
    warm = [block.warm_load_ms for block in blocks if block.warm_load_ms is not None]
    peaks = [block.peak_memory_bytes for block in blocks if block.peak_memory_bytes is not None]
    return Summary(
        p50_ms=p50,
        p90_ms=percentile(samples, 90),
        p95_ms=percentile(samples, 95),
        p99_ms=percentile(samples, 99),
        spread=spread(block_medians(measurement)),
        runtime_load_ms=float(np.median([block.runtime_load_ms for block in blocks])),
        model_load_ms=float(np.median([block.model_load_ms for block in blocks])),
        first_inference_ms=float(np.median([block.first_inference_ms for block in blocks])),
        peak_memory_bytes=max(peaks, default=None),
        samples=len(samples),
        outliers=sum(outliers(block.latency_ms) for block in blocks),
        blocks=len(blocks),
        warm_load_ms=float(np.median(warm)) if warm else None,
        first_token_ms=first_token_ms(measurement),
        tokens_per_second=None if first_token_ms(measurement) is None else 1e3 / p50,
    )


def ratio(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Ratio:
    """How many times as slow the second is, over pairs of blocks that ran side by side.

    The Hodges–Lehmann estimate of the logarithm of the ratio (median of the Walsh averages) with the exact interval
    of Wilcoxon's signed-rank test.

    Args:
        first, second: Block medians, pair by pair, from one interleaved session.
        confidence: Of the two-sided interval.

    Raises:
        ValueError: The lengths differ, or there is no pair, or a latency is not above zero.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"a ratio needs pairs; there are {len(first)} and {len(second)} blocks")
    if min(*first, *second) <= 0:
        raise ValueError("a latency is above zero")
    logs = np.log(np.asarray(second, dtype=float) / np.asarray(first, dtype=float))
    return ratio_of_logs(logs, confidence)


def ratio_of_logs(logs: np.ndarray, confidence: float = 0.95) -> Ratio:
    """The same as ``ratio``, from the logarithms of second over first, (pairs,)."""
    rows, columns = _upper(len(logs))
    walsh = np.sort((logs[rows] + logs[columns]) / 2)
    cut = signed_rank_cut(len(logs), 1 - confidence)
    low, high = (None, None) if cut == 0 else (math.exp(walsh[cut - 1]), math.exp(walsh[-cut]))
    return Ratio(math.exp(float(np.median(walsh))), low, high, confidence, len(logs))


def latency_ratio(parent: Measurement, child: Measurement) -> Ratio:
    """How many times as slow the child is, from one interleaved session of both.

    Raises:
        ValueError: They have not the same number of blocks, or none.
    """
    return ratio(block_medians(parent), block_medians(child))


def signed_rank_cut(pairs: int, alpha: float) -> int:
    """How many values T of the signed-rank statistic have P(T⁺ ≤ T) ≤ alpha / 2; 0 when there is no such interval.

    The interval then goes from the cut-th smallest to the cut-th largest Walsh average.
    """
    cut, tail = 0, 0
    for count in _signed_rank_ways(pairs):
        tail += count
        if tail > alpha / 2 * 2**pairs + 1e-9:
            break
        cut += 1
    return cut


def signed_rank_p(logs: np.ndarray, center: float) -> float:
    """How likely values so far above ``center`` are when their centre is not above it: exact, one-sided.

    ``p ≤ α`` exactly where the lower end of the interval of confidence ``1 - 2 α`` lies above ``center``: both count
    Walsh averages, so ties need no care, and a tie with the centre counts against the claim.

    Args:
        logs: (pairs,).
    """
    rows, columns = _upper(len(logs))
    not_above = int(np.sum(logs[rows] + logs[columns] <= 2 * center))
    return sum(_signed_rank_ways(len(logs))[: not_above + 1]) / 2 ** len(logs)


@functools.lru_cache(maxsize=64)
def _signed_rank_ways(pairs: int) -> list[int]:
    """How many subsets of the ranks 1 … pairs have the sum 0, 1, 2 …"""
    ways = [1]
    for rank in range(1, pairs + 1):
        longer = ways + [0] * rank
        for total, count in enumerate(ways):
            longer[total + rank] += count
        ways = longer
    return ways


@functools.lru_cache(maxsize=64)
def _upper(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(pairs)
