"""Measurements that were taken elsewhere (Xcode's report, an app of one's own), as JSON: docs/devices.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgekd import plugins
from edgekd.errors import DataError, UsageError
from edgekd.measurement import Block, Measurement, Plan
from edgekd.protocols import Progress
from edgekd.stages.keeping import keep
from edgekd.store import RunFolder, load_artifact
from edgekd.types import Artifact

__all__ = ["ImportedMeasurement", "import_measurement"]

Milliseconds = Annotated[float, Field(gt=0, lt=1e7, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImportedBlock(_Strict):
    """One launch of whatever measured.

    Attributes:
        latency_ms: One value per inference; the one median where no more is known, with ``inferences`` behind it.
    """

    latency_ms: tuple[Milliseconds, ...] = Field(min_length=1)
    inferences: int | None = Field(None, ge=1)
    load_ms: Milliseconds | None = None
    first_inference_ms: Milliseconds | None = None
    peak_memory_bytes: int | None = Field(None, ge=0)
    conditions: dict[str, str] = Field(default_factory=dict)


class ImportedMeasurement(_Strict):
    """The whole file.

    Attributes:
        artifact_sha256: Of the manifest: what was measured is told by its hash, not by its name.
        device: Name under which it is kept.
        model, system: What that device is: ``iPhone17,1``, ``iOS 26.1``.
        taken_with: Program and version.
    """

    artifact_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    device: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str = Field(min_length=1)
    system: str = Field(min_length=1)
    taken_with: str = Field(min_length=1)
    threads: int = Field(1, ge=1)
    blocks: tuple[ImportedBlock, ...] = Field(min_length=1)


def import_measurement(file: Path, run_folder: RunFolder, release: str, progress: Progress) -> tuple[Path, Measurement]:
    """Read a file and keep it as the other measurements of a run are.

    Args:
        release: What the history calls it.

    Raises:
        UsageError: There is no such file.
        DataError: It lacks something, or speaks of an artifact that this run does not have.
    """
    if not file.is_file():
        raise UsageError(f"no file {file}")
    try:
        told = ImportedMeasurement.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{file}: {where}: {first['msg']}; docs/devices.md has the fields") from None
    found = [(load_artifact(folder), folder) for folder in run_folder.artifacts()]
    present = {artifact.sha256: (artifact, folder) for artifact, folder in found}
    if told.artifact_sha256 not in present:
        names = ", ".join(f"{artifact.target} {artifact.precision}" for artifact, _ in present.values()) or "none"
        raise DataError(f"{file}: artifact_sha256 is of no artifact of this run; there are {names} (see manifest.json)")
    artifact, folder = present[told.artifact_sha256]
    measurement = _measurement(told, artifact)
    (path,) = keep(run_folder, told.device, [(artifact, folder, measurement)], release, "import", progress)
    return path, measurement


def _measurement(told: ImportedMeasurement, artifact: Artifact) -> Measurement:
    plan = Plan(threads=told.threads, blocks=len(told.blocks), min_runs=1)
    blocks = tuple(_block(block, told) for block in told.blocks)
    session = plugins.load_module("edgekd.benchmarks.session")
    facts = {"model": told.model, "system": told.system}
    return Measurement(
        artifact_sha256=artifact.sha256,
        target=artifact.target,
        precision=artifact.precision,
        device=session.where_of(told.device, facts),
        status="measured",
        plan=plan,
        blocks=blocks,
        size_bytes=artifact.size_bytes,
        flags=tuple(session.flags_of(blocks, plan)),
    )


def _block(block: ImportedBlock, told: ImportedMeasurement) -> Block:
    conditions = {**block.conditions, "imported": told.taken_with, "runtime": told.taken_with, "system": told.system}
    if block.inferences is not None:
        conditions["inferences"] = str(block.inferences)
    return Block(
        runtime_load_ms=0.0,
        model_load_ms=block.load_ms or 0.0,
        first_inference_ms=block.first_inference_ms or block.latency_ms[0],
        warmup_ms=(),
        latency_ms=block.latency_ms,
        peak_memory_bytes=block.peak_memory_bytes,
        converged=False,  # nobody told
        conditions=conditions,
    )
