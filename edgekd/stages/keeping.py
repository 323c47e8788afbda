"""Where measurements of a run are kept: beside its artifacts, and in the history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgekd import plugins
from edgekd.measurement import Measurement
from edgekd.protocols import Progress
from edgekd.store import RunFolder, load_artifact, read_json, write_json
from edgekd.types import Artifact

__all__ = ["keep", "measurements_of"]


def keep(
    run_folder: RunFolder,
    device: str,
    measured: Sequence[tuple[Artifact, Path, Measurement]],
    release: str,
    how: str,
    progress: Progress,
) -> list[Path]:
    """Keep what one sitting at a device measured.

    Args:
        device: As the user calls it.
        measured: Each with its artifact and that one's folder.
        release, how: See ``edgekd.benchmarks.history``.

    Returns:
        The files beside the artifacts.
    """
    paths = []
    for _, folder, found in measured:
        paths.append(run_folder.measurement(device, folder.name))
        write_json(paths[-1], found.to_json(), indent=None)
    named = [(artifact.card.name, found) for artifact, _, found in measured]
    plugins.load_module("edgekd.benchmarks.history").keep(named, release, how, progress)
    return paths


def measurements_of(run_folder: RunFolder) -> list[Measurement]:
    """All measurements on disk that speak of artifacts as they are now."""
    present = {load_artifact(folder).sha256 for folder in run_folder.artifacts()}
    paths = sorted(run_folder.path.glob("measurements/*/*.json"))
    found = [Measurement.from_json(read_json(path)) for path in paths]
    return [measurement for measurement in found if measurement.artifact_sha256 in present]
