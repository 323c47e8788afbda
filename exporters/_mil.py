"""The reference evaluator of Core ML ML Programs: runs a saved ``.mlpackage`` on any machine, with torch.

It reads what was saved (the program and its weights), never the model that it was made from, and computes each operator
by its published definition. It proves what the file says; it does not model how a device computes: see
``docs/coreml-evaluator.md``.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import DataError, ModelFileError
from edgekd.protocols import Arrays
from edgekd.types import TensorSpec

from . import (  # noqa: F401 - they fill the table of operators
    _mil_constexpr,
    _mil_image,
    _mil_nn,
    _mil_ops,
    _mil_places,
    _mil_recurrent,
    _mil_shape,
)
from ._mil_allowed import Allowed, allowed_shapes
from ._mil_block import Scope, read_block, refuse_unknown
from ._mil_flow import StateCell
from ._mil_package import Package, Type, Value, read_package
from ._mil_registry import OPSETS
from ._mil_run import Block, Step, run_block, to_half

__all__ = ["MilProgram", "State", "load_package"]

State: TypeAlias = dict[str, StateCell]
"""The states of a program by name, as :meth:`MilProgram.make_state` gives them; calls write into it."""


class MilProgram:
    """A loaded program that can be called; fulfils ``edgekd.protocols.Runner``.

    Attributes:
        path: Of the package.
        runtime: Name and version of the evaluator, and the precision of the program.
        opset: The operator set that the program declares: ``CoreML7`` is that of iOS 17.
        inputs, outputs: As the package declares them, in its order; -1 where several sizes are taken.
        states: Names and declared types of what lasts from call to call.
        steps: The operators in the order in which they run; constants are no steps.
        metadata: The package's ``userDefined`` texts.
    """

    def __init__(self, package: Package, function: str | None = None) -> None:
        description = package.model.description
        functions = package.model.mlProgram.functions
        name = function or description.defaultFunctionName or "main"
        if name not in functions:
            raise ModelFileError(f"{package.path} has no function {name!r}; there are {', '.join(functions) or 'none'}")
        proto = functions[name]
        self.path = package.path
        self.opset: str = proto.opset
        self.metadata: dict[str, str] = dict(description.metadata.userDefined)
        _check_opset(package, proto)
        block = proto.block_specializations[proto.opset]
        types = {value.name: package.type_of(value.type) for value in proto.inputs}
        self.states = {name: kind for name, kind in types.items() if kind.state}
        self._input_names = tuple(name for name in types if name not in self.states)
        refuse_unknown(block.operations)
        scope = Scope(types, {})
        self._block: Block = read_block(package, block, proto.opset, scope)
        self._types = types
        missing = [n for n in self._block.outputs if n not in types]
        if missing:
            raise ModelFileError(f"{package.path} declares the output {missing[0]!r}, which nothing computes")
        # Several functions have a description each; else that of the model speaks of its one function.
        features = next((d for d in description.functions if d.name == name), description)
        meanings = {f.name: f.shortDescription for f in (*features.input, *features.output)}
        order = {f.name: i for i, f in enumerate(features.output)}
        self._output_names = tuple(sorted(self._block.outputs, key=lambda n: order.get(n, len(order))))
        self._allowed: dict[str, Allowed] = {f.name: allowed_shapes(f) for f in features.input}
        self.inputs = tuple(self._spec(n, meanings) for n in self._input_names)
        self.outputs = tuple(self._spec(n, meanings) for n in self._output_names)
        halves = any(kind.kind == "FLOAT16" for step in self.steps for _, kind in step.outputs)
        self.runtime = f"edgekd MIL evaluator {version('edgekd')} ({'fp16' if halves else 'fp32'})"

    @property
    def steps(self) -> tuple[Step, ...]:
        return self._block.steps

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes of the first axis of the first input: all of a list, the smallest ones of a range, or the only one."""
        first = self.inputs[0]
        size = first.shape[0] if first.shape else 1
        return (size,) if size != -1 else self._allowed[first.name].first_sizes(len(first.shape))

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an input may have that shape."""
        declared = self._types[name].shape or ()
        fits = len(shape) == len(declared) and all(w in (-1, g) for w, g in zip(declared, shape, strict=True))
        return fits and self._allowed.get(name, Allowed()).takes(shape)

    def make_state(self) -> State:
        """States as Core ML starts them: zeros."""
        return {
            name: StateCell(torch.zeros(kind.shape or (), dtype=kind.storage)) for name, kind in self.states.items()
        }

    def __call__(self, inputs: Arrays, state: State | None = None) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: By the file's names and in its shapes; integer types are cast to the file's.
            state: From :meth:`make_state`, changed by the call; a fresh one when None.

        Returns:
            Outputs by the file's names. A classifier's label is an array of text; its dictionary of probabilities an
            array in the order of the labels.

        Raises:
            DataError: An input is missing or has another shape or kind; an index leaves its table.
            ModelFileError: An operator's result is not what the file declares.
        """
        values = self.run(inputs, self._output_names, state)
        return {name: _to_array(values[name], self._types[name]) for name in self._output_names}

    def run(self, inputs: Arrays, names: Iterable[str] | None = None, state: State | None = None) -> dict[str, Value]:
        """Run once and give any values by name, as tensors: to find the first operator that goes astray.

        Args:
            inputs, state: As for a call.
            names: Which to give; all of the program's (constants too, but none inside of loops) when None.
        """
        values = self._start(inputs, state)
        with torch.inference_mode():
            run_block(self._block, values)
        return values if names is None else {name: values[name] for name in names}

    def first_overflow(self, inputs: Arrays, state: State | None = None) -> str | None:
        """The first operator that half precision cannot hold, in one line; None when all is finite.

        That is: its result is declared half, and is infinite or not a number though all that it read was finite.
        """
        found: list[str] = []

        def watch(step: Step, arguments: dict[str, Any], results: tuple[Value, ...]) -> None:
            if found or not all(_finite(value) for value in (*step.constants.values(), *arguments.values())):
                return
            for (name, declared), result in zip(step.outputs, results, strict=True):
                if declared.kind != "FLOAT16" or not isinstance(result, Tensor) or _finite(to_half(result)):
                    continue
                largest = float(result.nan_to_num(nan=0.0).abs().max())
                problem = "gives what is not a number" if result.isnan().any() else f"reaches {largest:.3g}"
                found.append(f"operator {step.operator.name!r} (output {name!r}) {problem}; float16 ends at 65504")
                return

        values = self._start(inputs, state)
        with torch.inference_mode():
            run_block(self._block, values, watch)
        return found[0] if found else None

    def _start(self, inputs: Arrays, state: State | None) -> dict[str, Value]:
        cells = self.make_state() if state is None else state
        if set(cells) != set(self.states):
            raise DataError(f"{self.path.name} has the states {', '.join(self.states) or 'none'}; see make_state")
        return {**{name: self._input(name, inputs) for name in self._input_names}, **cells}

    def _input(self, name: str, inputs: Arrays) -> Tensor:
        declared, allowed = self._types[name], self._allowed.get(name, Allowed())
        if name in inputs:
            array = np.asarray(inputs[name])
        elif allowed.default is not None:
            array = np.full([max(1, size) for size in declared.shape or ()], allowed.default, dtype=declared.dtype)
        else:
            raise DataError(f"{self.path.name} takes {', '.join(self._input_names)}; {name!r} was not given")
        shape = declared.shape or ()
        if array.ndim != len(shape) or any(w not in (-1, g) for w, g in zip(shape, array.shape, strict=True)):
            raise DataError(f"input {name!r} of {self.path.name} takes {shape}; the data is {array.shape}")
        if not allowed.takes(array.shape):
            raise DataError(f"input {name!r} of {self.path.name} takes {allowed}; the data is {array.shape}")
        if np.issubdtype(array.dtype, np.floating) != declared.kind.startswith("FLOAT"):
            raise DataError(f"input {name!r} of {self.path.name} takes {declared.dtype}; the data is {array.dtype}")
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(declared.storage)
        return to_half(tensor) if declared.kind == "FLOAT16" else tensor

    def _spec(self, name: str, meanings: dict[str, str]) -> TensorSpec:
        declared = self._types[name]
        return TensorSpec(name, declared.shape or (), declared.dtype, meanings.get(name, ""))


