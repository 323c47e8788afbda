"""Compression: a student in, a student out, whose program holds int8 weights and, but for ``w8``, static scales.

The numbers are decided here, once; the exporters translate them. ``fp16`` and ``w8d8`` change nothing that a program
could hold, so the exporters make them from an ``fp32`` student.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from edgekd.errors import UsageError
from edgekd.precisions import PORTABLE, STATIC, WEIGHT_BITS, WIDE
from edgekd.programs.fold import clean, folded_module
from edgekd.programs.models import example_inputs, program_bytes
from edgekd.programs.tracing import retrace
from edgekd.programs.weights import put_integers
from edgekd.protocols import Arrays
from edgekd.types import Calibration, Card, Precision, Student

if TYPE_CHECKING:
    from edgekd.compression.mixed import Budget

__all__ = [
    "OBSERVER_NAMES",
    "choose_int8",
    "compress",
    "finished",
    "notes_of",
    "quantize_static",
    "quantize_weights",
]

OBSERVER_NAMES = ("minmax", "percentile", "mse")


def compress(
    student: Student,
    precision: Precision,
    calibration: Arrays | None = None,
    observer: str = "minmax",
    corrections: Sequence[str] = ("auto",),
    budget: Budget | None = None,
) -> Student:
    """The student in a precision that a program can hold: ``fp32`` (as it is) or one of :data:`PORTABLE`.

    Args:
        student: In ``fp32``.
        precision: ``fp16`` and ``w8d8`` are made by the exporters.
        calibration: Samples by input name, samples on the first axis; static activations need them.
        observer: How a range is taken from the samples, one of :data:`OBSERVER_NAMES`: see
            :mod:`edgekd.compression.observers`.
        corrections: See :mod:`edgekd.compression.corrections`.
        budget: Of ``auto``; by default half a point, measured on the calibration samples.

    Raises:
        UsageError: The precision is none of these, the student is compressed already, or there are no samples.
        BudgetError: ``auto`` finds no mix within its budget.
        DataError: The samples do not fit the inputs.
        NumericalError: The samples, or what the student makes of them, are not finite.
    """
    if precision == "fp32":
        return student
    if precision == "w8":
        return quantize_weights(student)
    if precision in STATIC:
        if calibration is None:
            raise UsageError(
                f"{precision} takes its scales from real samples and none were given; pass calibration data"
            )
        if precision == "auto":
            from edgekd.compression.mixed import DEFAULT_MAX_DROP, Budget, mixed_precision

            return mixed_precision(
                student, calibration, budget or Budget(DEFAULT_MAX_DROP, calibration), observer, corrections
            )
        return quantize_static(student, calibration, observer, precision, corrections)
    there = f"fp32, {', '.join(PORTABLE)}"
    if precision in ("fp16", "w8d8"):
        raise UsageError(f"{precision} is made by the exporter from an fp32 program; here are {there}")
    raise UsageError(f"no precision called {precision!r} to compress to; there are {there}")


def quantize_weights(student: Student) -> Student:
    """Weights of convolutions, linear layers and embeddings in int8 (``w8``); everything is still computed in float.

    Symmetric, one scale an output channel (an embedding: one a row), ``max |w| / 127``, −127..127. Biases and norms
    stay float. Batch norm is folded first. An embedding is often most of a text model, so it is no exception.

    Raises:
        UsageError: The student is compressed already, or has no such weights.
        NumericalError: A weight is not finite.
    """
    refuse_compressed(student, "w8")
    module = folded_module(student.program)
    put_integers(module)
    return finished(student, module, "w8", None)


def quantize_static(
    student: Student,
    calibration: Arrays,
    observer: str = "minmax",
    precision: Precision = "w8a8",
    corrections: Sequence[str] = ("auto",),
) -> Student:
    """Weights and activations with static scales (``w8a8``, ``w4a8``, ``w8a16``).

    :mod:`edgekd.compression.quantizer` says where.

    Batch norm is folded first. Weights that no runtime computes with in integers (embeddings, transposed
    convolutions) are in int8 as in :func:`quantize_weights`, in ``w4a8`` too.

    Args:
        student: In ``fp32``.
        calibration: Real samples by input name, samples on the first axis; some hundred are enough.
        observer: One of :data:`OBSERVER_NAMES`.
        corrections: See :mod:`edgekd.compression.corrections`.

    Raises:
        UsageError: There is no such observer or correction, or the student is compressed already or has no weights to
            quantize.
        DataError: The samples do not fit the inputs.
        NumericalError: A sample, a weight, or what the student makes of the samples is not finite.
    """
    from edgekd.compression.corrections import StaticPlan, static_of
    from edgekd.compression.static import checked_samples, round_biases

    check_observer(observer)
    refuse_compressed(student, precision)
    samples = checked_samples(student.program, calibration)
    plan = StaticPlan(
        observer, WEIGHT_BITS.get(precision, 8), tuple(corrections), activation_bits=16 if precision == WIDE else 8
    )
    static = static_of(student.program, samples, plan)
    put_integers(static.module)
    round_biases(static.module)
    return finished(student, static.module, precision, calibration_of(samples, observer, static.applied))


def check_observer(name: str) -> None:
    """Refuse what is not an observer.

    Raises:
        UsageError: With those that there are.
    """
    if name not in OBSERVER_NAMES:
        raise UsageError(f"no observer called {name!r}; there are {', '.join(OBSERVER_NAMES)}")


def calibration_of(samples: Arrays, observer: str, applied: tuple[str, ...]) -> Calibration:
    """What static scales were taken from, for the card."""
    from edgekd.compression.static import fingerprint_of

    return Calibration(fingerprint_of(samples), len(next(iter(samples.values()))), observer, applied)


def choose_int8(program: ExportedProgram, precisions: Collection[Precision]) -> tuple[Precision, str]:
    """The int8 precision that suits a model, out of those that a target has, and one sentence why.

    A convnet gets static ``w8a8``. A model of attention and linear layers gets dynamic ``w8d8``, because outliers
    spoil static scales there, or ``w8`` where the target has no ``w8d8``.

    Args:
        program: In ``fp32``.
        precisions: Of the exporter.

    Raises:
        UsageError: The target has no int8 precision.
    """
    share = _convolution_share(program)
    convnet = share >= 0.5
    kind = f"{share:.0%} of its multiply-accumulates are convolutions"
    order: tuple[Precision, ...] = ("w8a8", "w8") if convnet else ("w8d8", "w8")
    reasons = {
        "w8a8": f"{kind}: a convnet, which static int8 activations suit",
        "w8d8": f"{kind}: mostly matrix products, which keep their accuracy with dynamic int8 activations",
        "w8": f"{kind}; the target has no {order[0]}, so only the weights are int8",
    }
    for precision in order:
        if precision in precisions:
            return precision, reasons[precision]
    raise UsageError(f"int8 was asked, and the target has only {', '.join(precisions)}")


def _convolution_share(program: ExportedProgram) -> float:
    """Share of the multiply-accumulates that convolutions do, 0 for a model without any."""
    from torch.utils.flop_counter import FlopCounterMode

    from edgekd.programs.models import call_arguments

    args, kwargs = call_arguments(program, example_inputs(program, 1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        program.module()(*args, **kwargs)
    counts = counter.get_flop_counts().get("Global", {})
    total = sum(counts.values())
    convolutions = sum(count for operator, count in counts.items() if "conv" in str(operator))
    return convolutions / total if total else 0.0


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


def refuse_compressed(student: Student, precision: Precision) -> None:
    """Refuse a student that is compressed already.

    Raises:
        UsageError: It is.
    """
    if student.card.precision != "fp32":
        raise UsageError(f"{precision} needs an fp32 program; {student.card.name!r} is {student.card.precision}")


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
