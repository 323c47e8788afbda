"""The tables of docs/results.md, from benchmarks/results: what was measured, and what was not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgekd.distillation.arms import CONTROL
from edgekd.store import read_json
from edgekd.types import Json

from .distill import NOT_RUN

__all__ = ["results_tables"]


def results_tables(folder: Path) -> str:
    """Every task arm by arm, the bar, torchdistill beside it, and what is not run.

    Args:
        folder: Of the results.
    """
    tasks: dict[str, Json] = read_json(folder / "distill.json")["tasks"]
    lines = [
        "| task | teacher | student | arm | test accuracy | of the teacher's | over the control | processor |",
        "|---|---|---|---|---|---|---|---|",
        *(line for name, task in tasks.items() for line in _rows(name, task)),
        "",
        "| task | parameters | keeps | the control keeps | bar |",
        "|---|---|---|---|---|",
        *(_bar(name, task) for name, task in tasks.items() if "bar" in task),
        "",
        "| language model | arm | perplexity | next tokens right | the teacher's own |",
        "|---|---|---|---|---|",
        *_language("**brown**: SmolLM2 to a Llama of four layers", read_json(folder / "brown.json")),
        "",
    ]
    return "\n".join([*lines, *_not_run(tasks)])


def _rows(name: str, task: Json) -> Iterator[str]:
    teacher = task["teacher"]["accuracy"]
    size = f"{task['student']['parameters']:,} parameters, {task['student']['share']:.1%}"
    first = f"**{name}**: {task['said']} | {teacher:.2%} | {size}"
    for arm, seeds in task["arms"].items():
        if not seeds:
            continue
        values = [seed["test"] for seed in seeds.values()]
        gain = (task.get("gains") or {}).get(arm)
        best = " (best)" if arm == task.get("best") and arm != CONTROL else ""
        hours = [spent["cpu_hours"] for what, spent in _trained(task, arm).items() if "seen" not in spent]
        yield (
            f"| {first} | {arm}{best} | {_spread(values)} | {statistics.fmean(values) / teacher:.1%} | "
            f"{_gain(gain)} | {_minutes(hours)} |"
        )
        first = " | | "
    peer = task.get("torchdistill")
    if peer:
        runs = list(peer["seeds"].values())
        epochs = "/".join(dict.fromkeys(str(run["epochs"]) for run in runs))
        told = f"{epochs} epoch" if epochs == "1" else f"{epochs} epochs"
        values = [run["test"] for run in runs]
        yield (
            f"|  | | | torchdistill {peer['version']} KD, {told} | {_spread(values)} | "
            f"{statistics.fmean(values) / teacher:.1%} | | {_minutes([run['cpu_hours'] for run in runs])} |"
        )


def _trained(task: Json, arm: str) -> Mapping[str, Json]:
    return {what: spent for what, spent in task.get("hours", {}).items() if what.startswith(f"{arm}, seed ")}


def _bar(name: str, task: Json) -> str:
    bar = task["bar"]
    verdict = {True: "met", False: "**missed**", None: "–"}[bar["met"]]
    return (
        f"| {name} | {task['student']['share']:.1%} | {bar['kept']:.1%} | {bar['control_kept']:.1%} | "
        f"{verdict}: {bar['reason']} |"
    )


def _not_run(tasks: Mapping[str, Json]) -> Iterator[str]:
    missing = {name: reason for name, reason in NOT_RUN.items() if name not in tasks}
    for name, task in tasks.items():
        if "bar" not in task:
            missing[name] = "no other arm than the control is trained yet"
    if beside := [name for name in tasks if "torchdistill" not in tasks[name]]:
        missing["torchdistill"] = f"not beside {', '.join(beside)}"
    if missing:
        yield "Not run:"
        yield ""
        yield from (f"- **{name}**: {reason}." for name, reason in missing.items())


def _language(said: str, report: Json) -> Iterator[str]:
    """A report of ``edgekd report`` on a language model, by arm."""
    rows = report["ledger"]["rows"]
    teacher = next(row for row in rows if row["stage"] == "teacher")
    size = next(row for row in rows if row["is_shipped"])["parameters"]
    share = f"{size / teacher['parameters']:.1%} of {teacher['parameters']:,} parameters"
    yield f"| {said}, {share} | teacher | {teacher['perplexity']:.1f} | {teacher['accuracy']:.2%} | |"
    arms: dict[str, list[Json]] = {}
    for one in report["arms"]:
        arms.setdefault(one["arm"], []).append(one["test"])
    for arm, tests in arms.items():
        perplexities = [test["perplexity"] for test in tests]
        spread = f" ± {statistics.stdev(perplexities):.1f}, {len(tests)} seeds" if len(tests) > 1 else ", one seed"
        right, alike = ([test[key] for test in tests] for key in ("accuracy", "teacher_agreement"))
        told = f"{statistics.fmean(perplexities):.1f}{spread}"
        yield f"| | {arm} | {told} | {statistics.fmean(right):.2%} | {statistics.fmean(alike):.2%} |"


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0] * 100:.2f} %, one seed"
    return f"{statistics.fmean(values) * 100:.2f} ± {statistics.stdev(values) * 100:.2f} %, {len(values)} seeds"


def _gain(gain: Json | None) -> str:
    if gain is None:
        return ""
    error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.2f}"
    return f"{gain['points']:+.2f}{error} points"


def _minutes(hours: list[float]) -> str:
    if not hours:
        return "not kept"
    minutes = statistics.fmean(hours) * 60
    return f"{minutes:.1f} min a seed" if minutes >= 1 else f"{minutes * 60:.0f} s a seed"
