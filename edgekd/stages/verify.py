"""Proving again what is on disk: the teacher's outputs, and every file."""

from __future__ import annotations

from edgekd.errors import CacheError
from edgekd.exporting.export import verify_artifact
from edgekd.programs.student_files import load_student
from edgekd.protocols import Progress
from edgekd.stages.proofs import proof_of
from edgekd.stages.results import finished, source_folder
from edgekd.stages.workspace import SPLITS, Workspace
from edgekd.teachers.capture import Verification, verify_cache
from edgekd.teachers.teacher_cache import TeacherCache
from edgekd.types import Artifact

__all__ = ["confirm_teacher", "verify_artifacts", "verify_caches"]


def verify_caches(work: Workspace, progress: Progress) -> dict[str, Verification]:
    """Run the teacher again on a random share of every cache.

    Returns:
        What was found, by split.

    Raises:
        CacheError: A top class differs, or a logit by more than the rounding explains.
    """
    found = {}
    for name in SPLITS:
        found[name] = verify_cache(work.cache(name), work.split(name), work.teacher, work.views_of(name))
        progress.say(_confirmed(name, found[name]))
    return found


def confirm_teacher(work: Workspace, cache: TeacherCache | None) -> None:
    """Ask the teacher four validation samples again: a changed ``forward`` is not in the fingerprint of its weights.

    A teacher that is paid for each answer is not asked.

    Args:
        cache: Of validation; None where nothing is captured yet.

    Raises:
        CacheError: It says something else than when it was captured.
    """
    if cache is not None and work.teacher.per_shard is None:
        views = work.views_of("validation")
        _confirmed("validation", verify_cache(cache, work.splits.validation, work.teacher, views, 0.0, fewest=4))


def _confirmed(name: str, found: Verification) -> str:
    line = (
        f"cache {name}: {found.records} records run again, top class differs in {found.top1_differs:.2%}, "
        f"largest relative error {found.max_relative:.2g}"
    )
    if found.top1_differs > 0.01 or found.max_relative > 0.01:
        raise CacheError(f"{line}; this is another teacher, augmentation or data set; run: edgekd capture --force")
    return line


def verify_artifacts(work: Workspace, progress: Progress) -> list[Artifact]:
    """Prove all finished artifacts again.

    Raises:
        ParityError: A file changed, or computes something else than its program.
        UsageError: Nothing has been exported yet.
    """
    artifacts, proven = finished(work), []  # nothing is loaded before these are there
    proof = proof_of(work)
    for found, folder in artifacts:
        source = source_folder(work, found.target, found.precision)
        artifact = verify_artifact(folder, load_student(source)[0], proof)
        progress.say(f"{folder.name}: {artifact.parity.status}, max error {artifact.parity.max_abs:.3g}")
        proven.append(artifact)
    return proven
