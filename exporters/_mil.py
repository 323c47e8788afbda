"""The reference evaluator of Core ML ML Programs: runs a saved ``.mlpackage`` on any machine, with torch.

It reads what was saved (the program and its weights), never the model that it was made from, and computes each operator
by its published definition. It proves what the file says; it does not model how a device computes: see
``docs/coreml-evaluator.md``.

Half precision: values are held as float32 and rounded to float16 after every operator whose output is declared so.
Inside an operator (the sum of a convolution, the mean of a layer_norm) the precision is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import DataError, ExportError, ModelFileError
from edgekd.protocols import Arrays
from edgekd.types import TensorSpec

from . import _mil_constexpr, _mil_nn, _mil_ops, _mil_shape  # noqa: F401 - they fill the table of operators
from ._mil_package import Package, Type, Value, read_package, tensor_shape
from ._mil_registry import OPERATORS, Operator, Tensors, to_python

__all__ = ["MilProgram", "Step", "load_package"]

# What torch raises when shapes, types or indices do not fit.
_TORCH_ERRORS = (RuntimeError, IndexError, TypeError, ValueError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Step:
    """One operator of a program, bound to its constants.

    Attributes:
        operator: From the table.
        call: The operator's function with every constant argument in place.
        reads: Parameter to the name (or names) of the values it reads when run.
        outputs: Name and declared type of each result.
    """

    operator: Operator
    call: Callable[..., Any]
    reads: tuple[tuple[str, str | tuple[str, ...]], ...]
    outputs: tuple[tuple[str, Type], ...]

    @functools.cached_property
    def label(self) -> str:
        return f"operator {self.operator.name!r} (output {self.outputs[0][0]!r})"


class MilProgram:
    """A loaded program that can be called; fulfils ``edgekd.protocols.Runner``.

    Attributes:
        path: Of the package.
        runtime: Name and version of the evaluator, and the precision of the program.
        inputs, outputs: As the package declares them, in its order.
        steps: The operators in the order in which they run; constants are no steps.
        metadata: The package's ``userDefined`` texts.
    """

    def __init__(self, package: Package) -> None:
        description = package.model.description
        functions = package.model.mlProgram.functions
        name = description.defaultFunctionName or "main"
        if name not in functions:
            raise ModelFileError(f"{package.path} has no function {name!r}; there are {', '.join(functions) or 'none'}")
        function = functions[name]
        if function.opset not in function.block_specializations:
            raise ModelFileError(f"{package.path} has no block for its opset {function.opset!r}")
        block = function.block_specializations[function.opset]
        self.path = package.path
        self.opset: str = function.opset
        self.metadata: dict[str, str] = dict(description.metadata.userDefined)
        self._types = {value.name: package.type_of(value.type) for value in function.inputs}
        self._constants: dict[str, Value] = {}
        self.steps: list[Step] = []
        _refuse_unknown(block.operations)
        for operation in block.operations:
            self._add(package, operation)
        self._input_names = tuple(value.name for value in function.inputs)
        self._output_names = tuple(block.outputs)
        missing = [n for n in self._output_names if n not in self._types]
        if missing:
            raise ModelFileError(f"{package.path} declares the output {missing[0]!r}, which nothing computes")
        meanings = {f.name: f.shortDescription for f in (*description.input, *description.output)}
        order = {f.name: i for i, f in enumerate(description.output)}
        self._output_names = tuple(sorted(self._output_names, key=lambda n: order.get(n, len(order))))
        self.inputs = tuple(self._spec(n, meanings) for n in self._input_names)
        self.outputs = tuple(self._spec(n, meanings) for n in self._output_names)
        halves = any(kind.kind == "FLOAT16" for step in self.steps for _, kind in step.outputs)
        self.runtime = f"edgekd MIL evaluator {version('edgekd')} ({'fp16' if halves else 'fp32'})"

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: By the file's names and in its shapes; integer types are cast to the file's.

        Returns:
            Outputs by the file's names. A classifier's label is an array of text; its dictionary of probabilities an
            array in the order of the labels.

        Raises:
            DataError: An input is missing or has another shape or kind; an index leaves its table.
            ModelFileError: An operator's result is not what the file declares.
        """
        values = self.run(inputs, self._output_names)
        return {name: _to_array(values[name], self._types[name]) for name in self._output_names}

    def run(self, inputs: Arrays, names: Iterable[str] | None = None) -> dict[str, Value]:
        """Run once and give any values by name, as tensors: to find the first operator that goes astray.

        Args:
            inputs: As for a call.
            names: Which to give; all of the program's (constants too) when None.
        """
        values = dict(self._constants)
        values.update({name: self._input(name, inputs) for name in self._input_names})
        with torch.inference_mode():
            for step in self.steps:
                arguments = {
                    key: values[source] if isinstance(source, str) else tuple(values[n] for n in source)
                    for key, source in step.reads
                }
                results = _compute(step, arguments)
                for (name, declared), result in zip(step.outputs, results, strict=True):
                    values[name] = _checked(step, name, declared, result)
        return values if names is None else {name: values[name] for name in names}

    def _add(self, package: Package, operation: Any) -> None:
        """Keep a constant, compute a constexpr, or append a step."""
        outputs = tuple((value.name, package.type_of(value.type)) for value in operation.outputs)
        self._types.update(outputs)
        if operation.type == "const":
            self._constants[outputs[0][0]] = package.value_of(operation.attributes["val"])
            return
        known = OPERATORS[operation.type]
        label = f"operator {known.name!r} (output {outputs[0][0]!r})"
        constants: dict[str, Any] = {
            key: package.value_of(value) for key, value in operation.attributes.items() if key in known.forms
        }
        reads: list[tuple[str, str | tuple[str, ...]]] = []
        for key, argument in operation.inputs.items():
            if key not in known.forms:
                raise ExportError(f"{label} has an argument {key!r} that the evaluator does not know")
            self._bind(package, known, key, list(argument.arguments), constants, reads)
        absent = [key for key in known.required if key not in constants and key not in {name for name, _ in reads}]
        if absent:
            raise ModelFileError(f"{package.path}: {label} lacks its argument {absent[0]!r}")
        constants = {key: _formed(label, known.forms[key], key, value) for key, value in constants.items()}
        step = Step(known, functools.partial(known.function, **constants), tuple(reads), outputs)
        if operation.type.startswith("constexpr_") and not reads:
            with torch.inference_mode():
                results = _compute(step, {})
            self._constants[outputs[0][0]] = _checked(step, *outputs[0], results[0])
        else:
            self.steps.append(step)

    def _bind(
        self,
        package: Package,
        known: Operator,
        key: str,
        bindings: list[Any],
        constants: dict[str, Any],
        reads: list[tuple[str, str | tuple[str, ...]]],
    ) -> None:
        """An argument is a constant when all that it names are constants, else it is read when the program runs."""
        several = known.forms[key] == Tensors
        found: list[Any] = []
        for binding in bindings:
            if binding.WhichOneof("binding") == "value":
                found.append(package.value_of(binding.value))
            elif binding.name in self._constants:
                found.append(self._constants[binding.name])
            elif binding.name not in self._types:
                raise ModelFileError(
                    f"{package.path}: operator {known.name!r} reads {binding.name!r} before it is there"
                )
        if len(found) == len(bindings):
            constants[key] = tuple(found) if several else found[0]
        elif any(binding.WhichOneof("binding") == "value" for binding in bindings):
            raise ExportError(f"the Core ML operator {known.name!r} mixes values and names in its argument {key!r}")
        else:
            names = tuple(binding.name for binding in bindings)
            reads.append((key, names if several else names[0]))

    def _input(self, name: str, inputs: Arrays) -> Tensor:
        declared = self._types[name]
        if name not in inputs:
            raise DataError(f"{self.path.name} takes {', '.join(self._input_names)}; {name!r} was not given")
        array = np.asarray(inputs[name])
        shape = declared.shape or ()
        if array.ndim != len(shape) or any(w not in (-1, g) for w, g in zip(shape, array.shape, strict=True)):
            raise DataError(f"input {name!r} of {self.path.name} takes {shape}; the data is {array.shape}")
        if np.issubdtype(array.dtype, np.floating) != declared.kind.startswith("FLOAT"):
            raise DataError(f"input {name!r} of {self.path.name} takes {declared.dtype}; the data is {array.dtype}")
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(declared.storage)
        return _to_half(tensor) if declared.kind == "FLOAT16" else tensor

    def _spec(self, name: str, meanings: dict[str, str]) -> TensorSpec:
        declared = self._types[name]
        return TensorSpec(name, declared.shape or (), declared.dtype, meanings.get(name, ""))


