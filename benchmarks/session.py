"""One sitting at a device: all artifacts, block by block in turn, and accuracy from the same session."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgekd.errors import DataError, DeviceError, UsageError
from edgekd.measurement import Block, DeviceStatus, Measurement, Plan
from edgekd.programs.models import bind_inputs
from edgekd.protocols import Arrays, Device, Progress, Side, TakingTurns
from edgekd.types import Artifact

__all__ = [
    "FLAGS",
    "TOLD_BY_THE_DEVICE",
    "class_output",
    "flags_of",
    "inputs_of",
    "measure",
    "measure_many",
    "measure_pair",
    "plan_for",
    "timed_only",
    "top_classes",
    "where_of",
    "why_not_run",
]

FLAGS: Mapping[str, str] = {
    "few_blocks": "fewer than 6 fresh processes: no interval can be given",
    "few_runs": "a block met its time cap before its number of runs",
    "not_converged": "warm-up met its cap before the latency settled",
    "unpinned": "the processor's clock is not held fixed, or cannot be read",
    "virtual_machine": "measured in a virtual machine: neighbours share the processor",
    "busy": "other work was running: the load average beyond the measured threads was above half the cores",
    "batched_timing": "the clock is coarse: each sample is the mean of several inferences",
    "emulated": "not the device's own hardware ran it: an emulator, a software GPU, a slowed browser, or no device",
    "launch_only": "the time ends when the work was handed over, not when the outputs could be read",
    "coarse_timer": "a step of the clock is more than 2 % of a sample, and inferences could not be batched",
    "not_isolated": "the page is not cross-origin isolated: a coarse clock, and one thread whatever was asked",
    "partial_delegation": "a part of the model did not run on the accelerator that was asked for, or nobody can tell",
    "imported": "taken elsewhere and imported: how it was run could not be checked",
    "void_blocks": "the device throttled, or something else spoiled a block",
    "non_finite_outputs": "some outputs are NaN or infinite; they count as wrong",
}
"""What forbids a claim, in words."""

TOLD_BY_THE_DEVICE = ("emulated", "launch_only", "coarse_timer", "not_isolated", "partial_delegation", "imported")
"""Raised by a block's condition of the same name, which says why. Nothing about speed is concluded from such blocks."""

FEWEST_BLOCKS = 6  # below it the exact signed-rank interval does not exist


@dataclass
class _Collected:
    """What has been collected of one artifact so far."""

    artifact: Artifact
    folder: Path
    inputs: dict[str, np.ndarray]
    blocks: list[Block] = field(default_factory=list)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)


def measure(
    artifact: Artifact,
    folder: Path,
    device_name: str,
    device: Device,
    inputs: Arrays,
    labels: np.ndarray | None,
    teacher_top: np.ndarray | None,
    plan: Plan,
    progress: Progress | None = None,
) -> Measurement:
    """One artifact on its own. See ``measure_many``, which is what a comparison needs."""
    found = measure_many([(artifact, folder)], device_name, device, inputs, labels, teacher_top, plan, progress)
    return found[0]


def measure_many(
    artifacts: Sequence[tuple[Artifact, Path]],
    device_name: str,
    device: Device,
    inputs: Arrays,
    labels: np.ndarray | None,
    teacher_top: np.ndarray | None,
    plan: Plan,
    progress: Progress | None = None,
    seed: int = 0,
) -> tuple[Measurement, ...]:
    """Measure several artifacts in one sitting, block by block in turn, each round in an order of its own.

    One after the other would give each artifact another state of the device: what runs last meets the warmest chip.
    Block ``i`` of every measurement belongs to round ``i``, so blocks can be compared pair by pair.

    Args:
        artifacts: Each with the folder that its path is relative to.
        device_name: As the user calls the device; what it is is added from its facts.
        inputs: By the programs' names or in their order, samples on the first axis; the first is the one timed. Of
            language models with caches: prompts, (prompts, tokens).
        labels: Right classes, (samples,); None when there are none.
        teacher_top: The teacher's top classes, (samples,); None without a teacher.
        seed: Of the order in each round.

    Returns:
        One measurement for each artifact, in the order given; ``not_run`` with the reason where the device does not
        run the target.

    Raises:
        DeviceError: The device cannot be reached, or a runtime fails.
        DataError: Inputs, labels and outputs do not fit.
    """
    if plan.blocks < 1:
        raise UsageError(f"a plan needs at least 1 block; this one has {plan.blocks}")
    status = device.probe()
    if not status.reachable:
        raise DeviceError(f"{device_name}: {status.reason}")
    where, plan = where_of(device_name, status.facts), plan_for(plan, [artifact for artifact, _ in artifacts], inputs)
    collected = [
        None if why_not_run(artifact, where, status) else _Collected(artifact, folder, inputs_of(artifact, inputs))
        for artifact, folder in artifacts
    ]
    with contextlib.closing(device):
        _run_interleaved([one for one in collected if one is not None], device, plan, seed, where, progress)
    return tuple(
        _not_run(artifact, where, plan, why_not_run(artifact, where, status))
        if one is None
        else _measured(one, where, plan, labels, teacher_top)
        for one, (artifact, _) in zip(collected, artifacts, strict=True)
    )


