"""A file against the program it came from: output by output, sample by sample. Compares, and does nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from edgekd.errors import DataError
from edgekd.precisions import STATIC
from edgekd.programs.models import bind_inputs
from edgekd.protocols import Arrays, Runner, Tracing
from edgekd.types import LOGITS, Conversion, OutputParity, Parity, Precision, TensorSpec, Tolerance

__all__ = ["TOLERANCES", "compare", "conversions", "first_overflow", "fitting", "run_file"]


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-4, 0.9999, 0.999),
    "fp16": Tolerance(2e-2, 0.999, 0.99),
    "w8": Tolerance(1e-3, 0.9999, 0.995),
    "w8d8": Tolerance(None, 0.98, 0.9),
    **dict.fromkeys(STATIC, Tolerance(None, 0.98, 0.9)),
}
"""By precision. fp16 and w8d8 are compared with fp32; the others with a program of the same numbers."""


def conversions(*precisions: Precision) -> Mapping[Precision, Conversion]:
    """The precisions that mean the same on every target, for ``Exporter.precisions``.

    ``fp16`` and ``w8d8`` are written from ``fp32``; the others are written from a program of their own.

    Raises:
        KeyError: A word is a target's own.
    """
    return {p: Conversion("fp32" if p in ("fp16", "w8d8") else p, TOLERANCES[p]) for p in precisions}


def fitting(specs: Sequence[TensorSpec], inputs: Arrays) -> list[np.ndarray]:
    """Inputs in the order, and in the types, that a file declares: for runners that check nothing.

    Raises:
        DataError: One is missing, or has another shape.
    """
    arrays = []
    for spec in specs:
        if spec.name not in inputs:
            raise DataError(f"the file takes {', '.join(s.name for s in specs)}; there is no {spec.name!r}")
        array = np.asarray(inputs[spec.name])
        if array.ndim != len(spec.shape) or any(w not in (-1, g) for w, g in zip(spec.shape, array.shape, strict=True)):
            raise DataError(f"input {spec.name!r} takes {spec.shape}; the array is {array.shape}")
        arrays.append(np.array(array, dtype=spec.dtype, order="C"))
    return arrays


def run_file(runner: Runner, inputs: Arrays) -> list[np.ndarray]:
    """All samples through a file, in steps of its own batch (of each of its batch sizes in turn); outputs in its order.

    Raises:
        DataError: The samples do not fit the inputs.
    """
    bound = bind_inputs(runner.inputs, inputs)
    parts: list[list[np.ndarray]] = [[] for _ in runner.outputs]
    for start, step in _steps(len(next(iter(bound.values()))), _batch_sizes(runner)):
        outputs = runner({name: array[start : start + step] for name, array in bound.items()})
        for part, spec in zip(parts, runner.outputs, strict=True):
            part.append(np.asarray(outputs[spec.name]))
    return [np.concatenate(part) for part in parts]


def _batch_sizes(runner: Runner) -> tuple[int, ...]:
    """One, unless a runner has several as ``batch_sizes``."""
    sizes: tuple[int, ...] = getattr(runner, "batch_sizes", ())
    return sizes or (max(1, runner.inputs[0].shape[0]),)


def _steps(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Starts and sizes: every size in turn, but none beyond what is left where a smaller one fits."""
    start = turn = 0
    while start < count:
        fitting = [size for size in sizes if size <= count - start] or [min(sizes)]
        step = fitting[turn % len(fitting)]
        yield start, step
        start, turn = start + step, turn + 1


def first_overflow(runner: Runner, inputs: Arrays) -> str:
    """Where a file goes beyond its number type, as far as its runner can say: one line, or nothing.

    For files that failed; a reduced precision that overflows is the most common reason, and the outputs do not show it.
    """
    if not isinstance(runner, Tracing):
        return ""
    bound = bind_inputs(runner.inputs, inputs)
    for start, step in _steps(len(next(iter(bound.values()))), _batch_sizes(runner)[:1]):
        found = runner.first_overflow({name: array[start : start + step] for name, array in bound.items()})
        if found is not None:
            return f"first overflow: {found}"
    return ""


def compare(
    specs: Sequence[TensorSpec],
    program: Sequence[np.ndarray],
    file: Sequence[np.ndarray],
    tolerance: Tolerance,
    runtime: str,
) -> Parity:
    """Outputs of a program against those of its file, in order.

    Args:
        specs: Of the outputs: their names and meanings are the program's.
        program, file: One array per output, samples on the first axis.
        tolerance: What is allowed.
        runtime: What computed ``file``.

    Returns:
        ``passed`` or ``failed``; the reason names every output that failed, and by how much.
    """
    outputs = tuple(_output(spec, p, f, tolerance) for spec, p, f in zip(specs, program, file, strict=True))
    failures = [_reason(item, tolerance) for item in outputs if not item.passed]
    agreements = [item.agreement for item in outputs if item.agreement is not None]
    return Parity(
        status="failed" if failures else "passed",
        reason="; ".join(failures),
        runtime=runtime,
        max_abs=max((item.max_abs for item in outputs if item.max_abs is not None), default=None),
        cosine=min(item.cosine for item in outputs),
        agreement=min(agreements) if agreements else None,
        samples=len(program[0]),
        outputs=outputs,
    )


def _output(spec: TensorSpec, program: np.ndarray, file: np.ndarray, tolerance: Tolerance) -> OutputParity:
    if program.shape != file.shape:
        return OutputParity(
            spec.name, None, 0.0, None, False, f"has shape {file.shape}, the program's is {program.shape}"
        )
    if not np.isfinite(file).all():
        return OutputParity(spec.name, None, 0.0, None, False, "has NaN or infinity")
    a, b = program.reshape(len(program), -1).astype(np.float64), file.reshape(len(file), -1).astype(np.float64)
    max_abs = float(np.abs(a - b).max())
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(np.where(norms > 0, (a * b).sum(1) / np.maximum(norms, 1e-30), np.all(a == b, axis=1)).mean())
    agreement = float((a.argmax(1) == b.argmax(1)).mean()) if program.ndim == 2 and program.shape[1] > 1 else None
    bound = None if tolerance.relative is None else tolerance.relative * max(1.0, float(np.abs(a).max()))
    passed = (
        (bound is None or max_abs <= bound)
        and cosine >= tolerance.cosine
        and (agreement is None or spec.meaning != LOGITS or agreement >= tolerance.agreement)
    )
    return OutputParity(spec.name, max_abs, cosine, agreement, passed)


def _reason(item: OutputParity, tolerance: Tolerance) -> str:
    if item.max_abs is None:
        return f"output {item.name!r} {item.problem}"
    parts = [f"max error {item.max_abs:.3g}", f"cosine {item.cosine:.5f} (at least {tolerance.cosine})"]
    if item.agreement is not None:
        parts.append(f"agreement {item.agreement:.1%} (at least {tolerance.agreement:.1%})")
    return f"output {item.name!r}: {', '.join(parts)}"
