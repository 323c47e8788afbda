"""How near students come to a teacher's embeddings, over their seeds, in words; beside a control, if there is one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from edgekd.distillation.arms import CONTROL
from edgekd.distillation.distill import ArmResult
from edgekd.distillation.embeddings import NEIGHBOURS, Likeness
from edgekd.reporting.pairing import paired_means
from edgekd.reporting.verdict import told, untold

__all__ = ["embedding_sentences"]


def embedding_sentences(
    results: Sequence[ArmResult[Likeness]], shipped: str, teacher: Likeness, share_of_parameters: float | None
) -> list[str]:
    """The verdicts, most important first.

    Args:
        results: Of all arms and seeds; of the control too where there are labels.
        shipped: The arm that the files are made from.
        teacher: Itself, on the test split.
    """
    own = _of(results, shipped)
    size = "" if share_of_parameters is None else f" with {share_of_parameters:.1%} of its parameters"
    near = (
        f"The student ({shipped}){size} has {_spread([q.neighbours for q in own])} of the teacher's {NEIGHBOURS} "
        f"nearest neighbours among its own on {teacher.samples} test samples; its vectors are at a cosine of "
        f"{statistics.fmean(q.cosine for q in own):.3f} from the teacher's."
    )
    lines = [near]
    control = _of(results, CONTROL)
    if not control:
        return [
            *lines,
            "There is no control: the data have no labels, from which alone a student without a teacher could learn. "
            "How near it comes is known, and not what it would be without the teacher.",
        ]
    if shipped != CONTROL:
        lines.append(_gain_sentence(own, control))
    if teacher.same_label is not None:
        found = [_mean_label(own), _mean_label(control)]
        lines.append(
            f"The nearest neighbour has the sample's label for {teacher.same_label:.2%} with the teacher's vectors, "
            f"{found[0]:.2%} with the student's, {found[1]:.2%} with the control's, which learned these labels."
        )
    return lines


def _of(results: Sequence[ArmResult[Likeness]], arm: str) -> list[Likeness]:
    return [result.test for result in results if result.arm == arm]


def _mean_label(some: Sequence[Likeness]) -> float:
    return statistics.fmean(one.same_label or 0.0 for one in some)


def _gain_sentence(own: Sequence[Likeness], control: Sequence[Likeness]) -> str:
    found = paired_means([one.neighbours for one in own], [one.neighbours for one in control])
    over = (
        f"{found.difference * 100:+.2f} points of the teacher's neighbours over the same student without a teacher, "
        f"learned from labels alone ({_spread([one.neighbours for one in control])})"
    )
    if found.low is None or found.high is None:
        return untold(over, found.seeds)
    interval = f"95 % interval {found.low * 100:+.2f} to {found.high * 100:+.2f} for new seeds"
    return told(found.low, found.high, f"{over}, {interval}", found.seeds)


def _spread(shares: Sequence[float]) -> str:
    if len(shares) == 1:
        return f"{shares[0]:.2%}"
    return f"{statistics.fmean(shares) * 100:.2f} ± {statistics.stdev(shares) * 100:.2f} %"
