"""Recall, precision and F1 of spam, arm by arm, from what `edgekd distill` saved; mean ± sd over the seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "runs" / "spam" / "students"


def spam_scores(classes: list[dict[str, int]]) -> dict[str, float]:
    """From the counts of the two classes, ham first."""
    ham, spam = classes
    hits, false_alarms = spam["correct"], ham["support"] - ham["correct"]
    return {
        "accuracy": (ham["correct"] + hits) / (ham["support"] + spam["support"]),
        "recall": hits / spam["support"],
        "precision": hits / max(1, hits + false_alarms),
        "F1": 2 * hits / (hits + false_alarms + spam["support"]),
    }


def main() -> None:
    """Print one line for each arm."""
    arms: dict[str, list[dict[str, float]]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        arms[result["arm"]].append(spam_scores(result["test"]["classes"]))
    if not arms:
        raise SystemExit(f"no results in {RESULTS}; edgekd distill makes them")
    for arm, runs in arms.items():
        columns = []
        for name in runs[0]:
            values = [100 * run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            columns.append(f"{name} {statistics.fmean(values):.2f}{spread}")
        print(f"{arm} ({len(runs)} seeds, test, %): " + ", ".join(columns))


if __name__ == "__main__":
    main()
