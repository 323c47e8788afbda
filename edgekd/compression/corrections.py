"""What makes static int8 more accurate without training: equalization, smoothing, bias correction.

======== =============================================================================================================
equalize Evens out the channels of neighbouring layers (:mod:`edgekd.compression.equalize`): depthwise convnets.
smooth   Moves outliers of activations into weights (:mod:`edgekd.compression.smooth`): transformers.
bias     Undoes the shift that rounding gives to a mean (:mod:`edgekd.compression.bias`): few bits, small layers.
======== =============================================================================================================

``auto`` tries each in this order, on top of those that were kept, and keeps it when the outputs on the calibration
samples come nearer to the float outputs by at least a twentieth of the squared error. One that finds nothing to do
costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from torch.export import ExportedProgram
from torch.fx import GraphModule

from edgekd.compression.bias import correct_biases
from edgekd.compression.equalize import equalize
from edgekd.compression.smooth import smooth
from edgekd.compression.static import copied, output_error, outputs_of, static_module
from edgekd.errors import UsageError
from edgekd.programs.fold import folded_module
from edgekd.protocols import Arrays

__all__ = ["AUTO", "CORRECTION_NAMES", "Static", "StaticPlan", "parse_corrections", "static_of"]

AUTO = ("auto",)
CORRECTION_NAMES = ("equalize", "smooth", "bias")
WORTH = 0.95
"""A correction is kept when it leaves at most this share of the squared error."""

_JUDGED = 64  # samples that judge a correction


@dataclass(frozen=True)
class StaticPlan:
    """How a float module becomes static int8.

    Attributes:
        observer: One of ``edgekd.compression.compressed.OBSERVER_NAMES``.
        weight_bits: 8 or 4.
        corrections: ``("auto",)``, or those of :data:`CORRECTION_NAMES` to apply without a question.
        keep_float: Names of the weights whose layers stay float.
        activation_bits: 8 or 16.
    """

    observer: str = "minmax"
    weight_bits: int = 8
    corrections: tuple[str, ...] = AUTO
    keep_float: Collection[str] = ()
    activation_bits: int = 8


@dataclass(frozen=True)
class Static:
    """A quantized module before its biases are rounded.

    Attributes:
        module: With quantize and dequantize nodes.
        source: The float module that it was made from, after equalization and smoothing.
        applied: Corrections that it got.
    """

    module: GraphModule
    source: GraphModule
    applied: tuple[str, ...]


def static_of(program: ExportedProgram, samples: Arrays, plan: StaticPlan) -> Static:
    """Quantize a program with the corrections of a plan.

    Args:
        samples: Of :func:`edgekd.compression.static.checked_samples`.

    Raises:
        UsageError: There is no such correction.
        NumericalError: A weight, or what the program makes of the samples, is not finite.
    """
    check_corrections(plan.corrections)
    source = folded_module(program)
    if plan.corrections == AUTO:
        return _tried(source, program, samples, plan)
    source = copied(source)  # its constants are the program's own, which must not change
    applied = tuple(
        name for name in CORRECTION_NAMES[:2] if name in plan.corrections and _adjust(name, source, program, samples)
    )
    module = _quantized(source, program, samples, plan)
    if "bias" in plan.corrections and correct_biases(module, source, program, samples):
        applied = (*applied, "bias")
    return Static(module, source, applied)


def check_corrections(names: tuple[str, ...]) -> None:
    """Refuse what is not a correction.

    Raises:
        UsageError: With those that there are.
    """
    for name in names:
        if name not in CORRECTION_NAMES and names != AUTO:
            raise UsageError(f"no correction called {name!r}; there are {', '.join(CORRECTION_NAMES)}, or auto alone")


def parse_corrections(text: str) -> tuple[str, ...]:
    """``auto``, ``none``, or names with commas between them, as on the command line.

    Raises:
        UsageError: There is no such correction.
    """
    names = () if text == "none" else tuple(name.strip() for name in text.split(","))
    check_corrections(names)
    return names


def _tried(source: GraphModule, program: ExportedProgram, samples: Arrays, plan: StaticPlan) -> Static:
    """Every correction that has something to do, kept where it is worth it."""
    count = len(next(iter(samples.values())))
    judged = {name: np.asarray(array[-min(count, _JUDGED) :]) for name, array in samples.items()}
    best = Static(_quantized(source, program, samples, plan), source, ())
    reference = outputs_of(source, program, judged)
    error = output_error(reference, outputs_of(best.module, program, judged))
    for name in CORRECTION_NAMES:
        if name == "bias":
            adjusted, module = best.source, copied(best.module)
            if not correct_biases(module, adjusted, program, samples):
                continue
        else:
            adjusted = copied(best.source)
            if not _adjust(name, adjusted, program, samples):
                continue
            module = _quantized(adjusted, program, samples, plan)
        found = output_error(reference, outputs_of(module, program, judged))
        if found <= error * WORTH:
            best, error = Static(module, adjusted, (*best.applied, name)), found
    return best


def _adjust(name: str, module: GraphModule, program: ExportedProgram, samples: Arrays) -> int:
    """Change the weights of a float module without changing what it computes; how many places were changed."""
    return equalize(module) if name == "equalize" else smooth(module, program, samples)


def _quantized(source: GraphModule, program: ExportedProgram, samples: Arrays, plan: StaticPlan) -> GraphModule:
    return static_module(
        source, program, samples, plan.observer, plan.weight_bits, plan.keep_float, plan.activation_bits
    )
