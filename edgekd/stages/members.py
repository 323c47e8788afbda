"""What a recipe's teachers are worth, together and each alone, in numbers and in words for people."""

from __future__ import annotations

import numpy as np

from edgekd.data.windows import counted_positions, positions_of
from edgekd.distillation.perplexity import judge_teacher
from edgekd.metrics import Quality, quality
from edgekd.recipes.recipe import Recipe
from edgekd.stages.workspace import Workspace
from edgekd.teachers.ensemble import MEMBERS

__all__ = ["teacher_accuracy", "teacher_quality", "teacher_sentences"]


def teacher_quality(work: Workspace) -> Quality:
    """The teacher's captured outputs are enough: it is not run again."""
    test, cache = work.splits.test, work.cache("test")
    if cache.positions:
        return judge_teacher(test, cache)
    logits = cache.logits(test.ids)
    assert test.labels is not None
    return quality(logits, test.labels, logits)


def teacher_accuracy(work: Workspace, samples: int = 256) -> str:
    """Share of right top classes on some validation samples, of each of several teachers too, in a line for people."""
    validation = work.splits.validation
    few = max(2, samples // positions_of(validation.labels)) if positions_of(validation.labels) else samples
    some = validation.take(np.argsort(validation.ids)[:few])
    assert some.labels is not None
    answer = work.teacher.outputs(some.arrays())
    whole = f"{_share_right(answer.logits.argmax(axis=-1), some.labels):.1%} of {len(some)} validation samples"
    if MEMBERS not in answer.features:
        return whole
    return f"{whole} together; {_each(work.recipe, answer.features[MEMBERS], some.labels)}"


def teacher_sentences(work: Workspace, accuracy: float) -> list[str]:
    """What teachers say of themselves, and what each of several is worth on the test samples; from the cache."""
    test = work.splits.test
    said = work.cache("train").manifest["beside"] if work.teacher.beside else {}
    lines = [
        f"Of what the teacher says of the training views, {name}: {told['mean']:.2%} on average, "
        f"{told['largest']:.2%} at most."
        for name, told in said.items()
    ]
    if len(work.recipe.teacher.members) == 1 or test.labels is None:
        return lines
    tops = work.cache("test").feature(test.ids, MEMBERS)
    return [*lines, f"The teachers together reach {accuracy:.2%}: {_each(work.recipe, tops, test.labels, 2)} alone."]


def _each(recipe: Recipe, tops: np.ndarray, labels: np.ndarray, digits: int = 1) -> str:
    pairs = zip(recipe.teacher.members, member_accuracies(tops, labels), strict=True)
    return ", ".join(f"{member.model} {share:.{digits}%}" for member, share in pairs)


def member_accuracies(tops: np.ndarray, labels: np.ndarray) -> list[float]:
    """Share of right top classes of each member; tops (samples, members), labels (samples,) or those of windows."""
    return [_share_right(tops[:, member], labels) for member in range(tops.shape[1])]


def _share_right(tops: np.ndarray, labels: np.ndarray) -> float:
    return float((tops == labels)[counted_positions(labels)].mean())
