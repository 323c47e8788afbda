"""What the gate promises, held to recorded blocks of a real file on a busy machine."""

from pathlib import Path

import numpy as np
import pytest

from edgekd.benchmarks.gate_error_rates import load_recording, logs_of, peers, recorded, simulate
from edgekd.benchmarks.rule import Rule
from edgekd.measurement import Block

RECORDING = Path(__file__).parents[1] / "benchmarks" / "results" / "gate_busy.json"
TRIALS = 400

pytestmark = pytest.mark.skipif(not RECORDING.is_file(), reason="only in a checkout")


@pytest.fixture(scope="module")
def logs() -> np.ndarray:
    found = logs_of(load_recording(RECORDING), "turns", "p10")
    assert len(found) >= 100
    return found


def test_a_file_that_is_no_slower_raises_no_alarm(logs: np.ndarray) -> None:
    found = simulate(logs, 0.0, Rule(), TRIALS)
    assert found["regression"] <= 0.01
    assert found["pass"] >= 0.95
    assert found["pairs"] < 15


def test_a_file_that_is_slower_by_just_the_margin_raises_hardly_any(logs: np.ndarray) -> None:
    assert simulate(logs, 0.03, Rule(), TRIALS)["regression"] <= 0.01


def test_five_percent_are_found_in_nine_of_ten_comparisons(logs: np.ndarray) -> None:
    found = simulate(logs, 0.05, Rule(), TRIALS)
    assert found["regression"] >= 0.90
    assert found["pass"] == 0.0


def test_eight_percent_are_found_in_ninety_nine_of_a_hundred(logs: np.ndarray) -> None:
    assert simulate(logs, 0.08, Rule(), TRIALS)["regression"] >= 0.99


def test_without_turns_the_same_rule_finds_far_less() -> None:
    alone = logs_of(load_recording(RECORDING), "alone", "p50")
    assert simulate(alone, 0.05, Rule(), TRIALS)["regression"] < 0.6


def test_plain_thresholds_cry_wolf_on_the_same_blocks() -> None:
    found = peers(load_recording(RECORDING), 0.0, TRIALS)
    assert found["pytest-benchmark mean 5 %"] > 0.2
    assert found["mean 3 %"] > 0.2
    assert found["asv factor 1.1"] > 0.01


def test_a_recording_keeps_what_rules_look_at() -> None:
    samples = np.random.default_rng(0).uniform(1.0, 2.0, 300)
    block = Block(1, 1, 1, (), tuple(samples), None, True)
    content = recorded([{"turns": (block, block), "alone": (block, block)}] * 3, {"model": "m"})
    assert np.shape(content["turns/p10"]) == (3, 2)
    assert np.shape(content["alone/samples"]) == (3, 2, 10)
    assert content["turns/p50"][0][0] == pytest.approx(np.median(samples), rel=1e-4)
    assert np.mean(content["alone/samples"][0][0]) == pytest.approx(samples.mean(), rel=0.1)
