"""Samples that an app served, beside the recipe's: data and teacher for :mod:`edgekd.distillation.shift`."""

from __future__ import annotations

import numpy as np

from edgekd.data.samples import load_unlabeled
from edgekd.data.split import Split
from edgekd.distillation.shift import AT_MOST, Described, Shift, compare, describe
from edgekd.errors import DataError, UsageError
from edgekd.stages.workspace import Workspace
from edgekd.teachers.ensemble import MEMBERS

__all__ = ["check_shift", "described"]

BATCH = 256


def check_shift(work: Workspace, reference: str) -> Shift:
    """Whether the samples of a reference have drifted from the recipe's.

    The recipe's are those of ``data.test``: the teacher knows its training samples by heart, and would be surer of them
    than of any others, drifted or not.

    Args:
        reference: As of ``data.train``; labels, if any, are not looked at.

    Raises:
        DataError: Inputs that differ, too few samples, or windows of tokens.
    """
    if work.recipe.teacher.embeds:
        raise UsageError("--shift looks at what a teacher says of classes, and this one gives embeddings")
    known, served = work.splits.test, load_unlabeled(work.recipe, reference, "served")
    shapes = [{name: column.shape[1:] for name, column in split.inputs.items()} for split in (known, served)]
    if shapes[0] != shapes[1]:
        raise DataError(f"--shift {reference} has the inputs {shapes[1]}; the recipe's are {shapes[0]}")
    if known.labels is not None and known.labels.ndim != 1:
        raise DataError("--shift compares samples with one label each, and a language model has windows of tokens")
    return compare(described(work, known), described(work, served), work.splits.labels)


def described(work: Workspace, split: Split) -> Described:
    """Of at most so many samples, the first by id: a random choice that stays."""
    rows = np.argsort(split.ids)[:AT_MOST]
    arrays = split.arrays(rows)
    answers = [
        work.teacher.outputs({name: array[start : start + BATCH] for name, array in arrays.items()})
        for start in range(0, len(rows), BATCH)
    ]
    names = answers[0].features.keys() - {MEMBERS}  # numbers of classes lie at no distance from each other
    features = {name: np.concatenate([answer.features[name] for answer in answers]) for name in sorted(names)}
    return describe(arrays, np.concatenate([answer.logits for answer in answers]), features)
