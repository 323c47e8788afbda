"""The bar of the benchmark of distillation, and what is told of time."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.benchmarks.distill import Clock, judged
from edgekd.benchmarks.distill_page import results_tables
from edgekd.console import SilentProgress
from edgekd.store import write_json
from edgekd.types import Json

GAIN: Json = {"points": 0.5, "standard_error": 0.2}


def bar(best: float, control: float, share: float = 0.15, gain: Json | None = GAIN) -> Json:
    return judged(0.9, share, {"control": [control] * 3, "kd": [best] * 3}, "kd", gain)


def test_a_student_that_keeps_99_percent_and_beats_a_weaker_control_meets_the_bar() -> None:
    found = bar(0.895, 0.888)

    assert found["met"] is True
    assert found["kept"] == pytest.approx(0.895 / 0.9)
    assert found["reason"] == "2.5 standard errors above the control"


@pytest.mark.parametrize(
    ("best", "control", "gain", "met"),
    [
        (0.890, 0.880, GAIN, False),  # keeps 98.9 %
        (0.895, 0.888, {"points": 0.5, "standard_error": 0.3}, False),  # 1.7 standard errors
        (0.895, 0.893, {"points": 0.0, "standard_error": 0.3}, True),  # the control keeps 99 % as well
        (0.895, 0.888, {"points": 0.5, "standard_error": None}, None),  # one seed tells nothing
    ],
)
def test_the_bar_asks_for_both_halves(best: float, control: float, gain: Json, met: bool | None) -> None:
    assert bar(best, control, gain=gain)["met"] is met


@pytest.mark.parametrize("share", [0.02, 0.25])
def test_the_bar_says_nothing_of_other_sizes(share: float) -> None:
    assert bar(0.895, 0.888, share)["met"] is None


def test_what_was_done_before_a_stop_is_told() -> None:
    written: list[Json] = []
    clock = Clock(SilentProgress(), lambda spent: written.append(dict(spent)))

    clock.start("control, seed 0", 10)
    clock.finish()
    clock.start("kd, seed 0", 10, done=4)
    clock.finish()

    assert [list(spent) for spent in written] == [[], ["control, seed 0"]]
    assert "seen" not in clock.spent["control, seed 0"]
    assert clock.spent["kd, seed 0"]["seen"] == 0.6


def test_short_trainings_are_told_in_seconds_and_where_torchdistill_was_not_run_is_said(tmp_path: Path) -> None:
    task: Json = {
        "said": "a task",
        "teacher": {"accuracy": 0.9},
        "student": {"parameters": 10, "share": 0.15},
        "arms": {"control": {"0": {"test": 0.88}}, "kd": {"0": {"test": 0.89}}},
        "bar": bar(0.895, 0.888),
    }
    hours = {"control, seed 0": {"cpu_hours": 0.0005}, "kd, seed 0": {"cpu_hours": 0.05}}
    beside: Json = {"version": "1", "seeds": {"0": {"test": 0.88, "epochs": 2, "cpu_hours": 0.1}}}
    tasks = {"short": {**task, "hours": hours, "torchdistill": beside}, "other": task}
    write_json(tmp_path / "distill.json", {"tasks": tasks})

    lines = results_tables(tmp_path).splitlines()

    assert any("control" in line and "2 s a seed" in line for line in lines)
    assert any("| kd |" in line and "3.0 min a seed" in line for line in lines)
    assert "- **torchdistill**: not beside other." in lines
