"""What every compression begins and ends with: a student that may be compressed, and what its card tells afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
from torch.fx import GraphModule

from edgekd.compression.static import fingerprint_of
from edgekd.errors import UsageError
from edgekd.programs.fold import clean
from edgekd.programs.models import program_bytes
from edgekd.programs.tracing import retrace
from edgekd.protocols import Arrays
from edgekd.types import Calibration, Card, Precision, Student

__all__ = ["OBSERVER_NAMES", "calibration_of", "check_observer", "finished", "notes_of", "refuse_compressed"]

OBSERVER_NAMES = ("minmax", "percentile", "mse")
"""Those of :mod:`edgekd.compression.observers`, which is not imported for them: it imports torchao."""


def refuse_compressed(student: Student, precision: Precision) -> None:
    """Refuse a student that is compressed already.

    Raises:
        UsageError: It is.
    """
    if student.card.precision != "fp32":
        raise UsageError(f"{precision} needs an fp32 program; {student.card.name!r} is {student.card.precision}")


def check_observer(name: str) -> None:
    """Refuse what is not an observer.

    Raises:
        UsageError: With those that there are.
    """
    if name not in OBSERVER_NAMES:
        raise UsageError(f"no observer called {name!r}; there are {', '.join(OBSERVER_NAMES)}")


def calibration_of(samples: Arrays, observer: str, applied: tuple[str, ...]) -> Calibration:
    """What static scales were taken from, for the card."""
    return Calibration(fingerprint_of(samples), len(next(iter(samples.values()))), observer, applied)


def finished(
    student: Student, module: GraphModule, precision: Precision, calibration: Calibration | None, **card: object
) -> Student:
    """A rewritten module as a student again: its card tells what was done, and its lineage grows by one.

    Args:
        card: More fields of the card to set.

    Raises:
        UsageError: Nothing in the module is quantized.
    """
    if not any(buffer.dtype == torch.int8 for buffer in clean(module).buffers()):
        raise UsageError(
            f"{precision} quantizes float32 weights of convolutions, linear layers and embeddings, and "
            f"{student.card.name!r} has none; keep it in fp32"
        )
    program = retrace(module, student.program)
    told = dataclasses.asdict(calibration) if calibration else None
    settings = json.dumps([precision, told, card], sort_keys=True, default=dataclasses.asdict)
    step = hashlib.sha256(settings.encode() + program_bytes(student.program)).hexdigest()
    changed = dataclasses.replace(
        student.card,
        precision=precision,
        calibration=calibration,
        lineage=(*student.card.lineage, f"compress: {step}"),
        **card,  # type: ignore[arg-type]
    )
    return Student(program, changed)


def notes_of(card: Card) -> tuple[str, ...]:
    """What compression has to say of a program, for manifests and reports."""
    lines = []
    if card.precision == "w4a8":
        lines.append("The 4-bit weights reach from −7 to 7; where kernels read only int8, they are stored as that.")
    if card.calibration and card.calibration.corrections:
        lines.append(f"Corrected with {', '.join(card.calibration.corrections)}.")
    if card.mixture:
        mix = card.mixture
        names = ", ".join(f"{layer.name} ({layer.error:.2%} error alone)" for layer in mix.kept) or "none"
        lines.append(
            f"{len(mix.kept)} of {mix.layers} layers stay float: {names}; {mix.metric} on {mix.samples} samples drops "
            f"by {mix.drop * 100:.2f} pt of the {mix.max_drop * 100:.2f} pt allowed."
        )
    for training in card.retraining:
        control = "" if training.control is None else f"; from labels alone {training.control:.2%}"
        lines.append(
            f"{training.method} for {training.epochs} epochs with {training.arm}: test accuracy {training.before:.2%} "
            f"before, {training.after:.2%} after{control}."
        )
    return tuple(lines)
