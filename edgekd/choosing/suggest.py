"""Student candidates at a budget: what they hold and compute, and how long they take on a device, measured.

Latency does not depend on what weights are, so candidates are measured before any is trained: written by the recipe's
exporter, proven, and run by the same sessions as ``edgekd bench``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from edgekd import plugins
from edgekd.choosing.candidates import Candidate, candidates_of
from edgekd.distillation.distill import check_output, student_of
from edgekd.errors import DeviceError, EdgekdError, UsageError, first_line
from edgekd.exporting.export import Proof, export_student
from edgekd.measurement import Profile
from edgekd.profiles import device_of, load_profile
from edgekd.protocols import Arrays, Progress
from edgekd.reporting.ledger import UNKNOWN, format_bytes, format_count, format_latency
from edgekd.stages.bench import plan_of_recipe
from edgekd.stages.workspace import Workspace
from edgekd.teachers.blocks import spread_evenly
from edgekd.teachers.sources import load_student_module
from edgekd.types import Artifact, JsonMixin, Student

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Budget", "Latency", "Suggestion", "parse_share", "suggest", "table"]

USUAL_SHARE = (0.1, 0.2)
"""Of the teacher's parameters; with 13 % TextBrewer's BERT (arXiv:2002.12620) keeps 98 % of its teacher on MNLI."""

LITTLE = 0.05
"""Below it, too little capacity is warned of."""

BYTES = 4
"""Of a weight in fp32."""


@dataclass(frozen=True)
class Budget:
    """What a student may cost; None is not looked at.

    Attributes:
        share: Parameters as a share of the teacher's, at least and at most.
        megabytes: Of its file, decimal.
        macs: For one sample.
        latency_ms: Median on every device.
    """

    share: tuple[float, float] | None = USUAL_SHARE
    megabytes: float | None = None
    macs: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Latency(JsonMixin):
    """A candidate on a device.

    Attributes:
        device: Its name.
        where: What stands behind the name; empty when it was not run.
        status: ``measured``, or ``not_run`` with the reason.
        p50_ms: Median of the block medians; None when it was not run.
        flags: What forbids a claim.
    """

    device: str
    status: Literal["measured", "not_run"]
    reason: str = ""
    p50_ms: float | None = None
    flags: tuple[str, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Suggestion(JsonMixin):
    """A candidate, and what it costs.

    Attributes:
        lines: What a recipe has to say to train it.
        share: Of the teacher's parameters; None where these are not known.
        size_bytes: Of its file, in fp32; of its weights where no file was written.
        latencies: Device by device.
        over: Why it is out of the budget; empty when it is within.
        warnings: What a reader should know.
    """

    name: str
    lines: str
    parameters: int
    share: float | None
    macs: int
    size_bytes: int
    latencies: tuple[Latency, ...] = ()
    over: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def latency_ms(self) -> float:
        """Of the slowest device; without a limit where none measured."""
        return max((one.p50_ms for one in self.latencies if one.p50_ms is not None), default=math.inf)


def parse_share(text: str) -> tuple[float, float]:
    """``0.1:0.2`` or ``10:20%``.

    Raises:
        UsageError: It is none of these.
    """
    scale = 0.01 if text.strip().endswith("%") else 1.0
    try:
        low, high = (float(part.strip().removesuffix("%")) * scale for part in text.split(":"))
    except ValueError:
        raise UsageError(f"--share {text!r} is no range; 0.1:0.2 or 10:20% works") from None
    if not 0 <= low < high:
        raise UsageError(f"--share {text!r}: the smaller share comes first, and both are above 0")
    return low, high


def suggest(
    work: Workspace, budget: Budget, devices: Sequence[str], target: str | None, most: int, progress: Progress
) -> tuple[list[Suggestion], list[str]]:
    """Candidates, those within the budget first, the fastest of them first.

    Args:
        devices: Names, or paths of .toml files; none measures nothing.
        target: Exporter of what is measured; by default the recipe's first.
        most: How many are measured: those nearest to the budget, and the recipe's own student always.

    Returns:
        The table, and in a sentence each, of what there are no candidates, and why.

    Raises:
        UsageError: No such target or device.
    """
    target = target or work.recipe.export.targets[0]
    plugins.load_exporter(target)
    profiles = [load_profile(asked) for asked in devices]  # a wrong name is told before anything is built
    candidates, notes = candidates_of(work.recipe)
    found = []
    progress.start("looking at candidates", len(candidates))
    for candidate in candidates:
        try:
            found.append(_looked_at(work, candidate))
        except EdgekdError as error:
            notes.append(f"{candidate.name} is no candidate: {error}")
        progress.advance()
    progress.finish()
    if not found or found[0][0] is not candidates[0]:
        raise UsageError(f"the recipe's own student does not fit; edgekd check says why ({notes[0]})")
    rows = [_row(work, candidate, student) for candidate, student in found]
    chosen = _chosen(rows, budget, most)
    rows = [rows[index] for index in chosen]
    if profiles:
        rows = _measured(work, rows, [found[index][1] for index in chosen], profiles, target, progress)
    rows = [replace(row, over=tuple(_over(row, budget)), warnings=tuple(_warnings(row))) for row in rows]
    return sorted(rows, key=lambda row: (bool(row.over), row.latency_ms, row.parameters)), notes


def _looked_at(work: Workspace, candidate: Candidate) -> tuple[Candidate, Student]:
    recipe, splits = work.recipe, work.splits
    module: nn.Module = load_student_module(candidate.model, recipe.folder, 0, candidate.told, recipe.labels).eval()
    with torch.no_grad():
        try:
            output = module(*splits.example())
        except Exception as error:  # the user's code, or blocks that do not follow on each other
            raise UsageError(f"it cannot take the data: {first_line(error)}") from error
    check_output(recipe, splits, output, work.classes)
    lineage = (f"candidate: {candidate.name}, not trained",)
    return candidate, student_of(recipe, splits, module.requires_grad_(False), lineage)


def _row(work: Workspace, candidate: Candidate, student: Student) -> Suggestion:
    card, of_teacher = student.card, work.teacher.parameters
    share = card.parameters / of_teacher if of_teacher else None
    assert card.macs is not None
    size = card.parameters * BYTES
    return Suggestion(candidate.name, candidate.lines(), card.parameters, share, card.macs, size)


def _chosen(rows: Sequence[Suggestion], budget: Budget, most: int) -> list[int]:
    """Which are measured: the recipe's own student, and those nearest to the budget of parameters; without one, some
    from the smallest to the largest of those that are within the rest of the budget."""
    order = range(1, len(rows))
    if budget.share is not None:
        low, high = budget.share
        nearest = sorted(order, key=lambda index: _apart(rows[index].share, low, high))
        return [0, *sorted(nearest[: most - 1])]
    inside = [index for index in order if not _over(rows[index], budget, False)]
    inside.sort(key=lambda index: rows[index].parameters)
    if len(inside) > most - 1:
        inside = [inside[place] for place in spread_evenly(len(inside), most - 1)] if most > 1 else []
    return [0, *inside]


def _apart(share: float | None, low: float, high: float) -> float:
    """How many times a share is below or above a range; 0 within it, and where it is not known."""
    if share is None:
        return 0.0
    return max(0.0, math.log(max(low, 1e-9) / max(share, 1e-9)), math.log(max(share, 1e-9) / high))


def _measured(
    work: Workspace,
    rows: Sequence[Suggestion],
    students: Sequence[Student],
    profiles: Sequence[Profile],
    target: str,
    progress: Progress,
) -> list[Suggestion]:
    """The rows with the size of their files, and their latencies; what cannot be measured says why."""
    samples = work.splits.validation.arrays(np.arange(min(8, len(work.splits.validation))))
    found: list[Suggestion] = []
    with tempfile.TemporaryDirectory(prefix="edgekd-suggest-") as temporary:
        written: list[tuple[Artifact, Path]] = []
        places: list[int] = []
        progress.start(f"writing candidates for {target}", len(rows))
        for index, (row, student) in enumerate(zip(rows, students, strict=True)):
            folder = Path(temporary) / str(index)
            try:
                if work.is_language_model:
                    raise UsageError("language models are timed once they are trained: edgekd bench")
                artifact = export_student(student, work.splits.assets, target, "fp32", folder, Proof(samples))
            except EdgekdError as error:
                latencies = tuple(Latency(profile.name, "not_run", str(error)) for profile in profiles)
                found.append(replace(row, latencies=latencies))
            else:
                written.append((artifact, folder))
                places.append(index)
                found.append(replace(row, size_bytes=artifact.size_bytes))
            progress.advance()
        progress.finish()
        for profile in profiles if written else ():
            for index, latency in zip(places, _session(work, profile, written, samples, progress), strict=True):
                found[index] = replace(found[index], latencies=(*found[index].latencies, latency))
    return found


def _session(
    work: Workspace, profile: Profile, written: Sequence[tuple[Artifact, Path]], samples: Arrays, progress: Progress
) -> list[Latency]:
    """All files on one device, block by block in turn, as ``edgekd bench`` measures."""
    session, stats = plugins.load_module("edgekd.benchmarks.session"), plugins.load_module("edgekd.benchmarks.stats")
    plan = plan_of_recipe(work)
    one = {name: array[:1] for name, array in samples.items()}
    try:
        told = session.measure_many(written, profile.name, device_of(profile), one, None, None, plan, progress)
    except DeviceError as error:
        return [Latency(profile.name, "not_run", str(error)) for _ in written]
    return [
        Latency(profile.name, "measured", "", stats.latency_ms(m), m.flags, m.device)
        if m.status == "measured"
        else Latency(profile.name, "not_run", m.reason)
        for m in told
    ]


def _over(row: Suggestion, budget: Budget, is_measured: bool = True) -> list[str]:
    reasons = []
    if budget.share is not None and row.share is not None:
        low, high = budget.share
        if row.share > high or row.share < low:
            reasons.append(f"{row.share:.1%} of the teacher, {'above' if row.share > high else 'below'} the budget")
    if budget.megabytes is not None and row.size_bytes > budget.megabytes * 1e6:
        reasons.append(f"{row.size_bytes / 1e6:.2f} MB")
    if budget.macs is not None and row.macs > budget.macs:
        reasons.append(f"{row.macs:,} MACs")
    if budget.latency_ms is not None and is_measured:
        late = [one for one in row.latencies if one.p50_ms is not None and one.p50_ms > budget.latency_ms]
        reasons += [f"{one.p50_ms:.3g} ms on {one.device}" for one in late]
        if not any(one.status == "measured" for one in row.latencies):
            reasons.append("its latency was not measured")
    return reasons


def _warnings(row: Suggestion) -> list[str]:
    if row.share is None or row.share >= LITTLE:
        return []
    return [
        f"{row.name}: {row.share:.1%} of the teacher is too little capacity to expect much of a teacher: MobileNets of "
        "a quarter width gained at most 0.5 points from one, or lost as much (Faghri et al. 2023, arXiv:2303.08983)"
    ]


def table(rows: Sequence[Suggestion]) -> Table:
    """For a terminal; why a candidate is out of the budget, or was not measured, stands below."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", caption_justify="left")
    made.add_column("", overflow="fold", min_width=16)
    devices = list(dict.fromkeys(one.device for row in rows for one in row.latencies))
    for header in ("params", "of teacher", "MACs", "fp32", *(f"p50 ms {index + 1}" for index in range(len(devices)))):
        made.add_column(header, justify="right", no_wrap=True)
    made.add_column("budget")
    for row in rows:
        by_device = {one.device: one for one in row.latencies}
        cells = [
            format_count(row.parameters),
            UNKNOWN if row.share is None else f"{row.share:.1%}",
            format_count(row.macs),
            format_bytes(row.size_bytes),
            *(_latency_cell(by_device.get(device)) for device in devices),
            "; ".join(row.over) or "within",
        ]
        made.add_row(Text(row.name), *(Text(cell) for cell in cells), style="dim" if row.over else None)
    where = {one.device: one.where for row in rows for one in row.latencies if one.where}
    below = [f"p50 ms {index + 1}: {where.get(device, device)}" for index, device in enumerate(devices)]
    for device in devices:
        flags = {flag for row in rows for one in row.latencies if one.device == device for flag in one.flags}
        below += [f"no claim about {device}: {', '.join(sorted(flags))}"] if flags else []
    below += dict.fromkeys(
        f"not run on {one.device}: {one.reason}" for row in rows for one in row.latencies if one.status == "not_run"
    )
    made.caption = Text("\n".join(below)) if below else None
    return made


def _latency_cell(latency: Latency | None) -> str:
    if latency is None or latency.status == "not_run":
        return "not run"
    return format_latency(latency.p50_ms)
