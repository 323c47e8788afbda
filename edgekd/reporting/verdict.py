"""Did the teacher help, and what did the student inherit: the arms over their seeds, in numbers and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.distillation.arms import CONTROL
from edgekd.distillation.distill import STARTED_FROM, ArmResult
from edgekd.metrics import Quality
from edgekd.reporting.answers import Answers
from edgekd.reporting.ledger import ArmRow, Gain
from edgekd.reporting.pairing import FEWEST_SEEDS, Paired, paired, paired_means
from edgekd.types import JsonMixin

__all__ = [
    "Ratio",
    "arm_rows",
    "gain_sentence",
    "inheritance_sentence",
    "kept_sentence",
    "perplexity_ratio",
    "perplexity_sentence",
    "start_sentences",
    "told",
    "untold",
]

FEWEST_MISTAKES = 20
"""Of fewer, the share that is repeated moves by more than 5 points with a single one."""


def arm_rows(results: Sequence[ArmResult[Quality]], shipped: str, answers: Answers | None) -> tuple[ArmRow, ...]:
    """Every arm over its seeds, in the order of the results.

    Args:
        results: Each arm with the same seeds in the same order.
        shipped: The arm that the files are made from.
        answers: Of the same arms and seeds; None where samples have no single class: the intervals are then those of
            the seeds alone.
    """
    arms = list(dict.fromkeys(result.arm for result in results))
    return tuple(_arm_row(arm, _of(results, arm), _of(results, CONTROL), arm == shipped, answers) for arm in arms)


def _of(results: Sequence[ArmResult[Quality]], arm: str) -> list[ArmResult[Quality]]:
    return [result for result in results if result.arm == arm]


def _arm_row(
    arm: str,
    own: list[ArmResult[Quality]],
    control: list[ArmResult[Quality]],
    is_shipped: bool,
    answers: Answers | None,
) -> ArmRow:
    accuracies = [result.test.accuracy for result in own]
    repeated = None
    if answers is not None and _mistakes(answers).any():
        repeated = float(_repeated(answers, arm).mean())
    return ArmRow(
        arm=arm,
        seeds=len(own),
        accuracy=statistics.fmean(accuracies),
        accuracy_deviation=statistics.stdev(accuracies) if len(own) > 1 else None,
        teacher_agreement=statistics.fmean(result.test.teacher_agreement for result in own),
        kl=statistics.fmean(result.test.kl for result in own),
        mistakes_repeated=repeated,
        gain=None if arm == CONTROL else _gain(arm, own, control, answers),
        is_shipped=is_shipped,
    )


def _gain(arm: str, own: list[ArmResult[Quality]], control: list[ArmResult[Quality]], answers: Answers | None) -> Gain:
    if answers is None:
        found = paired_means([r.test.accuracy for r in own], [r.test.accuracy for r in control])
    else:
        right = {name: (answers.students[name] == answers.labels)[:, _labelled(answers)] for name in (arm, CONTROL)}
        found = paired(right[arm], right[CONTROL])
    low, high, error = (
        None if value is None else value * 100 for value in (found.low, found.high, found.standard_error)
    )
    return Gain(found.difference * 100, low, high, error, found.seeds)


def _labelled(answers: Answers) -> np.ndarray:
    return answers.labels >= 0


def _mistakes(answers: Answers) -> np.ndarray:
    """Which samples the teacher gets wrong."""
    return _labelled(answers) & (answers.teacher != answers.labels)


def _repeated(answers: Answers, arm: str) -> np.ndarray:
    """Which of the teacher's mistakes an arm makes with the same wrong class, (seeds, mistakes)."""
    mistakes = _mistakes(answers)
    return np.asarray(answers.students[arm][:, mistakes] == answers.teacher[mistakes])


def kept_sentence(rows: Sequence[ArmRow], teacher: Quality, share_of_parameters: float | None) -> str:
    """How much of the teacher is left in the shipped arm."""
    row = next(row for row in rows if row.is_shipped)
    kept = row.accuracy / teacher.accuracy if teacher.accuracy else 0.0
    size = "" if share_of_parameters is None else f" with {share_of_parameters:.1%} of its parameters"
    unit = "test samples" if teacher.perplexity is None else "next tokens of the test split"
    return (
        f"The student ({row.arm}) keeps {kept:.1%} of the teacher's accuracy{size}: "
        f"{_spread(row)} against {teacher.accuracy:.2%} on {teacher.samples} {unit}."
    )


def start_sentences(lineage: Sequence[str]) -> list[str]:
    """Of a student that starts from a teacher's weights: that every arm does, so what the gain is not."""
    starts = [line.removeprefix(STARTED_FROM) for line in lineage if line.startswith(STARTED_FROM)]
    return [
        f"Every arm starts from the same weights, the control too: {start}. What they are worth is in both; the gain "
        "over the control is that of the teacher's outputs alone."
        for start in starts
    ]


