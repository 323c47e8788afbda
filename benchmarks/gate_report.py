"""A comparison as a table for a terminal or a pull request, as JUnit XML, as annotations of GitHub Actions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from edgekd.reporting.ledger import UNKNOWN, format_bytes, format_latency

from .cells import Cell, Comparison
from .rule import Verdict

__all__ = ["github", "headline", "junit", "lines", "markdown"]

WORDS: dict[Verdict, str] = {"pass": "pass", "regression": "**regression**", "inconclusive": "inconclusive"}
COLUMNS = ("file", "metric", "old", "new", "change", "interval", "may be", "verdict")


def headline(comparison: Comparison) -> str:
    """The verdict, and what it rests on, in one sentence."""
    bad = [cell for cell in comparison.cells if cell.verdict == comparison.verdict]
    where = ", ".join(dict.fromkeys(f"{cell.label} {_metric(cell)}" for cell in bad))
    told = "nothing is worse than it may be" if comparison.verdict == "pass" else where
    return f"{comparison.verdict}: {told}, on {comparison.device}"


def lines(comparison: Comparison) -> list[str]:
    """For a terminal: a line a cell, then what a reader should know."""
    rows = [COLUMNS, *(_row(cell) for cell in comparison.cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    table = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*table, *_footnotes(comparison), headline(comparison)]


def markdown(comparison: Comparison) -> str:
    """For a pull request."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [(*_row(cell)[:-1], WORDS[cell.verdict]) for cell in comparison.cells]
    table = ["| " + " | ".join(word.replace("|", "\\|") for word in row) + " |" for row in rows]
    notes = [f"- {line}" for line in _footnotes(comparison)]
    return "\n".join([f"### edgekd compare: {headline(comparison)}", "", *table, "", *notes, ""])


def junit(comparison: Comparison) -> str:
    """JUnit XML: a regression is a failure; what is inconclusive is skipped, so that no viewer counts it as passed."""
    bad = [cell for cell in comparison.cells if cell.verdict == "regression"]
    open_cells = [cell for cell in comparison.cells if cell.verdict == "inconclusive"]
    suite = ElementTree.Element(
        "testsuite",
        name=f"edgekd compare on {comparison.device}",
        tests=str(len(comparison.cells)),
        failures=str(len(bad)),
        errors="0",
        skipped=str(len(open_cells)),
        timestamp=comparison.created,
    )
    for cell in comparison.cells:
        case = ElementTree.SubElement(suite, "testcase", classname=f"edgekd.{cell.label}", name=_metric(cell))
        if cell.verdict == "regression":
            ElementTree.SubElement(case, "failure", type="regression", message=_sentence(cell))
        elif cell.verdict == "inconclusive":
            ElementTree.SubElement(case, "skipped", message=f"inconclusive: {_sentence(cell)}")
    ElementTree.SubElement(suite, "system-out").text = "\n".join(lines(comparison))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def github(comparison: Comparison) -> list[str]:
    """Workflow commands of GitHub Actions: https://docs.github.com/actions/reference/workflow-commands-for-github-actions"""
    found = []
    for cell in comparison.cells:
        if cell.verdict != "pass":
            level = "error" if cell.verdict == "regression" else "warning"
            title = _escaped(f"{cell.label} {_metric(cell)}", ":,")
            found.append(f"::{level} title={title}::{_escaped(f'{cell.verdict}: {_sentence(cell)}', '')}")
    return found


def _escaped(text: str, further: str) -> str:
    for letter in "%\r\n" + further:
        text = text.replace(letter, f"%{ord(letter):02X}")
    return text


def _metric(cell: Cell) -> str:
    return cell.metric.replace("_", " ")


def _row(cell: Cell) -> tuple[str, ...]:
    interval = UNKNOWN if cell.low is None or cell.high is None else f"{_share(cell.low)} to {_share(cell.high)}"
    return (
        cell.label,
        _metric(cell),
        _value(cell, cell.old),
        _value(cell, cell.new),
        _share(cell.change),
        interval,
        UNKNOWN if cell.margin is None else _share(cell.margin),
        cell.verdict,
    )


def _sentence(cell: Cell) -> str:
    _, _, old, new, change, interval, margin, _ = _row(cell)
    parts = [f"{old} → {new}"] if cell.old is not None else []
    if cell.change is not None:
        shown = change if interval == UNKNOWN else f"{change} ({interval})"
        parts.append(f"{shown}, may be {margin}")
    if cell.again is not None:
        parts.append(f"again {_share(cell.again)}")
    return "; ".join([*parts, cell.why] if cell.why else parts)


def _value(cell: Cell, value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if cell.unit == "ms":
        return f"{format_latency(value)} ms"
    if cell.unit == "bytes":
        return format_bytes(round(value))
    return f"{value:.2%}" if cell.unit == "share" else f"{value:g}"


def _share(change: float | None) -> str:
    return UNKNOWN if change is None else f"{change:+.1%}"


def _footnotes(comparison: Comparison) -> Sequence[str]:
    told = [f"{cell.label} {_metric(cell)}: {cell.why}" for cell in comparison.cells if cell.why]
    again = [
        f"{cell.label} {_metric(cell)}: measured again, {_share(cell.again)}"
        for cell in comparison.cells
        if cell.again is not None
    ]
    void = [
        f"{comparison.void.count(why)} blocks were void and measured again: {why}"
        for why in sorted(set(comparison.void))
    ]
    pairs = max((cell.pairs for cell in comparison.cells if cell.unit == "ms"), default=0)
    how = (
        f"{pairs} pairs of fresh processes, seed {comparison.seed}; intervals of {comparison.rule.confidence:.1%}; "
        f"a change beyond 'may be' must show again in {comparison.rule.confirm_pairs} fresh pairs"
    )
    return [*told, *again, *void, *comparison.notes, how]
