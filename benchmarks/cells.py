"""The lines of a comparison: what is compared, how much worse may be, and what became of each file and metric. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgekd.errors import DataError
from edgekd.measurement import Block, Plan
from edgekd.metrics import check_labels
from edgekd.protocols import Arrays
from edgekd.types import Artifact, JsonMixin

from .paired import Drop, cosines, mean_drop, share_drop
from .rule import Decision, Rule, Verdict
from .session import FLAGS, TOLD_BY_THE_DEVICE, class_output, flags_of, top_classes

__all__ = [
    "TIMED",
    "Cell",
    "Comparison",
    "Margins",
    "Pair",
    "Resolution",
    "Samples",
    "drop_cell",
    "drops_of",
    "exact_cells",
    "log_ratios_of",
    "timed_cell",
    "value_of",
]

FAST = 0.1
"""The quantile of a block's samples that files are compared by. Against the median, on a busy machine: docs/gate.md."""

TIMED = {"latency": "ms", "first_token": "ms", "cold_start": "ms", "peak_memory": "bytes"}
"""Metrics that vary from launch to launch, with their units; ``first_token`` only of language models with caches."""


@dataclass(frozen=True)
class Pair:
    """An old file and the new one that shall take its place.

    Attributes:
        label: For people: ``onnx w8a8``.
    """

    label: str
    old: Artifact
    old_folder: Path
    new: Artifact
    new_folder: Path


@dataclass(frozen=True)
class Samples:
    """What the files are run on.

    Attributes:
        inputs: By name or in order, samples on the first axis; the first is the one that is timed.
        labels: Right classes, (samples,); None when there are none.
        teacher: Outputs of the teacher for the output that means logits, else the first; None without a teacher.
    """

    inputs: Arrays
    labels: np.ndarray | None = None
    teacher: np.ndarray | None = None


@dataclass(frozen=True)
class Margins(JsonMixin):
    """How much worse the new file may be; all are shares (0.03 is 3 %, of accuracy 3 points).

    Attributes:
        latency: Of the fast tenth of the timed inferences: what lies above tells more of the machine than of the file.
        first_token: Of a language model with caches: the fast tenth of the times to an answer's first token.
        cold_start: Loading the file in a fresh process, and the first inference.
        peak_memory: Resident, of what came on top of the runtime.
        size: Of the file or package; compared exactly.
        accuracy: Share of right classes.
        agreement: Share of the teacher's top classes, or mean cosine with its outputs.
        latency_floor_ms, first_token_floor_ms, cold_start_floor_ms, peak_memory_floor_bytes: A smaller difference never
            counts, whatever its share: it is nothing to a user.
    """

    latency: float = 0.03
    first_token: float = 0.03
    cold_start: float = 0.10
    peak_memory: float = 0.05
    size: float = 0.01
    accuracy: float = 0.01
    agreement: float = 0.01
    latency_floor_ms: float = 0.01
    first_token_floor_ms: float = 0.1
    cold_start_floor_ms: float = 5.0
    peak_memory_floor_bytes: float = 1e6

    def ratio(self, metric: str, old: float) -> float:
        """Largest new / old of a timed metric that is no regression."""
        floor = {
            "latency": self.latency_floor_ms,
            "first_token": self.first_token_floor_ms,
            "cold_start": self.cold_start_floor_ms,
            "peak_memory": self.peak_memory_floor_bytes,
        }[metric]
        share: float = getattr(self, metric)
        return 1 + max(share, floor / old)


