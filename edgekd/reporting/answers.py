"""What every student answers on the test split, sample by sample: kept, so that a report runs none of them twice.

``answers/<arm>-<seed>.npz`` in the run folder: the top class of each sample, in the order of the split, with what it
was computed from (the student's file and the split), so that old answers are never taken for new ones.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.distillation.distill import outputs_on
from edgekd.programs.student_files import load_student
from edgekd.stages.workspace import Workspace
from edgekd.store import atomic_write, hash_path

__all__ = ["Answers", "answers_of"]


@dataclass(frozen=True)
class Answers:
    """Top classes on labelled test samples.

    Attributes:
        labels: The truth, int64 (samples,).
        teacher: The teacher's, int64 (samples,).
        students: Of each arm, int64 (seeds, samples).
    """

    labels: np.ndarray
    teacher: np.ndarray
    students: dict[str, np.ndarray]


def answers_of(work: Workspace, arms: Sequence[str], seeds: Sequence[int]) -> Answers:
    """The teacher's answers, and those of every arm with every seed; a student whose answers are kept is not run.

    Raises:
        ModelFileError: A student's file is missing or damaged.
    """
    test = work.splits.test
    assert test.labels is not None
    return Answers(
        test.labels,
        work.cache("test").top_class(test.ids),
        {arm: np.stack([_of_student(work, arm, seed) for seed in seeds]) for arm in arms},
    )


def _of_student(work: Workspace, arm: str, seed: int) -> np.ndarray:
    folder, test = work.folder.arm(arm, seed), work.splits.test
    source = f"{hash_path(folder / 'student.pt2')} {test.fingerprint}"
    path = work.folder.answers(arm, seed)
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["source"]) == source:
                return np.asarray(kept["classes"], np.int64)
    student, _ = load_student(folder)
    classes = outputs_on(student, test).argmax(axis=1).astype(np.int64)
    buffer = io.BytesIO()
    np.savez(buffer, classes=classes.astype(np.int32), source=np.array(source))
    atomic_write(path, buffer.getvalue())
    return classes