def load_package(path: Path, function: str | None = None) -> MilProgram:
    """Read a ``.mlpackage`` and make a program of it ready to run; any ML Program, whoever made it.

    Args:
        path: Of the package.
        function: Of a package with several; its default when None.

    Raises:
        ModelFileError: The package is damaged, or holds no ML Program or no such function.
        ExportError: The program uses an operator that the evaluator does not know; the message names it.
        MissingToolchainError: coremltools is not installed.
    """
    return MilProgram(read_package(path), function)


def _check_opset(package: Package, function: Any) -> None:
    """The operator set is known, there is a block for it, and the package's version is not older."""
    opset = function.opset
    if opset not in OPSETS:
        raise ModelFileError(f"{package.path} uses the operator set {opset!r}; the evaluator knows {', '.join(OPSETS)}")
    if opset not in function.block_specializations:
        raise ModelFileError(f"{package.path} has no block for its opset {opset!r}")
    system, needed = OPSETS[opset]
    found = package.model.specificationVersion
    if found < needed:
        raise ModelFileError(
            f"{package.path} uses the operator set {opset} ({system}), which takes specification version {needed}; "
            f"the package declares {found}"
        )


def _finite(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_finite(item) for item in value)
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(value.isfinite().all())


def _to_array(value: Value, declared: Type) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.array([value])
    array: np.ndarray = value.numpy()
    return array.astype(declared.dtype) if declared.shape is not None else array