def load_package(path: Path) -> MilProgram:
    """Read a ``.mlpackage`` and make its program ready to run; any ML Program, whoever made it.

    Raises:
        ModelFileError: The package is damaged, or holds no ML Program.
        ExportError: The program uses an operator that the evaluator does not know; the message names it.
        MissingToolchainError: coremltools is not installed.
    """
    return MilProgram(read_package(path))


def _refuse_unknown(operations: Iterable[Any]) -> None:
    unknown = [op for op in operations if op.type != "const" and (op.type not in OPERATORS or op.blocks)]
    if unknown:
        first = unknown[0]
        others = sorted({op.type for op in unknown} - {first.type})
        more = f"; nor {', '.join(others)}" if others else ""
        output = first.outputs[0].name if first.outputs else "none"
        raise ExportError(f"the evaluator does not know the Core ML operator {first.type!r} (output {output!r}){more}")


def _formed(label: str, form: Any, key: str, value: Any) -> Any:
    """A value in the form in which the operator takes it."""
    try:
        return to_python(form, value)
    except ExportError as error:
        raise ExportError(f"{label}: argument {key!r} {error}") from error


def _compute(step: Step, arguments: dict[str, Any]) -> tuple[Value, ...]:
    forms = step.operator.forms
    arguments = {key: _formed(step.label, forms[key], key, value) for key, value in arguments.items()}
    try:
        result = step.call(**arguments)
    except (DataError, ModelFileError, ExportError) as error:
        raise type(error)(f"{step.label}: {error}") from error
    except _TORCH_ERRORS as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelFileError(f"{step.label} cannot be computed: {first_line}") from error
    results = result if isinstance(result, tuple | list) else (result,)
    if len(results) != len(step.outputs):
        raise ModelFileError(f"{step.label} gives {len(results)} results; the file declares {len(step.outputs)}")
    return tuple(results)


def _checked(step: Step, name: str, declared: Type, result: Value) -> Value:
    """The result, rounded where it is declared half, once its type and shape are those that the file declares."""
    if not isinstance(result, Tensor) or declared.shape is None:
        return result
    shape = tensor_shape(result)
    if shape != declared.shape and (
        len(shape) != len(declared.shape) or any(w not in (-1, g) for w, g in zip(declared.shape, shape, strict=True))
    ):
        raise ModelFileError(f"{step.label}: {name!r} comes out as {shape}; the file declares {declared.shape}")
    if result.dtype != declared.storage:
        raise ModelFileError(f"{step.label}: {name!r} comes out as {result.dtype}; the file declares {declared.dtype}")
    return _to_half(result) if declared.kind == "FLOAT16" and not step.operator.moves else result


def _to_half(value: Tensor) -> Tensor:
    """Round to float16 and back; what is too large becomes infinite, as in half precision."""
    return value.to(torch.float16).to(torch.float32)


def _to_array(value: Value, declared: Type) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.array([value])
    array: np.ndarray = value.numpy()
    return array.astype(declared.dtype) if declared.shape is not None else array
