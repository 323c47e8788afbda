"""The history as text and as one HTML page: latency, size and accuracy of each file over the releases. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgekd.reporting.ledger import UNKNOWN, format_bytes, format_latency

from .changes import Change, changes
from .charts import over_releases
from .history import Entry
from .page import figure, page, section
from .stats import first_token_ms

__all__ = ["Series", "html", "lines", "series_of"]

WORSE_UP = {"latency": True, "first token": True, "size": True, "accuracy": False, "agreement": False}


@dataclass(frozen=True)
class Series:
    """One file of one model on one device, over time.

    Attributes:
        name: ``digits onnx w8a8 on host (…)``.
        target: Of the file.
        entries: Oldest first.
    """

    name: str
    target: str
    entries: tuple[Entry, ...]

    def values(self, metric: str) -> list[tuple[Entry, float]]:
        """Those entries that have the metric, in milliseconds, bytes or shares."""
        found = []
        for entry in self.entries:
            m = entry.measurement
            value = {
                "latency": entry.latency_ms,
                "first token": first_token_ms(m),
                "size": float(m.size_bytes) or None,
                "accuracy": m.accuracy,
                "agreement": m.teacher_agreement,
            }[metric]
            if value is not None:
                found.append((entry, value))
        return found

    def changes(self, metric: str) -> list[Change]:
        values = [value for _, value in self.values(metric)]
        return changes(values) if values and min(values) > 0 else []


def series_of(entries: Sequence[Entry]) -> list[Series]:
    """By model, target, precision and device, in the order in which they first came; imported ones by themselves."""
    grouped: dict[tuple[str, str, str, str], list[Entry]] = {}
    for entry in entries:
        m = entry.measurement
        where = f"{entry.device}, imported" if entry.how == "import" else entry.device
        grouped.setdefault((entry.model, m.target, m.precision, where), []).append(entry)
    return [
        Series(f"{model} {target} {precision}".strip() + f" on {where}", target, tuple(found))
        for (model, target, precision, where), found in grouped.items()
    ]


def lines(entries: Sequence[Entry]) -> list[str]:
    """For a terminal: each file's measurements, oldest first, then what changed."""
    told = []
    for series in series_of(entries):
        told.append(series.name)
        for entry in series.entries:
            m = entry.measurement
            accuracy = UNKNOWN if m.accuracy is None else f"{m.accuracy:.2%}"
            flags = f"  [{', '.join(m.flags)}]" if m.flags else ""
            told.append(
                f"  {entry.created:%Y-%m-%d %H:%M}  {entry.label:<14} {entry.how:<7} "
                f"{_speed(entry)}  {format_bytes(m.size_bytes)}  accuracy {accuracy}{flags}"
            )
        told += [f"  {sentence}" for sentence in _sentences(series)]
    return told or ["nothing has been measured yet; edgekd bench and edgekd compare write the history"]


def _speed(entry: Entry) -> str:
    """The median, or of a language model what its users wait for."""
    first = first_token_ms(entry.measurement)
    if first is None or not entry.latency_ms:
        return f"p50 {format_latency(entry.latency_ms)} ms"
    plan = entry.measurement.plan
    return (
        f"first token {format_latency(first)} ms (prompt of {plan.prompt_tokens}), "
        f"{format_latency(1e3 / entry.latency_ms)} tokens/s"
    )


def _sentences(series: Series) -> Iterator[str]:
    for metric, is_worse_up in WORSE_UP.items():
        entries = [entry for entry, _ in series.values(metric)]
        for change in series.changes(metric):
            word = "worse" if (change.share > 0) == is_worse_up else "better"
            yield (
                f"{metric} changed by {change.share:+.1%} ({word}) with {entries[change.index].label}, "
                f"{entries[change.index].created:%Y-%m-%d}, and stayed so"
            )


def html(entries: Sequence[Entry]) -> str:
    """One self-contained page: no script, nothing loaded from anywhere."""
    sections, verdicts = [], []
    for series in series_of(entries):
        figures = []
        for metric, unit, scale in (
            ("latency", "ms", 1.0),
            ("first token", "ms", 1.0),
            ("size", "kB", 1e3),
            ("accuracy", "%", 0.01),
        ):
            found = series.values(metric)
            if found:
                svg = over_releases(
                    [entry.label for entry, _ in found],
                    [value / scale for _, value in found],
                    metric,
                    unit,
                    series.target,
                    [change.index for change in series.changes(metric)],
                )
                figures.append(figure(svg, metric))
        sections.append(section(series.name, f'<div class="pictures">{"".join(figures)}</div>'))
        verdicts += [f"{series.name}: {sentence}" for sentence in _sentences(series)]
    verdicts = verdicts or ["No level has changed, as far as these measurements can tell."]
    return page("History", f"edgekd, {len(entries)} measurements", verdicts, sections)
