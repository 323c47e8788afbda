"""Core ML: an ML Program in a ``.mlpackage``, for iOS 17 and macOS 14 and later.

One operator set for every precision. ``w8a8`` needs that of iOS 17; the others could be written for iOS 16, which the
iPhone 8 and X run, but then half of the packages would be proven with operators of another definition.

Off macOS there is no Core ML, so a package is proven by edgekd's reference evaluator (``_mil.py``), which reads the
saved file. coremltools' ``predict`` is never called.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.export import ExportedProgram

from edgekd.errors import ExportError, UsageError
from edgekd.models import at_batch, input_specs, output_specs
from edgekd.parity import conversions
from edgekd.protocols import Options, Runner
from edgekd.types import Card, Contents, Precision, Student, TensorSpec

from ._mil import load_package
from ._mil_contents import read_contents
from ._mil_prepare import is_quantized, prepare_program
from ._mil_write import rename_features, write_package

__all__ = ["EXPORTER", "CoreMLExporter", "load"]


load = load_package
"""Any ``.mlpackage`` with an ML Program in the reference evaluator, whoever made it: see docs/coreml-evaluator.md."""


class CoreMLExporter:
    """See ``edgekd.protocols.Exporter``."""

    suffix = ".mlpackage"
    requires: tuple[str, ...] = ("coremltools",)
    extra = "coreml"
    precisions = conversions("fp32", "fp16", "w8", "w8a8", "w4a8", "auto")
    options = Options

    def write(self, student: Student, path: Path, precision: Precision, options: Options = Options()) -> None:
        """Write the package for a batch of one; the same program gives the same bytes.

        Raises:
            ExportError: The converter refuses; the message names the operator.
            UsageError: The program does not hold the int8 numbers that the precision asks for.
        """
        program = at_batch(student.program)
        if self.precisions[precision].source != "fp32" and not any(is_quantized(node) for node in program.graph.nodes):
            raise UsageError(f"coreml {precision} takes a program with int8 weights; edgekd.compress makes one")
        inputs, outputs = input_specs(program), output_specs(program)
        for spec in inputs:
            if spec.dtype == "bool":
                raise ExportError(f"input {spec.name!r} is bool; Core ML takes float32 and int32 inputs")
        with _collected_complaints() as complaints:
            program = prepare_program(program)
            with tempfile.TemporaryDirectory() as folder:
                model = _convert(program, outputs, precision, Path(folder) / "converted.mlpackage", complaints)
                spec = model.get_spec()
                rename_features(spec, [s.name for s in inputs], [s.name for s in outputs])
                _describe(spec, student.card, precision)
                weights = Path(model.weights_dir) if model.weights_dir else None
                write_package(spec, weights, path)

    def load(self, path: Path) -> Runner:
        """The package in the reference evaluator; see :func:`load`."""
        return load(path)

    def contents(self, path: Path) -> Contents:
        """Operators and constants of the package's program."""
        return read_contents(path)


EXPORTER = CoreMLExporter()


def _convert(
    program: ExportedProgram, outputs: tuple[TensorSpec, ...], precision: Precision, path: Path, complaints: list[str]
) -> Any:
    import coremltools as ct

    compute = ct.precision.FLOAT32
    if precision == "fp16":
        compute = ct.transform.FP16ComputePrecision(op_selector=_fits_half)
    types = [ct.TensorType(dtype=np.float32 if s.dtype.startswith("float") else np.int32) for s in outputs]
    try:
        return ct.convert(
            program,
            convert_to="mlprogram",
            outputs=types,
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=compute,
            package_dir=str(path),
            skip_model_load=True,
        )
    except Exception as error:  # the converter raises every type there is
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = next((line for text in reversed(complaints) for line in text.split("\n") if "converting" in line), "")
        where = where.partition("ERROR - ")[2].partition(" (located")[0]
        raise ExportError(f"Core ML's converter refuses{f' while {where}' if where else ''}: {first_line}") from error


def _fits_half(operation: Any) -> bool:
    """Whether an operator of the converter's graph may be computed in half precision.

    The converter keeps constants beyond 65504 in single precision, except those beyond 1e38, which it takes for
    infinity. But a mask of ``(1 - mask) * -3.4e38`` multiplies that by zero, and zero times infinity is not a number.
    """
    if operation.op_type == "select":  # chooses the infinity, and computes nothing with it
        return True
    for value in operation.inputs.values():
        for variable in value if isinstance(value, list | tuple) else (value,):
            constant = getattr(variable, "val", None)
            if isinstance(constant, np.ndarray | np.floating) and np.issubdtype(constant.dtype, np.floating):
                sizes = np.abs(constant[np.isfinite(constant)] if isinstance(constant, np.ndarray) else constant)
                if np.max(sizes, initial=0.0) > np.finfo(np.float16).max:
                    return False
    return True


def _describe(spec: Any, card: Card, precision: Precision) -> None:
    """What an app needs to know, in the package itself; structured values are JSON."""
    spec.description.metadata.shortDescription = card.name
    facts = {
        "name": card.name,
        "precision": precision,
        "labels": json.dumps(list(card.labels), ensure_ascii=False) if card.labels else "",
        "preprocessing": json.dumps(card.preprocessing, ensure_ascii=False, sort_keys=True)
        if card.preprocessing
        else "",
    }
    for key, value in facts.items():
        if value:
            spec.description.metadata.userDefined[f"edgekd.{key}"] = value
    meanings = {s.name: s.meaning for s in (*card.inputs, *card.outputs)}
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = meanings.get(feature.name, "")


@contextmanager
def _collected_complaints() -> Iterator[list[str]]:
    """coremltools without progress bars and warnings on the terminal; its errors are collected instead.

    It logs that every newer torch and scikit-learn is untested and that there is no Core ML here, each time.
    """
    complaints: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("coremltools")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            import coremltools  # noqa: F401 - torchao, which it imports, warns of kernels for other processors
            from coremltools.converters.mil.frontend.torch import ops
            from coremltools.converters.mil.mil.passes import pass_pipeline

            bars = [(ops, "_tqdm", ops._tqdm), (pass_pipeline, "tqdm", pass_pipeline.tqdm)]
            for module, name, _ in bars:
                setattr(module, name, _without_bar)
            try:
                yield complaints
            finally:
                for module, name, bar in bars:
                    setattr(module, name, bar)
    finally:
        logging.disable(disabled)
        logger.removeHandler(handler)
        logger.propagate = propagate


def _without_bar(iterable: Any, **_: Any) -> Any:
    return iterable
