"""When a difference counts: two looks, three verdicts, a confirming second sitting. Pure; measured error rates and the
reasons: docs/gate.md.

A cell is one file with one metric. Each gives logarithms of ratios new / old, one for each pair of blocks; above zero
is worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from edgekd.types import JsonMixin

from .stats import Ratio, ratio_of_logs, signed_rank_p

__all__ = ["Decision", "Rule", "Verdict", "decide", "holm", "worst"]

Verdict: TypeAlias = Literal["pass", "regression", "inconclusive"]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Rule(JsonMixin):
    """What counts as a regression, and how sure one must be.

    Attributes:
        looks: Pairs at which the data are looked at; every look has its share of the error (Bonferroni).
        alpha: One-sided error of all looks together, for calling a change of exactly the margin a regression in the
            first sitting; a cell passes with the same certainty.
        confirm_pairs: Fresh pairs that must say so again before a regression is one; 0 for no second sitting.
        confirm_alpha: One-sided error of that sitting; with ``alpha`` it bounds false alarms at the margin itself by
            0.05 × 0.1 = 0.5 %. A file that is no slower is much further from one.
    """

    looks: tuple[int, ...] = (12, 24)
    alpha: float = 0.05
    confirm_pairs: int = 12
    confirm_alpha: float = 0.1

    @property
    def look_alpha(self) -> float:
        """One-sided error of one look."""
        return self.alpha / len(self.looks)

    @property
    def confidence(self) -> float:
        """Two-sided, of the intervals that are shown."""
        return 1 - 2 * self.look_alpha


@dataclass(frozen=True)
class Decision:
    """What became of one cell.

    Attributes:
        ratio: Of the first sitting, with the interval of its last look.
        again: Of the confirming sitting; None where there was none.
        why: One line where the verdict does not follow from the interval alone.
    """

    verdict: Verdict
    ratio: Ratio
    again: Ratio | None = None
    why: str = ""


@dataclass
class _Open:
    logs: np.ndarray
    verdict: Verdict | None = None


def decide(
    margins: Mapping[Name, Callable[[], float]],
    measure: Callable[[Collection[Name], int], Mapping[Name, np.ndarray]],
    rule: Rule,
    first: Mapping[Name, np.ndarray] | None = None,
    beside: int = 0,
) -> dict[Name, Decision]:
    """Measure until every cell is decided, the looks are used up, or the device gives no more.

    Args:
        margins: For each cell the largest ratio that is no regression; asked after each look, since an absolute floor
            is known only when the old file has been measured.
        measure: Runs so many further pairs for these cells; returns the logarithms, (pairs,), of each, or fewer when
            the device gives no more.
        first: What has been measured already.
        beside: Further cells of the same comparison, which are decided elsewhere: they count in Holm's correction.

    Returns:
        A decision for each cell. One that was not measured at all is missing.
    """
    cells = {name: _Open((first or {}).get(name, np.zeros(0))) for name in margins}
    for pairs in rule.looks:
        undecided = [name for name, cell in cells.items() if cell.verdict is None]
        if not undecided:
            break
        done = max(len(cells[name].logs) for name in undecided)
        for name, logs in measure(undecided, pairs - done).items():
            cells[name].logs = np.append(cells[name].logs, logs)
        looked = {name: cells[name] for name in undecided if len(cells[name].logs) == pairs}
        centers = {name: math.log(margins[name]()) for name in looked}
        p_worse = {name: signed_rank_p(cell.logs, centers[name]) for name, cell in looked.items()}
        worse = holm(p_worse, rule.look_alpha, len(cells) + beside)
        for name, cell in looked.items():
            if name in worse:
                cell.verdict = "regression"
            elif signed_rank_p(-cell.logs, -centers[name]) <= rule.look_alpha:
                cell.verdict = "pass"
    suspects = [name for name, cell in cells.items() if cell.verdict == "regression"]
    again = measure(suspects, rule.confirm_pairs) if suspects and rule.confirm_pairs else {}
    return {
        name: _decision(cell, again.get(name), margins[name], rule) for name, cell in cells.items() if len(cell.logs)
    }


def _decision(cell: _Open, again: np.ndarray | None, margin: Callable[[], float], rule: Rule) -> Decision:
    first = ratio_of_logs(cell.logs, rule.confidence)
    if cell.verdict == "pass":
        return Decision("pass", first)
    if cell.verdict is None:
        why = (
            "" if len(cell.logs) == rule.looks[-1] else f"only {len(cell.logs)} of {rule.looks[-1]} pairs were measured"
        )
        return Decision("inconclusive", first, why=why)
    if not rule.confirm_pairs:
        return Decision("regression", first)
    second = None if again is None or not len(again) else ratio_of_logs(again, 1 - 2 * rule.confirm_alpha)
    if again is None or len(again) < rule.confirm_pairs:
        return Decision("inconclusive", first, second, "a regression that could not be measured again")
    if signed_rank_p(again, math.log(margin())) > rule.confirm_alpha:
        return Decision("inconclusive", first, second, "a regression at first, which fresh pairs do not confirm")
    return Decision("regression", first, second)


def holm(p_values: Mapping[Name, float], alpha: float, family: int | None = None) -> set[Name]:
    """Those whose null hypothesis falls, with at most ``alpha`` for any false one among all (Holm 1979).

    Args:
        family: How many cells there are in all, where some were decided before.
    """
    count = family or len(p_values)
    fallen = set()
    for index, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > alpha / (count - index):
            break
        fallen.add(name)
    return fallen


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Of a whole comparison: a regression anywhere, else inconclusive if anything is, else pass."""
    order: Sequence[Verdict] = ("regression", "inconclusive", "pass")
    found = set(verdicts)
    return next((verdict for verdict in order if verdict in found), "inconclusive")
