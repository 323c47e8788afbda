"""The rule on data whose truth is known: when it looks, what it concludes, and that it errs as rarely as it says."""

from collections.abc import Collection

import numpy as np
import pytest

from edgekd.benchmarks.rule import Rule, decide, holm, worst
from edgekd.benchmarks.stats import ratio_of_logs, signed_rank_p

RULE = Rule(looks=(12, 24), alpha=0.05, confirm_pairs=12, confirm_alpha=0.1)


class Source:
    """Pairs of a file that is slower by a share, with noise; it remembers what it was asked for."""

    def __init__(self, slower: float, noise: float, seed: int = 0, fresh: float | None = None, most: int = 99) -> None:
        self.random, self.noise, self.most = np.random.default_rng(seed), noise, most
        self.slower, self.fresh, self.asked = slower, fresh, list[int]()

    def __call__(self, names: Collection[str], count: int) -> dict[str, np.ndarray]:
        count = min(count, self.most - sum(self.asked))
        self.asked.append(count)
        return {name: np.log1p(self.slower) + self.noise * self.random.standard_normal(count) for name in names}


def verdict(source: Source, margin: float = 1.03) -> str:
    return decide({"latency": lambda: margin}, source, RULE)["latency"].verdict


def test_a_file_that_is_no_slower_passes_at_the_first_look() -> None:
    source = Source(0.0, 0.01)
    assert verdict(source) == "pass"
    assert source.asked == [12]


def test_a_file_that_is_much_slower_is_measured_again_before_it_is_called_so() -> None:
    source = Source(0.08, 0.01)
    assert verdict(source) == "regression"
    assert source.asked == [12, 12]


def test_a_change_of_the_margin_itself_is_looked_at_twice_and_stays_open() -> None:
    source = Source(0.03, 0.01)
    assert verdict(source) == "inconclusive"
    assert source.asked == [12, 12]


def test_a_regression_that_fresh_pairs_do_not_show_is_inconclusive() -> None:
    class Calming(Source):
        def __call__(self, names: Collection[str], count: int) -> dict[str, np.ndarray]:
            found = super().__call__(names, count)
            self.slower = 0.0
            return found

    decision = decide({"latency": lambda: 1.03}, Calming(0.08, 0.01), RULE)["latency"]
    assert decision.verdict == "inconclusive"
    assert decision.why == "a regression at first, which fresh pairs do not confirm"
    assert decision.again is not None
    assert decision.again.estimate < 1.02


@pytest.mark.parametrize("most", [7, 12, 20])
def test_a_device_that_breaks_off_gives_no_verdict_on_a_slower_file(most: int) -> None:
    decision = decide({"latency": lambda: 1.03}, Source(0.08, 0.01, most=most), RULE)["latency"]
    assert decision.verdict == "inconclusive"
    assert "only 7 of 24 pairs" in decision.why if most == 7 else "could not be measured again" in decision.why


def test_the_rule_errs_as_rarely_as_it_says_at_the_margin_itself() -> None:
    found = [verdict(Source(0.03, 0.02, seed)) for seed in range(400)]
    assert found.count("regression") <= 0.01 * 400
    assert found.count("pass") <= 0.08 * 400, "at most 5 % in truth"


def test_the_p_value_falls_where_the_interval_leaves_the_margin() -> None:
    random = np.random.default_rng(0)
    for pairs in (6, 9, 12, 24):
        for _ in range(50):
            logs = random.normal(0.02, 0.02, pairs)
            low = ratio_of_logs(logs, confidence=0.95).low
            assert low is not None
            assert (signed_rank_p(logs, 0.01) <= 0.025) == (np.log(low) > 0.01)


def test_the_p_value_is_that_of_scipy() -> None:
    from scipy.stats import wilcoxon

    logs = np.random.default_rng(1).normal(0.01, 0.02, 15)
    assert signed_rank_p(logs, 0.0) == pytest.approx(wilcoxon(logs, alternative="greater", method="exact").pvalue)


def test_holm_refuses_what_bonferroni_refuses_and_what_follows_from_it() -> None:
    assert holm({"a": 0.01, "b": 0.02, "c": 0.04}, 0.05) == {"a", "b", "c"}
    assert holm({"a": 0.02, "b": 0.02, "c": 0.04}, 0.05) == set()
    assert holm({"a": 0.001, "b": 0.04}, 0.05, family=10) == {"a"}
    assert holm({}, 0.05) == set()


def test_many_cells_raise_no_more_false_alarms_than_one() -> None:
    names = [f"cell {index}" for index in range(20)]
    alarms = 0
    for seed in range(100):
        random = np.random.default_rng(seed)

        def measure(asked: Collection[str], count: int, random: np.random.Generator = random) -> dict[str, np.ndarray]:
            return {name: np.log(1.03) + 0.02 * random.standard_normal(count) for name in asked}

        found = decide({name: lambda: 1.03 for name in names}, measure, Rule((12,)))
        alarms += any(decision.again is not None for decision in found.values())
    assert alarms <= 12, "5 % are promised, without the confirming sitting"


def test_the_worst_cell_decides_and_none_is_no_pass() -> None:
    assert worst(["pass", "inconclusive", "regression"]) == "regression"
    assert worst(["pass", "inconclusive"]) == "inconclusive"
    assert worst(["pass"]) == "pass"
    assert worst([]) == "inconclusive"