def gain_sentence(rows: Sequence[ArmRow]) -> str:
    """Whether distillation helped: yes, no, or cannot be told."""
    row, control = next(row for row in rows if row.is_shipped), rows[0]
    gain = row.gain
    if gain is None:
        return "It was trained without the teacher: no distilled arm was trained or chosen."
    over = f"{gain.points:+.2f} points over the same student without a teacher ({_spread(control)})"
    if gain.low is None or gain.high is None:
        return untold(over, gain.seeds)
    return told(gain.low, gain.high, f"{over}, 95 % interval {gain.low:+.2f} to {gain.high:+.2f}", gain.seeds)


@dataclass(frozen=True)
class Ratio(JsonMixin):
    """A perplexity over another.

    Attributes:
        ratio: Below 1 where the first is better.
        low, high: Ends of the 95 % interval for new seeds and new windows; None with too few seeds.
    """

    ratio: float
    low: float | None
    high: float | None
    seeds: int


def perplexity_ratio(own: Sequence[Quality], control: Sequence[Quality]) -> Ratio:
    """Of two arms on the test split, paired by seed and window; windows count as independent of each other."""
    found = paired(_window_scores(own), _window_scores(control))
    if found.low is None or found.high is None:
        return Ratio(math.exp(-found.difference), None, None, found.seeds)
    return Ratio(math.exp(-found.difference), math.exp(-found.high), math.exp(min(-found.low, 700)), found.seeds)


def perplexity_sentence(own: Sequence[Quality], control: Sequence[Quality], teacher: Quality) -> str:
    """What distillation did to a language model's perplexity, and whether that can be told.

    Windows of one document are not quite independent: the sentence says so.

    Args:
        own, control: Of the shipped arm and of the control on the test split, seed by seed.
    """
    found = perplexity_ratio(own, control)
    means = [math.exp(-statistics.fmean(quality.score for quality in some)) for some in (own, control)]
    agree = [statistics.fmean(quality.teacher_agreement for quality in some) for some in (own, control)]
    over = (
        f"perplexity {means[0]:.1f} against {means[1]:.1f} of the same student without a teacher "
        f"({teacher.perplexity:.1f} of the teacher) on {teacher.samples} test tokens, "
        f"{found.ratio:.3f}×"
    )
    if found.low is None or found.high is None:
        sentence = untold(over, found.seeds)
    else:
        interval = (
            f"95 % interval {found.low:.3f}× to {found.high:.3f}× for new seeds and new windows, as if these were "
            "independent"
        )
        sentence = told(1 - found.high, 1 - found.low, f"{over}, {interval}", found.seeds)
    alike = f"{agree[0]:.1%} of these tokens, without a teacher at {agree[1]:.1%}"
    return f"{sentence} Its next token is the teacher's at {alike}."


def _window_scores(some: Sequence[Quality]) -> np.ndarray:
    """(seeds, windows); their mean is the log-likelihood of a token, nats."""
    return np.array([-np.array(one.window_losses) * len(one.window_losses) / one.samples for one in some])


def untold(over: str, seeds: int) -> str:
    """What too few seeds say."""
    with_seeds = "one seed" if seeds == 1 else f"{seeds} seeds"
    return (
        f"Whether distillation helped cannot be told: {over}, with {with_seeds}; another seed could say the "
        f"opposite. edgekd distill --seeds {FEWEST_SEEDS} tells."
    )


def told(low: float, high: float, over: str, seeds: int) -> str:
    """What an interval of the gain says; with zero in it, neither."""
    word = "Whether distillation helped cannot be told"
    if low > 0:
        word = "Distillation helped"
    elif high < 0:
        word = "Distillation did not help, it hurt"
    return f"{word}: {over}, paired over {seeds} seeds."


def inheritance_sentence(arm: str, answers: Answers) -> str:
    """What the student took over from the teacher besides its knowledge: mistakes, with the same wrong class.

    A student without a teacher makes some of them as well, since hard samples are hard for both; what it makes beyond
    the control is inherited.

    Args:
        arm: A distilled one.
    """
    count = int(_mistakes(answers).sum())
    if count == 0:
        return "The teacher makes no mistake on the test split: there was none to inherit."
    own, other = _repeated(answers, arm), _repeated(answers, CONTROL)
    if count < FEWEST_MISTAKES:
        return (
            f"The teacher makes {count} mistakes on the test split, too few to tell what was inherited: the student "
            f"repeats {own.mean():.1%} of them with the same wrong class, the control {other.mean():.1%}."
        )
    found = paired(own, other)
    told = (
        f"of the teacher's {count} mistakes it repeats {own.mean():.1%} with the same wrong class, "
        f"the control {other.mean():.1%} ({_points(found)})"
    )
    if not found.is_told:
        return f"Whether the student inherited mistakes cannot be told: {told}."
    if found.difference > 0:
        return f"The student inherited mistakes: {told}."
    return f"The student inherited no mistakes: {told}."


def _points(found: Paired) -> str:
    words = f"{found.difference * 100:+.1f} points"
    if found.low is None or found.high is None:
        return f"{words}, {found.seeds} {'seeds' if found.seeds > 1 else 'seed'}"
    return f"{words}, 95 % interval {found.low * 100:+.1f} to {found.high * 100:+.1f}"


def _spread(row: ArmRow) -> str:
    if row.accuracy_deviation is None:
        return f"{row.accuracy:.2%}"
    return f"{row.accuracy * 100:.2f} ± {row.accuracy_deviation * 100:.2f} %"