def _run_interleaved(
    collected: Sequence[_Collected], device: Device, plan: Plan, seed: int, where: str, progress: Progress | None
) -> None:
    """Rounds of one block each; only the last round is given all inputs, for the outputs of the same session."""
    order = random.Random(seed)
    single = dataclasses.replace(plan, blocks=1)
    if progress and collected:
        progress.start(f"measuring on {where}", total=plan.blocks * len(collected))
    for turn in range(plan.blocks):
        for one in order.sample(collected, len(collected)):
            shown = one.inputs if turn == plan.blocks - 1 else timed_only(one.artifact, one.inputs)
            blocks, one.outputs = device.run(one.artifact, one.folder, shown, single)
            one.blocks.extend(blocks)
            if progress:
                progress.advance(note=f"{one.artifact.target} {one.artifact.precision}")
    if progress and collected:
        progress.finish()


def timed_only(artifact: Artifact, inputs: Arrays) -> dict[str, np.ndarray]:
    """The samples of the one inference that is timed: the outputs of all are wanted once in a sitting."""
    batch = 1 if artifact.card.decoder is not None else max(1, artifact.inputs[0].shape[0])
    return {name: array[:batch] for name, array in inputs.items()}


def _measured(
    one: _Collected, where: str, plan: Plan, labels: np.ndarray | None, teacher_top: np.ndarray | None
) -> Measurement:
    scored = labels is not None or teacher_top is not None
    accuracy = agreement = None
    if scored:
        top = top_classes(one.artifact, one.outputs)
        accuracy, agreement = _share(top, labels, "labels"), _share(top, teacher_top, "top classes of the teacher")
    return Measurement(
        artifact_sha256=one.artifact.sha256,
        target=one.artifact.target,
        precision=one.artifact.precision,
        device=where,
        status="measured",
        plan=plan,
        blocks=tuple(one.blocks),
        size_bytes=one.artifact.size_bytes,
        accuracy=accuracy,
        teacher_agreement=agreement,
        samples=len(top) if scored else 0,
        flags=tuple(flags_of(one.blocks, plan, one.outputs)),
    )


def why_not_run(artifact: Artifact, where: str, status: DeviceStatus) -> str:
    """Why a device does not run a file: as it says itself, else what it runs instead; empty when it does."""
    target = artifact.target
    if target not in status.targets:
        return status.not_run.get(target, f"{where} runs {', '.join(status.targets) or 'nothing'}; not {target}")
    if artifact.card.decoder is not None and target not in status.decodes:
        runs = ", ".join(status.decodes) or "no target"
        return f"{where} runs language models with caches of {runs}; not of {target}"
    return ""


def plan_for(plan: Plan, artifacts: Sequence[Artifact], inputs: Arrays) -> Plan:
    """The plan with the lengths of prompt and answer, where language models with caches are among the files."""
    contexts = [artifact.card.decoder.context for artifact in artifacts if artifact.card.decoder is not None]
    if not contexts:
        return plan
    prompt = next(iter(inputs.values())).shape[1]
    return dataclasses.replace(
        plan, prompt_tokens=prompt, new_tokens=plan.new_tokens or min(64, min(contexts) - prompt)
    )


