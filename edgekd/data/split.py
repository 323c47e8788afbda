"""Samples of one purpose: columns by input name, labels, and ids that depend on content and never on position.

A column is a NumPy array, or images that are decoded when they are indexed. A sample is known by its id, so a teacher
cache survives a reordering.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgekd.data.files import Column, ImageFiles, hashes
from edgekd.data.truth import NO_LABEL

__all__ = ["Split", "content_hashes"]


def content_hashes(inputs: Mapping[str, Column]) -> np.ndarray:
    """Hash of the inputs of each sample, the same for all copies: uint64 (samples,).

    An image file is known by folder, name and size.
    """
    columns = [
        column.contents if isinstance(column, ImageFiles) else np.ascontiguousarray(column[:])
        for column in inputs.values()
    ]
    return hashes(b"".join(column[i].tobytes() for column in columns) for i in range(len(columns[0])))


@dataclass(frozen=True)
class Split:
    """Samples of one purpose.

    Attributes:
        inputs: Columns by input name, in the order of the model's ``forward``; samples on the first axis.
        labels: Class of each sample, -1 for none, int64 (samples,); of windows (:mod:`edgekd.data.windows`) that of
            each position, (samples, positions), -1 where a position does not count. None when unlabeled.
        ids: One per sample, uint64, unique.
        fingerprint: Of contents, labels and order. Of an image file it knows folder, name and size, and how its pixels
            become inputs; what is in the file is not read for it, a data set may have 100 GB.
    """

    inputs: Mapping[str, Column]
    labels: np.ndarray | None
    ids: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: np.ndarray) -> Split:
        """Some of the samples, in that order."""
        inputs: dict[str, Column] = {
            name: column.take(indices) if isinstance(column, ImageFiles) else np.asarray(column[indices])
            for name, column in self.inputs.items()
        }
        labels = None if self.labels is None else self.labels[indices]
        digest = hashlib.sha256(self.fingerprint.encode() + np.asarray(indices, np.int64).tobytes()).hexdigest()[:16]
        return Split(inputs, labels, self.ids[indices], digest)

    @cached_property
    def contents(self) -> np.ndarray:
        """See :func:`content_hashes`."""
        return content_hashes(self.inputs)

    def found_in(self, other: Split) -> np.ndarray:
        """Which of these are in the other, whatever their ids: bool (samples,).

        An image file is looked for under its folder, name and size; only files that have the same are read.
        """
        found = np.isin(self.contents, other.contents)
        for name, column in self.inputs.items():
            theirs = other.inputs[name]
            if isinstance(column, ImageFiles) and isinstance(theirs, ImageFiles):
                some = np.flatnonzero(found)
                alike = np.flatnonzero(np.isin(other.contents, self.contents[some]))
                found[some] = column.take(some).found_in(theirs.take(alike))
        return found

    @property
    def labelled(self) -> np.ndarray:
        """Which samples have a label, or a window one that counts: bool (samples,)."""
        if self.labels is None:
            return np.zeros(len(self), bool)
        found: np.ndarray = (self.labels != NO_LABEL).reshape(len(self), -1).any(axis=1)
        return found

    def arrays(self, indices: np.ndarray | slice = slice(None)) -> dict[str, np.ndarray]:
        """Inputs of some samples as arrays, decoded if need be."""
        return {name: np.asarray(column[indices]) for name, column in self.inputs.items()}
