"""The teacher of a recipe: one or several, each with its own preprocessing, as one that gives log-probabilities.

Several are averaged as probabilities (an opinion pool; Hinton et al. 2015, arXiv:1503.02531, section 5): the logits
that the cache keeps are the logarithm of the weighted mean of their softmax.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgekd.errors import DataError, UsageError
from edgekd.protocols import Arrays
from edgekd.recipes.recipe_models import AS_DATA, Feature, Member
from edgekd.store import fingerprint
from edgekd.teachers.pooling import MASK, pooled
from edgekd.teachers.sources import load_teacher, own_preprocessing
from edgekd.teachers.teacher_inputs import Prepare, check_pixels, preparing
from edgekd.teaching import Answer, Preprocessing, Teacher

if TYPE_CHECKING:
    from edgekd.recipes.recipe import Recipe

__all__ = [
    "MEMBERS",
    "as_logits",
    "averaged",
    "teacher_of",
]

MEMBERS = "members"
"""Name of the feature that keeps each member's top class, int64 (batch, members)."""


@dataclass(frozen=True)
class _Loaded:
    """One teacher at work."""

    index: int
    member: Member
    preprocessing: str | Preprocessing | None
    teacher: Teacher
    prepare: Prepare
    features: Sequence[Feature]

    def beside(self, name: str) -> str:
        """What is kept beside its logits, told from what others keep."""
        return name if self.index == 0 else f"{name} ({self.index})"


def teacher_of(recipe: Recipe, example: Arrays) -> Teacher:
    """All teachers of a recipe as one.

    Args:
        example: A few samples as the data has them.

    Raises:
        UsageError, ModelFileError, MissingToolchainError, DataError: See :func:`edgekd.teachers.sources.load_teacher`.
    """
    members = [_load(recipe, index, member, example) for index, member in enumerate(recipe.teacher.members)]
    if len(members) > 1 and any(loaded.teacher.listed is not None for loaded in members):
        raise UsageError("a teacher that gives its largest log-probabilities alone cannot be averaged with others")
    lines = [_line(loaded, example) for loaded in members]

    def outputs(arrays: Arrays) -> Answer:
        answers = [_answer(loaded, arrays) for loaded in members]
        features = {name: feature for answer in answers for name, feature in answer.features.items()}
        if len(answers) == 1:
            return Answer(answers[0].logits, features)
        tops = np.stack([answer.logits.argmax(axis=-1) for answer in answers], axis=1)
        shares = [loaded.member.share for loaded in members]
        return Answer(averaged([answer.logits for answer in answers], shares), {**features, MEMBERS: tops})

    first = members[0]
    kept = tuple(loaded.beside(name) for loaded in members for name in loaded.teacher.beside)
    often = [loaded.teacher.per_shard for loaded in members if loaded.teacher.per_shard is not None]
    if len(members) == 1 and first.preprocessing is None and first.member.gives == "logits":
        return replace(first.teacher, outputs=outputs)
    whole = fingerprint(lines)
    return Teacher(
        outputs,
        whole,
        _sum([loaded.teacher.parameters for loaded in members]),
        _sum([loaded.teacher.macs for loaded in members]),
        sum(loaded.teacher.size_bytes for loaded in members),
        (f"teacher: {whole}", *(f"of {line}" for line in lines), *(_told_lines(members))),
        kept,
        min(often, default=None),
        first.teacher.listed,
    )


