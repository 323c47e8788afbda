"""What a user names in ``edgekd compare OLD NEW`` and ``--inputs``, as pairs of files and samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgekd import plugins
from edgekd.data.samples import load_arrays
from edgekd.errors import ModelFileError, UsageError
from edgekd.protocols import Progress
from edgekd.store import MANIFEST, hash_path, load_artifact, size_of
from edgekd.types import Artifact, Card, Parity

from .cells import Pair, Samples

__all__ = ["read_artifacts", "read_pairs", "read_samples"]

LABEL, TEACHER = "label", "teacher"
"""Arrays of a data file that are no inputs."""


def read_pairs(old: Path, new: Path, progress: Progress | None = None) -> list[Pair]:
    """The files of two releases that belong together: by folder name, or one file each. Those that only the new one
    has are told.

    Raises:
        UsageError: There is nothing to compare, or the new release lacks a file of the old one.
        ModelFileError: A file is not the one that its manifest describes, or cannot be read.
    """
    before, after = read_artifacts(old), read_artifacts(new)
    if len(before) == len(after) == 1:
        (old_file,), (new_file,) = before.values(), after.values()
        if old_file[0].target != new_file[0].target:
            raise UsageError(f"{old} is {old_file[0].target} and {new} is {new_file[0].target}; compare like with like")
        return [Pair(_label(new_file[0]), *old_file, *new_file)]
    lacking = [name for name in before if name not in after]
    if lacking:
        raise UsageError(f"{new} has no {lacking[0]}, which {old} has; it has {', '.join(after)}")
    if progress and (added := [name for name in after if name not in before]):
        progress.say(f"not compared, since {old} has no such file: {', '.join(added)}")
    return [Pair(_label(after[name][0]), *before[name], *after[name]) for name in before]


def _label(artifact: Artifact) -> str:
    return f"{artifact.target} {artifact.precision}".strip()


def read_artifacts(path: Path) -> dict[str, tuple[Artifact, Path]]:
    """Artifacts by the name of their folder: of one, of a folder of them, or of a model file without a manifest.

    Raises:
        UsageError: There is none.
        ModelFileError: As ``read_pairs``.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}; an artifact's folder, a folder of them, or a model file works")
    if (path / MANIFEST).is_file():
        return {path.name: (_checked(path), path)}
    if path.is_dir():
        folders = sorted(p.parent for p in path.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
        if folders:
            return {folder.name: (_checked(folder), folder) for folder in folders}
        if not path.suffix:
            raise UsageError(f"{path} holds no artifact; edgekd export writes them")
    return {path.name: (_described(path), path.parent)}


def _checked(folder: Path) -> Artifact:
    artifact = load_artifact(folder)
    if hash_path(folder / artifact.path) != artifact.sha256:
        raise ModelFileError(
            f"{folder / artifact.path} is not the file that its manifest describes: its sha256 differs"
        )
    return artifact


def _described(path: Path) -> Artifact:
    """A bare file, as its own runtime describes it; whoever made it."""
    target = plugins.exporter_of(path)
    exporter = plugins.load_exporter(target)
    plugins.require(target, exporter)
    runner = exporter.load(path)
    card = Card(path.stem, runner.inputs, runner.outputs)
    parity = Parity("not_run", "a file without a manifest")
    return Artifact(
        target, "", path.name, hash_path(path), size_of(path), card, runner.inputs, runner.outputs, {}, "", parity
    )


def read_samples(path: Path) -> Samples:
    """Inputs by name or in order; ``label`` and ``teacher`` (its outputs, or its top classes) where they are known.

    Raises:
        DataError: It cannot be read.
        UsageError: It holds no inputs.
    """
    arrays: Mapping[str, np.ndarray] = load_arrays(path)
    inputs = {name: array for name, array in arrays.items() if name not in (LABEL, TEACHER)}
    if not inputs:
        raise UsageError(f"{path} holds no inputs, only {', '.join(arrays)}")
    return Samples(inputs, arrays.get(LABEL), arrays.get(TEACHER))
