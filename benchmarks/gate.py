"""Old file against new on one device, now: who is slower, larger or worse, with error rates that are known.

The old file is measured again beside the new one; no stored number ever decides. The rule: ``benchmarks/rule.py``; what
it catches and how often it cries wolf, measured: docs/gate.md.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np

from edgekd.errors import DeviceError, InconclusiveError, UsageError
from edgekd.measurement import Block, Measurement, Plan
from edgekd.protocols import Device, Progress, Side

from .cells import (
    TIMED,
    Cell,
    Comparison,
    Margins,
    Pair,
    Resolution,
    Samples,
    drop_cell,
    drops_of,
    exact_cells,
    log_ratios_of,
    timed_cell,
    value_of,
)
from .paired import Drop, cosines
from .rule import Rule, decide, holm, worst
from .session import (
    class_output,
    flags_of,
    inputs_of,
    measure_pair,
    plan_for,
    timed_only,
    where_of,
    why_not_run,
)

__all__ = ["GATE_PLAN", "Sitting", "compare"]

GATE_PLAN = Plan(blocks=1, warmup_s=0.2, min_s=0.4)
"""Shorter blocks than those of ``bench``: more launches tell more than longer ones."""


@dataclass
class Sitting:
    """One pair of files, and what has been measured of it so far.

    Attributes:
        broken: Why no more is measured; empty while nothing went wrong.
    """

    pair: Pair
    sides: tuple[Side, ...]
    device: Device
    plan: Plan
    drawn: random.Random
    most_void: int
    blocks: list[tuple[Block, Block]] = field(default_factory=list)
    outputs: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None = None
    void: list[str] = field(default_factory=list)
    broken: str = ""

    def measure(self) -> None:
        """One more pair of blocks; one that is void is measured again, and its reason kept."""
        while not self.broken:
            sides = self.sides
            if self.outputs is not None:
                sides = tuple(replace(side, inputs=timed_only(side.artifact, side.inputs)) for side in sides)
            try:
                (old, old_out), (new, new_out) = measure_pair(
                    self.device, sides, self.plan, self.drawn.randrange(2**31)
                )
            except DeviceError as error:
                self.broken = str(error)
                return
            reasons = [block.void for block in (old, new) if block.void]
            if not reasons:
                self.blocks.append((old, new))
                self.outputs = self.outputs or (old_out, new_out)
                return
            self.void += reasons
            if len(self.void) >= self.most_void:
                self.broken = f"{len(self.void)} blocks were void, the last: {reasons[-1]}"

    def timed(self) -> list[str]:
        """The timed metrics that its blocks have."""
        return [m for m in TIMED if self.blocks and all(value_of(b, m) for both in self.blocks for b in both)]

    def margin(self, metric: str, margins: Margins) -> float:
        """Largest new / old; the floor needs the old file's median."""
        return margins.ratio(metric, self.old_median(metric))

    def old_median(self, metric: str) -> float:
        return float(np.median([value_of(old, metric) for old, _ in self.blocks]))


def compare(
    pairs: Sequence[Pair],
    device_name: str,
    device: Device,
    samples: Samples,
    *,
    rule: Rule | None = None,
    margins: Margins | None = None,
    plan: Plan = GATE_PLAN,
    seed: int = 0,
    progress: Progress | None = None,
    resolution: Resolution | None = None,
    metrics: Collection[str] = tuple(TIMED),
) -> tuple[Comparison, tuple[Measurement, ...]]:
    """Measure every pair of files until the rule has decided.

    Args:
        rule, margins: By default those of their classes.
        resolution: What the device was found to tell apart (``benchmarks/calibrate.py``); one of another machine is
            looked at no further, and the notes say so.
        metrics: The timed metrics to judge, where the device tells them.

    Returns:
        The comparison, and all that was measured with its raw samples: old and new of each pair.

    Raises:
        UsageError: A margin is smaller than the device's resolution.
        InconclusiveError: The device cannot be reached.
        DataError: Inputs, labels and outputs do not fit.
    """
    rule, margins = rule or Rule(), margins or Margins()
    status = device.probe()
    if not status.reachable:
        raise InconclusiveError(f"{device_name}: {status.reason}")
    where, drawn = where_of(device_name, status.facts), random.Random(seed)
    plan = plan_for(plan, [file for pair in pairs for file in (pair.old, pair.new)], samples.inputs)
    notes = _resolution_notes(resolution, where, margins, metrics)
    cells, sittings = list[Cell](), list[Sitting]()
    for pair in pairs:
        if not (why := why_not_run(pair.new, where, status)):
            files = ((pair.old, pair.old_folder), (pair.new, pair.new_folder))
            sides = tuple(Side(file, folder, inputs_of(file, samples.inputs)) for file, folder in files)
            sittings.append(Sitting(pair, sides, device, plan, drawn, most_void=rule.looks[0]))
        else:
            cells.append(Cell(pair.label, "latency", "inconclusive", why=f"not run: {why}"))
    if progress and sittings:
        progress.start(f"comparing on {where}", total=rule.looks[0] * len(sittings))
    drops: dict[tuple[int, str], Drop] = {}
    try:
        for sitting in sittings:
            sitting.measure()  # the first pair shows which metrics there are, and has the outputs of all samples
            if progress:
                progress.advance(note=sitting.pair.label)
        for index, sitting in enumerate(sittings):
            if sitting.outputs is not None:
                found = drops_of(sitting.pair, sitting.outputs, samples, margins, rule.confidence, seed)
                drops |= {(index, metric): drop for metric, drop in found.items()}
        timed = [(index, m) for index, sitting in enumerate(sittings) for m in sitting.timed() if m in metrics]
        decisions = decide(
            {(i, m): functools.partial(sittings[i].margin, m, margins) for i, m in timed},
            functools.partial(_measure, sittings, drawn, progress),
            rule,
            {(i, m): log_ratios_of(sittings[i].blocks, m) for i, m in timed},
            beside=len(drops),
        )
    finally:
        device.close()
        if progress and sittings:
            progress.finish()
    lost = holm({name: drop.p_worse for name, drop in drops.items()}, rule.look_alpha, len(timed) + len(drops))
    for index, sitting in enumerate(sittings):
        label = sitting.pair.label
        if not sitting.blocks or sitting.outputs is None:
            cells.append(Cell(label, "latency", "inconclusive", why=sitting.broken))
            continue
        for metric in (m for i, m in timed if i == index):
            margin = sitting.margin(metric, margins)
            decision = decisions[index, metric]
            cells.append(timed_cell(label, metric, sitting.blocks, decision, margin, plan, sitting.broken))
        for (i, metric), drop in drops.items():
            if i == index:
                cells.append(drop_cell(label, metric, drop, (index, metric) in lost, margins))
        cells += exact_cells(sitting.pair, sitting.blocks[0], sitting.outputs, margins)
    comparison = Comparison(
        device=where,
        verdict=worst(cell.verdict for cell in cells),
        cells=tuple(cells),
        rule=rule,
        margins=margins,
        plan=plan,
        seed=seed,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        void=tuple(reason for sitting in sittings for reason in sitting.void),
        notes=(*notes, *(note for sitting in sittings for note in _notes(sitting))),
        files={
            f"{pair.label} {age}": file.sha256 for pair in pairs for age, file in (("old", pair.old), ("new", pair.new))
        },
    )
    measured = [
        _measurement(sitting, side, where, {m: drop for (i, m), drop in drops.items() if i == index})
        for index, sitting in enumerate(sittings)
        for side in (0, 1)
    ]
    return comparison, tuple(measured)


