"""Quantize and dequantize nodes as Core AI's own operators; the numbers stay the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekd.errors import ExportError
from edgekd.programs.fold import attribute, clean, folded_module, free_name, set_constant
from edgekd.programs.tracing import retrace

__all__ = ["prepared"]


def prepared(program: ExportedProgram) -> ExportedProgram:
    """The program for a batch of one, with ``coreai::quantize`` and ``coreai::dequantize``.

    Raises:
        ExportError: A quantize node clips to other bounds than those of its type, which the format has no place for.
        ModelFileError: The program has a dynamic axis besides the batch.
    """
    from coreai_torch._compression import custom_layers  # noqa: F401 - registers the operators
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

    source, target = torch.ops.quantized_decomposed, torch.ops.coreai
    module = folded_module(program)
    for node in list(module.graph.nodes):
        if node.target in (source.quantize_per_tensor.default, source.quantize_per_channel.default):
            data, scale, zero, axis, dtype = _arguments(module, node)
            _check_bounds(node)
            _replace(module, node, target.quantize.default, (data, scale, dtype, zero, None, axis))
        elif node.target in (source.dequantize_per_tensor.default, source.dequantize_per_channel.default):
            data, scale, zero, axis, dtype = _arguments(module, node)
            _replace(module, node, target.dequantize.default, (data, scale, zero, None, axis, dtype, torch.float32))
    return retrace(clean(module), program, batch=1)


def _arguments(module: GraphModule, node: Node) -> tuple[Any, Node, Node, int, torch.dtype]:
    """Of a node: its data, scale and zero point (as constants), axis and integer type."""
    per_channel = "per_channel" in str(node.target)
    dtype = node.args[6] if per_channel else node.args[5]
    assert isinstance(dtype, torch.dtype)
    values = [
        attribute(module, str(argument.target)).detach() if isinstance(argument, Node) else torch.tensor(argument)
        for argument in node.args[1:3]
    ]
    axis = int(node.args[3]) if per_channel else 0
    return (
        node.args[0],
        _constant(module, node, values[0].float()),
        _constant(module, node, values[1].to(dtype)),
        axis,
        dtype,
    )


def _constant(module: GraphModule, before: Node, value: Tensor) -> Node:
    return set_constant(module, free_name(module, "quantization"), value, before)


def _check_bounds(node: Node) -> None:
    dtype = node.args[-1]
    assert isinstance(dtype, torch.dtype)
    bounds, limits = tuple(node.args[-3:-1]), torch.iinfo(dtype)
    if bounds != (limits.min, limits.max):
        raise ExportError(f"Core AI quantizes to {limits.min}..{limits.max}; the program's {node.name!r} to {bounds}")


def _replace(module: GraphModule, node: Node, operator: Any, arguments: tuple[Any, ...]) -> None:
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(module.graph.call_function(operator, arguments))
    module.graph.erase_node(node)
