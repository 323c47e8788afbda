"""What a run has so far: trained students, the one that is shipped, the programs made of it, finished files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from edgekd import plugins
from edgekd.distillation.distill import ArmResult, Trained, choose_arm, load_result
from edgekd.distillation.embeddings import Likeness
from edgekd.errors import UsageError
from edgekd.metrics import Quality
from edgekd.stages.workspace import Workspace
from edgekd.store import load_artifact
from edgekd.types import Artifact, Precision

__all__ = ["base_folder", "finished", "results_of", "shipped", "source_folder", "trained_of"]

_Kind = TypeVar("_Kind", Quality, Likeness)


def trained_of(work: Workspace) -> Sequence[Trained]:
    """Results of all arms and seeds, whatever the students give.

    Raises:
        UsageError: An arm has not been trained yet.
    """
    return results_of(work, Likeness) if work.recipe.teacher.embeds else results_of(work, Quality)


def results_of(work: Workspace, kind: type[_Kind]) -> list[ArmResult[_Kind]]:
    """The same, of students that are judged by one kind of thing."""
    return [load_result(work.recipe, arm, seed, kind) for seed in work.recipe.distill.seeds for arm in work.arms]


def shipped(work: Workspace) -> tuple[Trained, Path]:
    """The student to ship and its folder, chosen on validation."""
    chosen = choose_arm(trained_of(work), work.recipe.distill.ship)
    return chosen, work.folder.arm(chosen.arm, chosen.seed)


def base_folder(work: Workspace) -> Path:
    """Where the ``fp32`` program lies that files are made from: the pruned student, else the shipped one; of a language
    model the one with caches.

    Raises:
        UsageError: It is not there yet.
    """
    if work.is_language_model:
        return work.folder.require(work.folder.decoder, "export")
    if work.recipe.compress.prune is None:
        return shipped(work)[1]
    return work.folder.require(work.folder.pruned, "compress")


def source_folder(work: Workspace, target: str, precision: Precision) -> Path:
    """Where the program lies that a file is written from."""
    source = plugins.load_exporter(target).precisions[precision].source
    return base_folder(work) if source == "fp32" else work.folder.compressed(source)


def finished(work: Workspace) -> list[tuple[Artifact, Path]]:
    """Every artifact that is there, with its folder.

    Raises:
        UsageError: Nothing has been exported yet.
    """
    folders = work.folder.artifacts()
    if not folders:
        raise UsageError("nothing has been exported yet; run: edgekd export")
    return [(load_artifact(folder), folder) for folder in folders]