@dataclass(frozen=True)
class Cell(JsonMixin):
    """One file with one metric: a line of the table.

    Attributes:
        label: Of the pair.
        metric: ``latency``, ``first_token``, ``cold_start``, ``peak_memory``, ``accuracy``, ``agreement``, ``size``,
            ``finite`` (the outputs) or ``delegation``.
        old, new: Values in ``unit``: medians over the blocks, or scores; None where the metric is no number.
        change: How much worse, as a share (of accuracy and agreement: the difference); negative is better.
        low, high: Interval of the change; None where it is exact.
        margin: Largest change that passes.
        pairs: Pairs of blocks, or samples.
        again: Change in the confirming sitting; None where there was none.
        why: One line where the verdict does not follow from the numbers.
    """

    label: str
    metric: str
    verdict: Verdict
    unit: str = ""
    old: float | None = None
    new: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    pairs: int = 0
    again: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Comparison(JsonMixin):
    """What ``edgekd compare`` found; its verdict is the worst of its cells.

    Attributes:
        device: Name, and what stands behind it.
        verdict: Of the whole.
        cells: In the order of the files; those with numbers, and those that could not be measured.
        seed: Of every random order.
        created: ISO 8601 with the zone.
        void: Reasons for which pairs were measured again, each as often as it happened.
        notes: What a reader should know, and no verdict rests on.
        files: sha256 of each file: ``onnx w8a8 old``, ``onnx w8a8 new`` …
    """

    device: str
    verdict: Verdict
    cells: tuple[Cell, ...]
    rule: Rule
    margins: Margins
    plan: Plan
    seed: int
    created: str
    void: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolution(JsonMixin):
    """What one device was found to tell apart.

    Attributes:
        device: Name, and what stands behind it: of another machine it says nothing.
        label: The file that was compared with itself.
        smallest: By timed metric the smallest margin at which an unchanged file passes in 95 % of comparisons.
        medians: Of the same metrics, of that file.
        pairs: Of fresh processes.
        seed: Of the order, and of the resampling.
        created: ISO 8601 with the zone.
    """

    device: str
    label: str
    smallest: dict[str, float]
    medians: dict[str, float]
    pairs: int
    seed: int
    created: str


def value_of(block: Block, metric: str) -> float | None:
    """A timed metric of one block; None where the device could not tell."""
    if metric == "latency":
        return float(np.quantile(block.latency_ms, FAST))
    if metric == "first_token":
        return float(np.quantile(block.first_token_ms, FAST)) if block.first_token_ms else None
    if metric == "cold_start":
        if "shared_start" in block.conditions:
            return None
        return block.model_load_ms + block.first_inference_ms
    if block.peak_memory_bytes is None:
        return None
    resident = block.conditions.get("resident_before_model", "").split()  # as in /proc: '50120 kB'
    return float(block.peak_memory_bytes - (int(resident[0]) * 1024 if resident else 0))


def log_ratios_of(pairs: Sequence[tuple[Block, Block]], metric: str) -> np.ndarray:
    """Logarithm of new over old, (pairs,)."""
    return np.array([math.log((value_of(new, metric) or 0) / (value_of(old, metric) or 0)) for old, new in pairs])


def timed_cell(
    label: str,
    metric: str,
    blocks: Sequence[tuple[Block, Block]],
    decision: Decision,
    margin: float,
    plan: Plan,
    broken: str,
) -> Cell:
    """One timed metric of one pair of files.

    Args:
        blocks: Old and new, pair by pair.
        margin: Largest new / old that is no regression.
        broken: Why no more was measured; empty when nothing went wrong.
    """
    barred = [f for f in flags_of([b for both in blocks for b in both], plan) if f in TOLD_BY_THE_DEVICE]
    why = "; ".join(f"{name}: {FLAGS[name]}" for name in barred)
    old, new = (float(np.median([value_of(both[side], metric) for both in blocks])) for side in (0, 1))
    ratio = decision.ratio
    return Cell(
        label,
        metric,
        "inconclusive" if barred else decision.verdict,
        TIMED[metric],
        old,
        new,
        change=ratio.estimate - 1,
        low=None if ratio.low is None else ratio.low - 1,
        high=None if ratio.high is None else ratio.high - 1,
        margin=margin - 1,
        pairs=ratio.pairs,
        again=None if decision.again is None else decision.again.estimate - 1,
        why=why or "; ".join(word for word in (decision.why, broken) if word),
    )


def exact_cells(
    pair: Pair, blocks: tuple[Block, Block], outputs: tuple[Arrays, Arrays], margins: Margins
) -> list[Cell]:
    """What needs no statistics: size, NaN and infinity, and which nodes run where."""
    old_size, new_size = pair.old.size_bytes, pair.new.size_bytes
    change = new_size / old_size - 1 if old_size else 0.0
    verdict: Verdict = "regression" if change > margins.size else "pass"
    found = [Cell(pair.label, "size", verdict, "bytes", old_size, new_size, change, margin=margins.size)]
    old_bad, new_bad = (_not_finite(side) for side in outputs)
    verdict = "regression" if new_bad > old_bad else "pass"
    why = f"{new_bad} samples are NaN or infinite; {old_bad} of the old file" if new_bad else ""
    found.append(Cell(pair.label, "finite", verdict, "samples", old_bad, new_bad, why=why))
    old_units, new_units = (delegation_of(block) for block in blocks)
    if old_units or new_units:
        why = "" if old_units == new_units else f"was {_told(old_units)}, is {_told(new_units)}"
        verdict = "regression" if _is_less_delegated(old_units, new_units) else "pass"
        if not new_units:
            verdict = "inconclusive"
        found.append(Cell(pair.label, "delegation", verdict, why=why))
    return found


