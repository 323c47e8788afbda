"""Core ML: an ML Program in a ``.mlpackage``, for iOS 17 and macOS 14 and later.

One operator set for every precision: ``w8a8`` needs that of iOS 17, and what is proven once should serve everywhere.

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
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgekd.errors import ExportError, UsageError
from edgekd.fold import attribute, clean, set_constant
from edgekd.models import at_batch, input_specs, output_specs, retrace
from edgekd.protocols import Runner
from edgekd.types import Card, Precision, Student, TensorSpec

from ._mil import MilProgram, load_package
from ._mil_write import rename_features, write_package

__all__ = ["EXPORTER", "CoreMLExporter", "load"]

_QUANTIZED = "quantized_decomposed"
_INTEGERS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def load(path: Path) -> MilProgram:
    """Load any ``.mlpackage`` with an ML Program into the reference evaluator, whoever made it.

    See ``docs/coreml-evaluator.md`` for what this proves and what it does not.

    Raises:
        ModelFileError: The package is damaged, or holds no ML Program.
        ExportError: The program uses an operator that the evaluator does not know; the message names it.
        MissingToolchainError: coremltools is not installed.
    """
    return load_package(path)


class CoreMLExporter:
    """See ``edgekd.protocols.Exporter``."""

    suffix = ".mlpackage"
    requires: tuple[str, ...] = ("coremltools",)
    extra = "coreml"
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "w8", "w8a8")

    def write(self, student: Student, path: Path, precision: Precision) -> None:
        """Write the package for a batch of one; the same program gives the same bytes.

        Raises:
            ExportError: The converter refuses; the message names the operator.
            UsageError: The program does not hold the int8 numbers that the precision asks for.
        """
        program = at_batch(student.program)
        if precision not in self.precisions:
            raise UsageError(f"coreml has no precision {precision!r}; it has {', '.join(self.precisions)}")
        if precision in ("w8", "w8a8") and not any(_is_quantized(node) for node in program.graph.nodes):
            raise UsageError(f"coreml {precision} takes a program with int8 weights; edgekd.compress makes one")
        with _collected_complaints() as complaints:
            program = _prepared(program)
            inputs, outputs = input_specs(program), output_specs(program)
            with tempfile.TemporaryDirectory() as folder:
                model = _convert(program, outputs, precision, Path(folder) / "converted.mlpackage", complaints)
                spec = model.get_spec()
                rename_features(spec, [s.name for s in inputs], [s.name for s in _unique(outputs)])
                _describe(spec, student.card, precision)
                weights = Path(model.weights_dir) if model.weights_dir else None
                write_package(spec, weights, path)

    def load(self, path: Path) -> Runner:
        """The package in the reference evaluator; see :func:`load`."""
        return load(path)


EXPORTER = CoreMLExporter()


def _prepared(program: ExportedProgram) -> ExportedProgram:
    """The program in the words that coremltools knows, with only those operators decomposed that it lacks.

    Raises:
        ExportError: An operator stays that it has no translation for, or int8 numbers that Core ML cannot hold.
    """
    program = _with_float_biases(program)
    _refuse_narrow_ranges(program)
    from torch._decomp import core_aten_decompositions

    known = core_aten_decompositions()
    table: dict[Any, Any] = {}
    while True:
        program = program.run_decompositions(dict(table))
        missing = {node.target: node for node in program.graph.nodes if _is_missing(node)}
        fresh = {target: known[target] for target in missing if target in known and target not in table}
        if not fresh:
            break
        table.update(fresh)
    if missing:
        names = ", ".join(f"{target} (output {node.name!r})" for target, node in missing.items())
        raise ExportError(f"Core ML's converter has no translation for {names}")
    return program


def _is_missing(node: Node) -> bool:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    if node.op != "call_function":
        return False
    target: Any = node.target
    name = target.name() if isinstance(target, torch._ops.OpOverload) else target.__name__
    return _TORCH_OPS_REGISTRY.get_func(name) is None


def _is_quantized(node: Node) -> bool:
    return node.op == "call_function" and str(getattr(node.target, "namespace", "")) == _QUANTIZED


def _with_float_biases(program: ExportedProgram) -> ExportedProgram:
    """Compute dequantized constants of more than 8 bits (int32 biases), which Core ML cannot hold as integers."""
    if not any(_is_quantized(node) for node in program.graph.nodes):
        return program
    module = program.module(check_guards=False)
    changed = False
    for node in list(module.graph.nodes):
        if not (_is_quantized(node) and "dequantize" in node.target.__name__):
            continue
        source = node.args[0]
        if source.op != "get_attr" or attribute(module, source.target).dtype in _INTEGERS:
            continue
        args = [attribute(module, str(a.target)) if isinstance(a, Node) else a for a in node.args]
        constant = set_constant(module, f"{source.target}_float", node.target(*args, **node.kwargs), node)
        node.replace_all_uses_with(constant)
        changed = True
    return retrace(clean(module), program) if changed else program


def _refuse_narrow_ranges(program: ExportedProgram) -> None:
    """Core ML quantizes activations to the whole range of the type; the converter would ignore a narrower one."""
    for node in program.graph.nodes:
        if not (_is_quantized(node) and node.target.__name__.startswith("quantize_per_tensor")):
            continue
        low, high, dtype = node.args[3:6]
        if _INTEGERS.get(dtype, (low, high)) != (low, high):
            raise ExportError(
                f"{node.name} quantizes to {low}..{high}; Core ML quantizes to the whole range of {dtype}, "
                f"{_INTEGERS[dtype][0]}..{_INTEGERS[dtype][1]}"
            )


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


def _unique(specs: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    """Outputs by name; a value that a program gives twice is one output of a package."""
    return list({spec.name: spec for spec in specs}.values())


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
