"""The tables of docs/results.md, from benchmarks/results: what was measured, and what was not."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgekd.distillation.arms import CONTROL
from edgekd.store import read_json
from edgekd.types import Json

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
        *(line for name, task in tasks.items() if not _is_language_model(task) for line in _rows(name, task)),
        "",
        "| task | parameters | keeps | the control keeps | bar |",
        "|---|---|---|---|---|",
        *(_bar(name, task) for name, task in tasks.items() if "bar" in task),
        "",
        "| language model | arm | perplexity | of the control's | next tokens right | the teacher's own | processor |",
        "|---|---|---|---|---|---|---|",
        *(line for name, task in tasks.items() if _is_language_model(task) for line in _language(name, task)),
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
        yield (
            f"| {first} | {arm}{best} | {_percent(values)} | {statistics.fmean(values) / teacher:.1%} | "
            f"{_gain(gain)} | {_minutes(_kept_hours(task, arm))} |"
        )
        first = " | | "
    if peer := task.get("torchdistill"):
        runs = list(peer["seeds"].values())
        values = [run["test"] for run in runs]
        yield (
            f"|  | | | {_peer(peer)} | {_percent(values)} | "
            f"{statistics.fmean(values) / teacher:.1%} | | {_minutes([run['cpu_hours'] for run in runs])} |"
        )


def _kept_hours(task: Json, arm: str) -> list[float]:
    """Of the processor, for each student whose whole training was timed."""
    trained = [spent for what, spent in task.get("hours", {}).items() if what.startswith(f"{arm}, seed ")]
    return [spent["cpu_hours"] for spent in trained if "seen" not in spent]


def _peer(peer: Json) -> str:
    epochs = "/".join(dict.fromkeys(str(run["epochs"]) for run in peer["seeds"].values()))
    return f"torchdistill {peer['version']} KD, {epochs} {'epoch' if epochs == '1' else 'epochs'}"


def _bar(name: str, task: Json) -> str:
    bar = task["bar"]
    verdict = {True: "met", False: "**missed**", None: "–"}[bar["met"]]
    return (
        f"| {name} | {task['student']['share']:.1%} | {bar['kept']:.1%} | {bar['control_kept']:.1%} | "
        f"{verdict}: {bar['reason']} |"
    )


def _not_run(tasks: Mapping[str, Json]) -> Iterator[str]:
    alone = "no other arm than the control is trained yet"
    missing = {name: alone for name, task in tasks.items() if "bar" not in task}
    if beside := [name for name in tasks if "torchdistill" not in tasks[name]]:
        missing["torchdistill"] = f"not beside {', '.join(beside)}"
    if missing:
        yield "Not run:"
        yield ""
        yield from (f"- **{name}**: {reason}." for name, reason in missing.items())


def _is_language_model(task: Json) -> bool:
    return "perplexity" in task["teacher"]


def _language(name: str, task: Json) -> Iterator[str]:
    teacher, student = task["teacher"], task["student"]
    first = f"**{name}**: {task['said']}, {student['share']:.1%} of {teacher['parameters']:,} parameters"
    yield f"| {first} | teacher | {teacher['perplexity']:.1f} | | {teacher['accuracy']:.2%} | | |"
    for arm, seeds in task["arms"].items():
        if seeds:
            best = " (best)" if arm == task.get("best") and arm != CONTROL else ""
            hours = _kept_hours(task, arm)
            yield _language_row(f"{arm}{best}", list(seeds.values()), (task.get("gains") or {}).get(arm), hours)
    if peer := task.get("torchdistill"):
        runs = list(peer["seeds"].values())
        yield _language_row(_peer(peer), runs, None, [run["cpu_hours"] for run in runs])


def _language_row(arm: str, tests: list[Json], gain: Json | None, hours: list[float]) -> str:
    perplexities = [test["perplexity"] for test in tests]
    right, alike = (statistics.fmean(test[key] for test in tests) for key in ("test", "teacher_agreement"))
    return f"| | {arm} | {_spread(perplexities, 1)} | {_ratio(gain)} | {right:.2%} | {alike:.2%} | {_minutes(hours)} |"


def _ratio(gain: Json | None) -> str:
    if gain is None:
        return ""
    interval = "" if gain["low"] is None else f" ({gain['low']:.3f} to {gain['high']:.3f})"
    return f"{gain['ratio']:.3f}×{interval}"


def _spread(values: list[float], digits: int = 2, unit: str = "") -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean}{unit}, one seed"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}{unit}, {len(values)} seeds"


def _percent(shares: list[float]) -> str:
    return _spread([share * 100 for share in shares], unit=" %")


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
