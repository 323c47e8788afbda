"""From the messages of a program to steps that can be run: names resolved, constants bound, unknown things refused."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from edgekd.errors import ExportError, ModelFileError

from ._mil_package import Package, Type, Value
from ._mil_registry import OPERATORS, OPSETS, REFUSED, Operator, Tensors, to_python
from ._mil_run import Block, Step, check_result, compute

__all__ = ["Scope", "read_block", "refuse_unknown"]


@dataclass(frozen=True)
class Scope:
    """What is known at a place of the program: its own values in front of those around it."""

    types: MutableMapping[str, Type]
    constants: MutableMapping[str, Value]

    def inner(self) -> Scope:
        return Scope(ChainMap({}, self.types), ChainMap({}, self.constants))


def read_block(package: Package, proto: Any, opset: str, scope: Scope) -> Block:
    """Bind a block.

    Args:
        proto: The ``Block`` message.
        opset: Of the function, which says what operators there are.
        scope: Is extended by what the block defines.

    Raises:
        ModelFileError: The block reads what is not there, or uses what its operator set lacks.
        ExportError: An operator has an argument that the evaluator does not know.
    """
    constants: dict[str, Value] = {}
    steps: list[Step] = []
    for operation in proto.operations:
        outputs = tuple((value.name, package.type_of(value.type)) for value in operation.outputs)
        scope.types.update(outputs)
        if operation.type == "const":
            constants[outputs[0][0]] = package.value_of(operation.attributes["val"])
        else:
            step = _read_step(package, operation, opset, scope, outputs)
            if not operation.type.startswith("constexpr_") or step.reads:
                steps.append(step)
                continue
            with torch.inference_mode():
                results = compute(step, {})
            for (name, declared), result in zip(outputs, results, strict=True):
                constants[name] = check_result(step, name, declared, result)
        scope.constants.update(constants)
    return Block(tuple(value.name for value in proto.inputs), constants, tuple(steps), tuple(proto.outputs))


def refuse_unknown(operations: Any) -> None:
    """Name what the evaluator cannot compute, before anything is read.

    Raises:
        ExportError: There is such an operator, here or in a block inside.
    """
    unknown = [op for op in _all(operations) if op.type != "const" and op.type not in OPERATORS]
    if not unknown:
        return
    first = unknown[0]
    output = first.outputs[0].name if first.outputs else "none"
    if first.type in REFUSED:
        raise ExportError(
            f"the evaluator does not compute the Core ML operator {first.type!r} (output {output!r}): "
            f"{REFUSED[first.type]}"
        )
    others = sorted({op.type for op in unknown} - {first.type})
    more = f"; nor {', '.join(others)}" if others else ""
    raise ExportError(f"the evaluator does not know the Core ML operator {first.type!r} (output {output!r}){more}")


def _all(operations: Any) -> Iterator[Any]:
    for operation in operations:
        yield operation
        for block in operation.blocks:
            yield from _all(block.operations)


def _read_step(
    package: Package, operation: Any, opset: str, scope: Scope, outputs: tuple[tuple[str, Type], ...]
) -> Step:
    known = OPERATORS[operation.type]
    label = Step(known, {}, (), outputs).label
    _require_opset(package, label, known.since, opset)
    constants: dict[str, Any] = {
        key: package.value_of(value) for key, value in operation.attributes.items() if key in known.forms
    }
    reads: list[tuple[str, str | tuple[str, ...]]] = []
    for key, argument in operation.inputs.items():
        if key not in known.forms:
            raise ExportError(f"{label} has an argument {key!r} that the evaluator does not know")
        _require_opset(package, f"{label}: its argument {key!r}", known.later.get(key, known.since), opset)
        _bind(package, known, key, list(argument.arguments), scope, constants, reads)
    absent = [key for key in known.required if key not in constants and key not in {name for name, _ in reads}]
    if absent:
        raise ModelFileError(f"{package.path}: {label} lacks its argument {absent[0]!r}")
    for key, value in constants.items():
        try:
            constants[key] = to_python(known.forms[key], value)
        except ExportError as error:
            raise ExportError(f"{label}: argument {key!r} {error}") from error
    return Step(known, constants, tuple(reads), outputs, _read_blocks(package, operation, opset, scope, label))


def _read_blocks(package: Package, operation: Any, opset: str, scope: Scope, label: str) -> tuple[Block, ...]:
    """Blocks of ``cond`` (true, false) and ``while_loop`` (condition, body)."""
    expected = 2 if operation.type in ("cond", "while_loop") else 0
    if len(operation.blocks) != expected:
        raise ModelFileError(f"{package.path}: {label} has {len(operation.blocks)} blocks; it takes {expected}")
    blocks = []
    for proto in operation.blocks:
        inner = scope.inner()
        inner.types.update({value.name: package.type_of(value.type) for value in proto.inputs})
        block = read_block(package, proto, opset, inner)
        missing = [name for name in block.outputs if name not in inner.types]
        if missing:
            raise ModelFileError(f"{package.path}: a block of {label} gives {missing[0]!r}, which nothing computes")
        blocks.append(block)
    return tuple(blocks)


def _require_opset(package: Package, what: str, since: str, opset: str) -> None:
    names = list(OPSETS)
    if names.index(since) > names.index(opset):
        raise ModelFileError(
            f"{package.path}: {what} is of {since} ({OPSETS[since][0]}); the program declares {opset} "
            f"({OPSETS[opset][0]})"
        )


def _bind(
    package: Package,
    known: Operator,
    key: str,
    bindings: list[Any],
    scope: Scope,
    constants: dict[str, Any],
    reads: list[tuple[str, str | tuple[str, ...]]],
) -> None:
    """An argument is a constant when all that it names are constants, else it is read when the program runs."""
    several = known.forms[key] == Tensors
    found: list[Any] = []
    for binding in bindings:
        if binding.WhichOneof("binding") == "value":
            found.append(package.value_of(binding.value))
        elif binding.name in scope.constants:
            found.append(scope.constants[binding.name])
        elif binding.name not in scope.types:
            raise ModelFileError(f"{package.path}: operator {known.name!r} reads {binding.name!r} before it is there")
    if len(found) == len(bindings):
        constants[key] = tuple(found) if several else found[0]
    elif any(binding.WhichOneof("binding") == "value" for binding in bindings):
        raise ExportError(f"the Core ML operator {known.name!r} mixes values and names in its argument {key!r}")
    else:
        names = tuple(binding.name for binding in bindings)
        reads.append((key, names if several else names[0]))