def inputs_of(artifact: Artifact, inputs: Arrays) -> dict[str, np.ndarray]:
    """What a file is handed, by its own names: of a language model with caches the tokens of prompts alone.

    Raises:
        DataError: The inputs do not fit.
    """
    if artifact.card.decoder is None:
        return bind_inputs(artifact.inputs, inputs)
    tokens = artifact.inputs[0]  # of TFLite one token: other signatures of the file read a prompt
    return bind_inputs((dataclasses.replace(tokens, shape=(tokens.shape[0], -1)),), inputs)


def _not_run(artifact: Artifact, where: str, plan: Plan, reason: str) -> Measurement:
    return Measurement(
        artifact_sha256=artifact.sha256,
        target=artifact.target,
        precision=artifact.precision,
        device=where,
        status="not_run",
        reason=reason,
        plan=plan,
        size_bytes=artifact.size_bytes,
    )


def class_output(artifact: Artifact) -> str:
    """Name of the output that means logits, else of the first."""
    told = zip(artifact.outputs, artifact.card.outputs, strict=False)  # the card knows what the file's outputs mean
    meant = [output.name for output, card in told if "logits" in (output.meaning, card.meaning)]
    return (meant or [output.name for output in artifact.outputs])[0]


def top_classes(artifact: Artifact, outputs: Arrays) -> np.ndarray:
    """Top class of each sample, (samples,), from ``class_output``; -1 where not finite.

    Raises:
        DataError: That output is not (samples, classes).
    """
    name = class_output(artifact)
    logits = outputs[name]
    if logits.ndim != 2:
        raise DataError(f"{artifact.path}: accuracy needs an output of (samples, classes); {name!r} is {logits.shape}")
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


def _share(top: np.ndarray, wanted: np.ndarray | None, what: str) -> float | None:
    if wanted is None:
        return None
    if wanted.shape != top.shape:
        raise DataError(f"{len(top)} samples were run; the {what} have shape {wanted.shape}")
    return float(np.mean(top == wanted))


def flags_of(blocks: Sequence[Block], plan: Plan, outputs: Arrays | None = None) -> list[str]:
    """Names in ``FLAGS``, in its order.

    Args:
        outputs: Of the file, where they are at hand.
    """
    conditions = [block.conditions for block in blocks]
    raised = {
        "few_blocks": len(blocks) < FEWEST_BLOCKS,
        "few_runs": any(_inferences(block) < plan.min_runs for block in blocks),
        "not_converged": not all(block.converged for block in blocks),
        "unpinned": any(seen.get("governor") != "performance" for seen in conditions),
        "virtual_machine": any(seen.get("virtual_machine") == "yes" for seen in conditions),
        "busy": any(
            float(seen.get("load_average_before", 0)) - plan.threads > int(seen.get("cores", 1)) / 2
            for seen in conditions
        ),
        "batched_timing": any(seen.get("inferences_per_sample", "1") != "1" for seen in conditions),
        **{name: any(seen.get(name) for seen in conditions) for name in TOLD_BY_THE_DEVICE},
        "void_blocks": any(block.void for block in blocks),
        "non_finite_outputs": not all(np.all(np.isfinite(output)) for output in (outputs or {}).values()),
    }
    return [name for name, is_raised in raised.items() if is_raised]


def _inferences(block: Block) -> int:
    """How many stand behind a block: its samples, or what a runtime says that keeps none."""
    return int(block.conditions.get("inferences", len(block.latency_ms)))


def measure_pair(
    device: Device, sides: Sequence[Side], plan: Plan, seed: int
) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
    """A block of each side, in turns of a few inferences where the device can, else one after the other.

    Args:
        seed: Of the order.

    Raises:
        DeviceError: As ``Device.run``.
    """
    if isinstance(device, TakingTurns):
        return device.run_in_turns(sides, plan, seed)
    single, found = dataclasses.replace(plan, blocks=1), {}
    for index in random.Random(seed).sample(range(len(sides)), len(sides)):
        side = sides[index]
        blocks, outputs = device.run(side.artifact, side.folder, side.inputs, single)
        found[index] = blocks[0], outputs
    return tuple(found[index] for index in range(len(sides)))


def where_of(device_name: str, facts: Mapping[str, str]) -> str:
    """The name and what stands behind it, so that no number can pass for one of another device."""
    described = ", ".join(facts[key] for key in ("model", "processor", "system") if facts.get(key))
    return f"{device_name} ({described})" if described else device_name
