"""Samples without labels: the teacher labels them, and they join the training set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgekd.data.files import Column, ImageFiles
from edgekd.data.split import Split
from edgekd.data.truth import NO_LABEL
from edgekd.errors import DataError

__all__ = ["Joined", "join_unlabeled"]


@dataclass(frozen=True)
class Joined:
    """What became of the unlabeled samples.

    Attributes:
        samples: That joined the training set.
        labelled: That were in it.
        left_out: How many were not taken, by the split that they are in already.
    """

    samples: int
    labelled: int
    left_out: Mapping[str, int]

    def sentence(self) -> str:
        """For reports."""
        line = (
            f"{self.samples:,} unlabeled samples, labelled by the teacher, joined the {self.labelled:,} labelled ones; "
            "the control learned from the labelled ones alone, in as many steps"
        )
        found = [f"{count:,} that are in {name}" for name, count in self.left_out.items() if count]
        return f"{line}. Left out were {' and '.join(found)}." if found else f"{line}."


def join_unlabeled(train: Split, extra: Split, held_out: Mapping[str, Split]) -> tuple[Split, Joined]:
    """The training set with samples that have no label.

    Args:
        train: Labelled.
        extra: Its labels, if any, are not looked at.
        held_out: By name; no sample of theirs may be trained on. Samples are known by their ids and by their content,
            image files by that of the file.

    Raises:
        DataError: Inputs that differ in name, shape or kind, windows of tokens, or nothing but samples of a split.
    """
    labels = train.labels
    assert labels is not None
    if labels.ndim != 1:
        raise DataError("data.unlabeled: a window of tokens has its next tokens as labels; add the text to data.train")
    shapes = [{name: column.shape[1:] for name, column in split.inputs.items()} for split in (train, extra)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise DataError(f"train has the inputs {_told(shapes[0])}; unlabeled has {_told(shapes[1])}")
    for name, column in train.inputs.items():
        kinds = [one[:1].dtype for one in (column, extra.inputs[name])]
        if kinds[0] != kinds[1]:  # cast, pixels from 0 to 255 would stand beside pixels from 0 to 1 and nobody be told
            raise DataError(
                f"data.unlabeled: input {name} is {kinds[0]} in train and {kinds[1]} in unlabeled "
                "(int32 stands for all whole numbers, also uint8); prepare both alike"
            )
    free, left_out = np.ones(len(extra), bool), {}
    for name, split in {**held_out, "train": train}.items():
        found = free & _known(extra, split)
        left_out[name] = int(found.sum())
        free &= ~found
    if not free.any():
        told = ", ".join(f"{count} in {name}" for name, count in left_out.items() if count)
        raise DataError(f"data.unlabeled: all {len(extra)} samples are in a split already ({told}); others are needed")
    extra = extra.take(np.flatnonzero(free))
    digest = hashlib.sha256(f"{train.fingerprint} {extra.fingerprint}".encode()).hexdigest()[:16]
    joined = Split(
        {name: _concatenated(column, extra.inputs[name]) for name, column in train.inputs.items()},
        np.concatenate([labels, np.full(len(extra), NO_LABEL, labels.dtype)]),
        np.concatenate([train.ids, extra.ids]),
        digest,
    )
    return joined, Joined(len(extra), len(train), left_out)


def _known(extra: Split, split: Split) -> np.ndarray:
    """Which samples are in a split, every copy of them."""
    known = np.isin(extra.ids, split.ids) | np.isin(extra.contents, split.contents)
    for name, column in extra.inputs.items():
        other = split.inputs[name]
        if isinstance(column, ImageFiles) and isinstance(other, ImageFiles):
            known |= column.found_in(other)
    return known


def _concatenated(first: Column, second: Column) -> Column:
    if isinstance(first, ImageFiles) and isinstance(second, ImageFiles):
        return first.joined(second)
    return np.concatenate([np.asarray(first[:]), np.asarray(second[:])])


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