def delegation_of(block: Block) -> dict[str, int]:
    """Nodes by unit, that which was asked for first, from the condition ``delegation``: ``XNNPACK=41 CPU=3``."""
    words = [word.rpartition("=") for word in block.conditions.get("delegation", "").split()]
    return {unit: int(nodes) for unit, _, nodes in words}


def _told(units: Mapping[str, int]) -> str:
    return " ".join(f"{unit}={nodes}" for unit, nodes in units.items()) or "unknown"


def _is_less_delegated(old: Mapping[str, int], new: Mapping[str, int]) -> bool:
    """Whether nodes fell back that did not before: a larger number of them, and a larger share."""
    if not old or not new:
        return False
    asked = next(iter(old))
    nodes, before = sum(new.values()) - new.get(asked, 0), sum(old.values()) - old[asked]
    return nodes > before and nodes / sum(new.values()) > before / sum(old.values())


def _not_finite(outputs: Arrays) -> int:
    """Samples with a NaN or an infinity in any output."""
    bad = [~np.isfinite(array.reshape(len(array), -1)).all(axis=1) for array in outputs.values()]
    return int(np.sum(np.any(bad, axis=0)))


def drops_of(
    pair: Pair, outputs: tuple[Arrays, Arrays], samples: Samples, margins: Margins, confidence: float, seed: int
) -> dict[str, Drop]:
    """``accuracy`` where there are labels, ``agreement`` where there is a teacher.

    Raises:
        DataError: Labels or the teacher's outputs do not fit.
    """
    found: dict[str, Drop] = {}
    sides = list(zip((pair.old, pair.new), outputs, strict=True))
    if samples.labels is not None:
        right = [_is_top(artifact, out, samples.labels, "labels") for artifact, out in sides]
        found["accuracy"] = share_drop(right[0], right[1], margins.accuracy, confidence)
    if samples.teacher is not None:
        if samples.labels is not None or _means_logits(pair.old) or samples.teacher.ndim == 1:
            top = samples.teacher if samples.teacher.ndim == 1 else samples.teacher.argmax(axis=1)
            same = [_is_top(artifact, out, top, "top classes of the teacher") for artifact, out in sides]
            found["agreement"] = share_drop(same[0], same[1], margins.agreement, confidence)
        else:
            near = [_near(artifact, out, samples.teacher) for artifact, out in sides]
            found["agreement"] = mean_drop(near[0], near[1], margins.agreement, confidence, seed)
    return found


def _means_logits(artifact: Artifact) -> bool:
    return "logits" in [spec.meaning for spec in (*artifact.outputs, *artifact.card.outputs)]


def _is_top(artifact: Artifact, outputs: Arrays, wanted: np.ndarray, what: str) -> np.ndarray:
    """Whether each sample's top class is the wanted one, which must be a class of the file."""
    top = top_classes(artifact, outputs)
    if top.shape != wanted.shape:
        raise DataError(f"{len(top)} samples were run; the {what} have shape {wanted.shape}")
    check_labels(wanted, outputs[class_output(artifact)].shape[1], what)
    return np.asarray(top == wanted)


def _near(artifact: Artifact, outputs: Arrays, teacher: np.ndarray) -> np.ndarray:
    name = class_output(artifact)
    try:
        return cosines(outputs[name], teacher)
    except ValueError as error:
        raise DataError(f"the teacher's outputs do not fit {name!r} of {artifact.path}: {error}") from None


def drop_cell(label: str, metric: str, drop: Drop, is_lost: bool, margins: Margins) -> Cell:
    """Accuracy or agreement; it passes when the whole interval lies below the margin."""
    margin: float = getattr(margins, metric)
    verdict: Verdict = "regression" if is_lost else "pass" if drop.high < margin else "inconclusive"
    counted = "" if drop.lost is None else f"{drop.lost} samples lost, {drop.gained} won"
    few = f"; {drop.samples} samples cannot tell a drop of {margin:.1%}" if verdict == "inconclusive" else ""
    return Cell(
        label, metric, verdict, "share", drop.old, drop.new, drop.estimate, drop.low, drop.high, margin, drop.samples,
        why=(counted + few).removeprefix("; "),
    )  # fmt: skip