def averaged(logits: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """Logarithm of the weighted mean of the probabilities, float32 in the shape of each.

    Raises:
        DataError: The shapes differ.
    """
    if len({array.shape for array in logits}) != 1:
        raise DataError(f"the teachers give {', '.join(str(array.shape) for array in logits)}; all must be the same")
    weights = np.asarray(shares, np.float64) / sum(shares)
    logs = [np.log(weight) + _log_softmax(array) for weight, array in zip(weights, logits, strict=True)]
    mixed: np.ndarray = np.logaddexp.reduce(np.stack(logs), axis=0).astype(np.float32)
    return mixed


def as_logits(array: np.ndarray, member: Member) -> np.ndarray:
    """A teacher's first output as logits; log-probabilities are logits.

    Raises:
        DataError: It was said to be logits and is probabilities, or the other way round.
    """
    if member.gives == "embedding":
        return array
    probable = bool((array >= 0).all() and np.allclose(array.sum(axis=-1), 1, atol=1e-3))
    if member.gives == "probabilities":
        if not probable:
            raise DataError(f"teacher {member.model!r} gives no probabilities: its outputs do not sum to 1")
        return np.log(np.maximum(array, np.finfo(np.float32).tiny))
    if probable and array.shape[-1] > 1:
        raise DataError(
            f"teacher {member.model!r} gives probabilities, not {member.gives}: each row sums to 1; "
            'gives = "probabilities" beside its model would work'
        )
    return array


def _load(recipe: Recipe, index: int, member: Member, example: Arrays) -> _Loaded:
    features = [spec for spec in recipe.distill.wanted_features() if spec.member == index]
    preprocessing = member.preprocessing
    if preprocessing is None:
        preprocessing = own_preprocessing(member.model, recipe.folder, member.told, recipe.labels)
        if preprocessing is not None and recipe.data.image is None:
            check_pixels(example, member.model)
    if preprocessing == AS_DATA:
        preprocessing = None
    prepare = preparing(preprocessing, recipe.folder, recipe.data.image)
    taps = list(dict.fromkeys(spec.teacher for spec in features))
    teacher = load_teacher(member.model, recipe.folder, prepare(example), member.told, taps, recipe.labels)
    return _Loaded(index, member, preprocessing, teacher, prepare, features)


def _answer(loaded: _Loaded, arrays: Arrays) -> Answer:
    taken = loaded.prepare(arrays)
    answer = loaded.teacher.outputs(taken)
    mask = torch.from_numpy(taken[MASK]) if MASK in taken else None
    features: Mapping[str, np.ndarray] = {
        spec.stored: pooled(torch.from_numpy(answer.features[spec.teacher]), spec, mask).numpy()
        for spec in loaded.features
    }
    logits = answer.logits
    if loaded.member.gives == "embedding":
        whole = Feature(teacher="", student="", pool=loaded.member.pool)
        logits = pooled(torch.from_numpy(logits), whole, mask).numpy()
        if logits.ndim != 2:
            raise DataError(
                f"teacher {loaded.member.model!r} gives {logits.shape}, an embedding with positions; "
                'pool = "mean" or "first" beside its model makes one vector'
            )
    beside = {loaded.beside(name): answer.features[name] for name in loaded.teacher.beside}
    return Answer(as_logits(logits, loaded.member), {**features, **beside})


def _told_lines(members: Sequence[_Loaded]) -> list[str]:
    """What teachers say of themselves besides their fingerprint."""
    return [line for loaded in members for line in loaded.teacher.lineage[1:]]


def _line(loaded: _Loaded, example: Arrays) -> str:
    """What a teacher is: its name, its share, its preprocessing by what it does, its weights."""
    member, said, parts = loaded.member, loaded.preprocessing, []
    if member.share != 1:
        parts.append(f"share {member.share:g}")
    if member.gives != "logits":
        parts.append(f"gives {member.gives}" + (f", {member.pool} over positions" if member.pool != "none" else ""))
    if said is not None:
        words = said if isinstance(said, str) else said.model_dump_json(exclude_unset=True)
        parts.append(f"preprocessing {words} {_digest(loaded.prepare(example))}")
    inside = f" ({', '.join(parts)})" if parts else ""
    return f"teacher {member.model}{inside}: {loaded.teacher.fingerprint}"


def _digest(arrays: Arrays) -> str:
    """Sixteen hex digits of what a preprocessing makes of the example: not of its source (see the augmentation's)."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        content = array.tobytes() if array.dtype.kind != "O" else repr(array.tolist()).encode()
        digest.update(f"{name}{array.shape}{array.dtype}".encode() + content)
    return digest.hexdigest()[:16]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    made: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return made


def _sum(values: Sequence[int | None]) -> int | None:
    return None if any(value is None for value in values) else sum(value or 0 for value in values)
