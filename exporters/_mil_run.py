"""The steps of a program, running them, and holding each result against what the file declares.

Half precision: values are held as float32 and rounded to float16 after every operator whose output is declared so.
Inside an operator (the sum of a convolution, the mean of a layer_norm) the precision is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from edgekd.errors import DataError, ExportError, ModelFileError, first_line

from ._mil_package import Type, Value, tensor_shape
from ._mil_registry import Operator, to_python

__all__ = ["Block", "Step", "Watch", "check_result", "compute", "run_block", "to_half"]


@dataclass(frozen=True)
class Step:
    """One operator of a program, bound to its constants.

    Attributes:
        operator: From the table.
        constants: Arguments that are known, in the operator's form.
        reads: Parameter to the name (or names) of the values it reads when run.
        outputs: Name and declared type of each result.
        blocks: Of ``cond`` and ``while_loop``: what they run.
    """

    operator: Operator
    constants: dict[str, Any]
    reads: tuple[tuple[str, str | tuple[str, ...]], ...]
    outputs: tuple[tuple[str, Type], ...]
    blocks: tuple[Block, ...] = ()

    @functools.cached_property
    def label(self) -> str:
        output = f" (output {self.outputs[0][0]!r})" if self.outputs else ""
        return f"operator {self.operator.name!r}{output}"


@dataclass(frozen=True)
class Block:
    """Steps that run in order: a whole program, or a branch or loop inside one.

    Attributes:
        inputs: Names of the values that it is given; it also reads what stands around it.
        constants: Known values by name.
        outputs: Names of the values that it gives.
    """

    inputs: tuple[str, ...]
    constants: dict[str, Value]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]


Watch: TypeAlias = "Callable[[Step, dict[str, Any], tuple[Value, ...]], None]"
"""Told of every step that ran: its arguments, and its results before they are rounded."""

# What torch raises when shapes, types or indices do not fit.
_TORCH_ERRORS = (RuntimeError, IndexError, TypeError, ValueError, KeyError, NotImplementedError)


def run_block(block: Block, values: dict[str, Value], watch: Watch | None = None) -> None:
    """Run a block; ``values`` are what it can read, and gain all that it computes."""
    values.update(block.constants)
    for step in block.steps:
        arguments = {
            key: values[source] if isinstance(source, str) else tuple(values[name] for name in source)
            for key, source in step.reads
        }
        if step.blocks:
            results = _run_flow(step, step.constants | arguments, values, watch)
        else:
            results = compute(step, arguments)
        if watch is not None:
            watch(step, arguments, results)
        for (name, declared), result in zip(step.outputs, results, strict=True):
            values[name] = check_result(step, name, declared, result)


def compute(step: Step, arguments: dict[str, Any]) -> tuple[Value, ...]:
    """Results of one step, not yet rounded.

    Raises:
        ModelFileError: The arguments do not fit the operator.
    """
    forms = step.operator.forms
    try:
        for key, value in arguments.items():
            if not isinstance(value, Tensor) or forms[key] is not Tensor:
                arguments[key] = to_python(forms[key], value)
        result = step.operator.function(**step.constants, **arguments)
    except (DataError, ModelFileError, ExportError) as error:
        raise type(error)(f"{step.label}: {error}") from error
    except _TORCH_ERRORS as error:
        raise ModelFileError(f"{step.label} cannot be computed: {first_line(error)}") from error
    # A list is a tuple too, but the operators that give one have one result.
    several = isinstance(result, tuple) and not (len(step.outputs) == 1 and step.outputs[0][1].kind == "LIST")
    results = tuple(result) if several else (result,)
    if len(results) != len(step.outputs):
        raise ModelFileError(f"{step.label} gives {len(results)} results; the file declares {len(step.outputs)}")
    return results


def check_result(step: Step, name: str, declared: Type, result: Value) -> Value:
    """The result, rounded where it is declared half, once its type and shape are those that the file declares.

    Raises:
        ModelFileError: They are not.
    """
    if not isinstance(result, Tensor) or declared.shape is None:
        return result
    shape = tensor_shape(result)
    if shape != declared.shape and (
        len(shape) != len(declared.shape) or any(w not in (-1, g) for w, g in zip(declared.shape, shape, strict=True))
    ):
        raise ModelFileError(f"{step.label}: {name!r} comes out as {shape}; the file declares {declared.shape}")
    if result.dtype != declared.storage:
        raise ModelFileError(f"{step.label}: {name!r} comes out as {result.dtype}; the file declares {declared.dtype}")
    return to_half(result) if declared.kind == "FLOAT16" and not step.operator.moves else result


def to_half(value: Tensor) -> Tensor:
    """Round to float16 and back; what is too large becomes infinite, as in half precision."""
    return value.to(torch.float16).to(torch.float32)


def _run_flow(
    step: Step, arguments: dict[str, Any], values: dict[str, Value], watch: Watch | None
) -> tuple[Value, ...]:
    """``cond`` runs one of its blocks; ``while_loop`` its second as long as its first says so."""
    if step.operator.name == "cond":
        return _call(step.blocks[0 if bool(arguments["pred"]) else 1], (), values, watch)
    condition, body = step.blocks
    variables: tuple[Value, ...] = arguments["loop_vars"]
    while bool(_call(condition, variables, values, watch)[0]):
        variables = _call(body, variables, values, watch)
    return variables


def _call(block: Block, given: tuple[Value, ...], outer: dict[str, Value], watch: Watch | None) -> tuple[Value, ...]:
    values = outer | dict(zip(block.inputs, given, strict=True))
    run_block(block, values, watch)
    return tuple(values[name] for name in block.outputs)
