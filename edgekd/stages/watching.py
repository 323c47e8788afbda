"""One file at a time, looked at closely: minute by minute, or operator by operator. What it prints is for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from edgekd import plugins
from edgekd.errors import UsageError
from edgekd.measurement import Measurement, Plan
from edgekd.profiles import device_of, load_profile
from edgekd.protocols import Progress
from edgekd.stages.bench import devices_of_recipe
from edgekd.stages.proofs import proof_of
from edgekd.stages.results import finished
from edgekd.stages.workspace import Workspace
from edgekd.store import write_json

__all__ = ["minutes_lines", "operator_lines", "profiled", "sustained_for"]

SHOWN = 10
"""Operators of each file; all are in the measurement."""


def sustained_for(work: Workspace, progress: Progress, devices: Sequence[str], minutes: float) -> list[str]:
    """Each artifact for so many minutes without a pause: what a warm device keeps up, not what a cold one can."""
    plan = Plan(threads=work.recipe.bench.threads, blocks=1, min_s=minutes * 60, max_s=minutes * 60)
    return [line for one in _watched(work, progress, devices, plan, "sustained") for line in minutes_lines(one)]


def minutes_lines(measured: Measurement) -> list[str]:
    """The median of each minute, and the last as a multiple of the first."""
    what = f"{measured.target} {measured.precision}"
    if measured.status == "not_run":
        return [f"{what:<14} not run: {measured.reason}"]
    block = measured.blocks[0]
    medians = block.latency_ms  # of a tool that keeps no samples: of each launch, which lasts a minute
    if "launches" not in block.conditions:
        inferences = int(block.conditions.get("inferences_per_sample", "1"))
        medians = plugins.load_module("edgekd.benchmarks.stats").per_minute(block.latency_ms, inferences)
    shown = " ".join(f"{median:.3f}" for median in medians)
    return [
        f"{what:<14} ms by minute: {shown}; the last is {medians[-1] / medians[0]:.2f}× the first, {measured.device}"
    ]


def profiled(work: Workspace, progress: Progress, devices: Sequence[str]) -> list[str]:
    """The slowest operators of each artifact."""
    plan = replace(Plan(), threads=work.recipe.bench.threads, blocks=1, min_s=0.2, profile=True)
    return [line for one in _watched(work, progress, devices, plan, "profile") for line in operator_lines(one)]


def operator_lines(measured: Measurement) -> list[str]:
    """Type, share of the time, milliseconds, unit and name, the slowest first."""
    what = f"{measured.target} {measured.precision}"
    if measured.status == "not_run":
        return [f"{what}: not run: {measured.reason}"]
    block = measured.blocks[0]
    if not block.operators:
        runtime = block.conditions.get("runtime", "this runtime")
        nodes = block.conditions.get("delegation") or block.conditions.get("delegation_unknown", "")
        return [f"{what}: not run: {runtime} gave no profile" + (f"; nodes by unit: {nodes}" if nodes else "")]
    total = sum(operator.ms for operator in block.operators)
    slowest = sorted(block.operators, key=lambda operator: -operator.ms)
    units = Counter(operator.unit for operator in block.operators)
    told = [f"{what}: {len(slowest)} operators, {total:.3f} ms, " + " ".join(f"{u}={n}" for u, n in units.items())]
    shown, width = slowest[:SHOWN], max(len(operator.type) for operator in slowest[:SHOWN])
    # All are 0 where none lasts a step of the runtime's clock.
    told += [f"  {o.ms / (total or 1):6.1%} {o.ms:8.3f} ms  {o.type:<{width}}  {o.unit}  {o.name}" for o in shown]
    return told


def _watched(work: Workspace, progress: Progress, devices: Sequence[str], plan: Plan, kind: str) -> list[Measurement]:
    """Every finished artifact on its own with a plan of the caller's; kept beside the measurements, under ``kind``.

    Raises:
        UsageError: Nothing has been exported yet.
        DeviceError: A device went away.
    """
    artifacts = finished(work)
    if plan.profile and work.is_language_model:
        raise UsageError("operators of language models with caches are not timed; edgekd bench without --profile works")
    session, proof = plugins.load_module("edgekd.benchmarks.session"), proof_of(work)
    one = {name: array[:1] for name, array in (proof.task or proof.samples).items()}
    found = []
    for asked in devices or devices_of_recipe(work):
        profile = load_profile(asked)
        for artifact, folder in artifacts:
            measured = session.measure(
                artifact, folder, profile.name, device_of(profile), one, None, None, plan, progress
            )
            write_json(work.folder.measurement(profile.name, f"{kind}/{folder.name}"), measured.to_json(), indent=None)
            found.append(measured)
    return found
