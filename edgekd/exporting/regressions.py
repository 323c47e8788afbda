"""A file that is larger or slower than the fp32 file it should improve on says so in its own manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekd import plugins
from edgekd.measurement import Measurement
from edgekd.store import MANIFEST, load_artifact, write_json
from edgekd.types import Artifact

__all__ = ["note_regressions", "regressions"]


def regressions(artifact: Artifact, parent: Artifact, measurements: Sequence[Measurement] = ()) -> tuple[str, ...]:
    """In what a file is worse than its parent, one line each.

    Args:
        parent: The fp32 file of the same model and target.
        measurements: Of both, from sessions that measured both; slower means that the whole interval of the ratio lies
            above 1.
    """
    found = []
    if artifact.size_bytes > parent.size_bytes:
        found.append(f"size: {artifact.size_bytes / parent.size_bytes:.2f}× its fp32 file")
    stats = plugins.load_module("edgekd.benchmarks.stats")
    measured = [m for m in measurements if m.status == "measured"]
    for mine in measured:
        if mine.artifact_sha256 != artifact.sha256:
            continue
        for theirs in measured:
            same = (theirs.artifact_sha256, theirs.device) == (parent.sha256, mine.device)
            if same and len(theirs.blocks) == len(mine.blocks):
                ratio = stats.latency_ratio(theirs, mine)
                if ratio.low is not None and ratio.low > 1:
                    interval = f"{ratio.confidence:.0%} interval {ratio.low:.2f} to {ratio.high:.2f}"
                    found.append(f"latency: {ratio.estimate:.2f}× its fp32 file on {mine.device} ({interval})")
    return tuple(found)


def note_regressions(folders: Sequence[Path], measurements: Sequence[Measurement] = ()) -> list[Artifact]:
    """Bring ``regressions`` in the manifests of finished artifacts up to date; returns those artifacts that changed."""
    artifacts = {folder: load_artifact(folder) for folder in folders}
    parents = {artifact.target: artifact for artifact in artifacts.values() if artifact.precision == "fp32"}
    changed = []
    for folder, artifact in artifacts.items():
        parent = parents.get(artifact.target)
        if parent is None or parent is artifact or parent.card.name != artifact.card.name:
            continue
        told = replace(artifact, regressions=regressions(artifact, parent, measurements))
        if told != artifact:
            write_json(folder / MANIFEST, told.to_json())
            changed.append(told)
    return changed
