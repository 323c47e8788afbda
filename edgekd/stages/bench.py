"""The stage that measures: every finished file on every device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekd import plugins
from edgekd.exporting.generation import PROMPTS
from edgekd.exporting.regressions import note_regressions
from edgekd.measurement import Measurement, Plan, Profile
from edgekd.profiles import device_of, load_profile
from edgekd.programs.decoder import TOKENS
from edgekd.protocols import Progress
from edgekd.stages.keeping import keep, measurements_of
from edgekd.stages.once import once
from edgekd.stages.proofs import prompts_of, proof_of
from edgekd.stages.results import finished
from edgekd.stages.workspace import Workspace
from edgekd.types import Json

__all__ = ["bench_stage", "devices_of_recipe", "plan_of_recipe"]


def bench_stage(
    work: Workspace, progress: Progress, devices: Sequence[str] = (), force: bool = False, release: str = ""
) -> list[Measurement]:
    """Every finished artifact on every device, interleaved, with accuracy and agreement from the same session.

    Args:
        release: What the history calls them.

    Raises:
        UsageError: Nothing has been exported yet.
        DeviceError: A device went away.
    """
    artifacts = finished(work)
    session = plugins.load_module("edgekd.benchmarks.session")
    spec, plan = work.recipe.bench, plan_of_recipe(work)
    proof, asked_of = proof_of(work), None
    if work.is_language_model:
        plan = replace(plan, prompt_tokens=spec.prompt_tokens, new_tokens=spec.new_tokens)
        asked_of = prompts_of(work.splits.test, PROMPTS, spec.prompt_tokens)
    for asked in devices or devices_of_recipe(work):
        profile = load_profile(asked)
        name = profile.name
        inputs: Json = {
            "artifacts": {folder.name: artifact.sha256 for artifact, folder in artifacts},
            "plan": plan.to_json(),
            "test": work.splits.test.fingerprint,
            "samples": work.recipe.export.accuracy_samples,
        }

        def make(profile: Profile = profile, name: str = name) -> list[Path]:
            teacher_top = None if proof.teacher is None else proof.teacher.argmax(axis=1)
            inputs = proof.task if asked_of is None else {TOKENS: asked_of}
            measured = session.measure_many(
                artifacts, name, device_of(profile), inputs, proof.labels, teacher_top, plan, progress
            )
            told = [(artifact, folder, one) for (artifact, folder), one in zip(artifacts, measured, strict=True)]
            return keep(work.folder, name, told, release, "bench", progress)

        once(work, f"bench-{name}", inputs, make, progress, force)
    measurements = measurements_of(work.folder)
    note_regressions(work.folder.artifacts(), measurements)
    return measurements


def plan_of_recipe(work: Workspace) -> Plan:
    """How the recipe has files measured; the lengths of prompt and answer come on top."""
    spec = work.recipe.bench
    return Plan(threads=spec.threads, blocks=spec.blocks, warmup_s=spec.warmup_s, min_s=spec.min_s)


def devices_of_recipe(work: Workspace) -> list[str]:
    """Those of the recipe: names, or paths relative to it."""
    folder = work.recipe.folder
    return [str(folder / name) if name.endswith(".toml") else name for name in work.recipe.bench.devices]