def _measure(
    sittings: Sequence[Sitting],
    drawn: random.Random,
    progress: Progress | None,
    names: Collection[tuple[int, str]],
    count: int,
) -> dict[tuple[int, str], np.ndarray]:
    """So many more pairs of the files that these metrics are of, in rounds; each round in an order of its own."""
    wanted = sorted({index for index, _ in names})
    before = {index: len(sittings[index].blocks) for index in wanted}
    for _ in range(count):
        for index in drawn.sample(wanted, len(wanted)):
            sittings[index].measure()
            if progress:
                progress.advance(note=sittings[index].pair.label)
    return {(i, metric): log_ratios_of(sittings[i].blocks[before[i] :], metric) for i, metric in names}


def _resolution_notes(
    resolution: Resolution | None, where: str, margins: Margins, metrics: Collection[str]
) -> tuple[str, ...]:
    if resolution is None:
        return ("the device is not calibrated: edgekd calibrate says which margins it can tell",)
    if resolution.device != where:
        return (f"the calibration is of {resolution.device}: not used",)
    for metric in metrics:
        if metric in resolution.smallest:
            margin, smallest = margins.ratio(metric, resolution.medians[metric]) - 1, resolution.smallest[metric]
            if margin < smallest:
                raise UsageError(
                    f"a margin of {margin:.2%} in {metric} was asked; {where} was found to tell {smallest:.2%} apart; "
                    f"--margin {metric}={math.ceil(round(smallest * 1000, 6)) / 10}% works, or a calmer device and "
                    "edgekd calibrate"
                )
    return ()


def _notes(sitting: Sitting) -> list[str]:
    """What no verdict rests on: how alike the outputs are, and the flags that do not forbid a comparison."""
    if sitting.outputs is None:
        return []
    label, notes = sitting.pair.label, []
    is_language_model = sitting.pair.new.card.decoder is not None
    old, new = (
        next(iter(out.values())) if is_language_model else out[class_output(side.artifact)]
        for out, side in zip(sitting.outputs, sitting.sides, strict=True)
    )
    if is_language_model and old.shape == new.shape:
        notes.append(f"{label}: answers of old and new to {len(old)} prompts: {np.mean(old == new):.2%} same tokens")
    elif old.shape == new.shape:
        top = f", same top class {np.mean(old.argmax(axis=1) == new.argmax(axis=1)):.2%}" if old.ndim == 2 else ""
        notes.append(
            f"{label}: outputs of old and new on {len(old)} samples: cosine {cosines(old, new).mean():.6f}{top}"
        )
    flags = flags_of([block for both in sitting.blocks for block in both], sitting.plan)
    if flags:
        notes.append(f"{label}: {', '.join(flags)}")
    return notes


def _measurement(sitting: Sitting, side: int, where: str, drops: Mapping[str, Drop]) -> Measurement:
    artifact, blocks = sitting.sides[side].artifact, tuple(both[side] for both in sitting.blocks)
    scores = {metric: (drop.old, drop.new)[side] for metric, drop in drops.items()}
    return Measurement(
        artifact_sha256=artifact.sha256,
        target=artifact.target,
        precision=artifact.precision,
        device=where,
        status="measured" if blocks else "not_run",
        reason="" if blocks else sitting.broken,
        plan=sitting.plan,
        blocks=blocks,
        size_bytes=artifact.size_bytes,
        accuracy=scores.get("accuracy"),
        teacher_agreement=scores.get("agreement"),
        samples=next((drop.samples for drop in drops.values()), 0),
        flags=tuple(flags_of(blocks, sitting.plan, sitting.outputs[side])) if sitting.outputs else (),
    )
