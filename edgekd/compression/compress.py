"""Compression: a student in, a student out, whose program holds int8 weights and, but for ``w8``, static scales.

The numbers are decided here, once; the exporters translate them. ``fp16`` and ``w8d8`` change nothing that a program
could hold, so the exporters make them from an ``fp32`` student.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from edgekd.compression.compressed import calibration_of, check_observer, finished, refuse_compressed
from edgekd.errors import UsageError
from edgekd.precisions import PORTABLE, STATIC, WEIGHT_BITS, WIDE
from edgekd.programs.fold import folded_module
from edgekd.programs.models import example_inputs
from edgekd.programs.weights import put_integers
from edgekd.protocols import Arrays
from edgekd.types import Precision, Student

if TYPE_CHECKING:
    from edgekd.compression.mixed import Budget

__all__ = [
    "choose_int8",
    "compress",
    "quantize_static",
    "quantize_weights",
]


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
        observer: How a range is taken from the samples, one of :mod:`edgekd.compression.observers`.
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
        observer: One of :mod:`edgekd.compression.observers`.
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
