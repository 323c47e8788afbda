"""A program that stores and computes in half precision, between inputs and outputs that stay float."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from edgekd.programs.fold import attribute, clean, folded_module, set_constant
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import retrace

__all__ = ["halved"]

_LARGEST = torch.finfo(torch.float16).max


def halved(program: ExportedProgram, keep: Collection[Any] = ()) -> ExportedProgram:
    """The program for a batch of one with every float32 number in float16, and casts at its inputs and outputs.

    A finite number beyond what float16 holds becomes the largest that it does: masks are often made of the smallest
    float32, and as infinity they would turn a row of which everything is masked into NaN.

    Args:
        program: In fp32.
        keep: Operators that compute in float32, between casts.

    Raises:
        ModelFileError: The program cannot be traced in half, or has a dynamic axis besides the batch.
    """
    module = folded_module(program)
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]  # of other names: fx avoids Python's own
    wide = {n for n, spec in zip(placeholders, input_specs(program), strict=True) if spec.dtype == "float32"}
    outputs = [spec.dtype for spec in output_specs(program)]
    to = torch.ops.aten.to.dtype
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = attribute(module, str(node.target))
            if value.dtype == torch.float32:
                half = set_constant(module, f"{node.target}_half", _narrow_tensor(value), node)
                node.replace_all_uses_with(half)
        elif node.op == "call_function" and node.target in keep:
            with graph.inserting_before(node):
                for source in node.all_input_nodes:
                    node.replace_input_with(source, graph.call_function(to, (source, torch.float32)))
            with graph.inserting_after(node):
                half = graph.call_function(to, (node, torch.float16))
            node.replace_all_uses_with(half, delete_user_cb=lambda user, half=half: user is not half)
        elif node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map(_narrow, (node.args, dict(node.kwargs)))
    for node in list(graph.nodes):
        if node in wide:
            with graph.inserting_after(node):
                cast = graph.call_function(to, (node, torch.float16))
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        elif node.op == "output":
            leaves, spec = pytree.tree_flatten(node.args[0])
            with graph.inserting_before(node):
                leaves = [
                    graph.call_function(to, (leaf, torch.float32)) if dtype == "float32" else leaf
                    for leaf, dtype in zip(leaves, outputs, strict=True)
                ]
            node.args = (pytree.tree_unflatten(leaves, spec),)
    return retrace(clean(module), program, batch=1)


def _narrow(argument: Any) -> Any:
    """A type or a number among the arguments of an operator, in half."""
    if argument is torch.float32:
        return torch.float16
    if isinstance(argument, float) and _LARGEST < abs(argument) < float("inf"):
        return _LARGEST if argument > 0 else -_LARGEST
    return argument


def _narrow_tensor(value: Tensor) -> Tensor:
    finite = torch.where(torch.isinf(value), value, value.clamp(-_LARGEST, _LARGEST))
    return finite.detach().to(torch.float16)
