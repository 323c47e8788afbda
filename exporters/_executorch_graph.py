"""A program in the form that ExecuTorch's XNNPACK partitioner takes whole; the numbers stay the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekd.errors import ExportError
from edgekd.programs.fold import attribute, clean, folded_module, set_constant
from edgekd.programs.layers import CONVOLUTIONS, LINEAR
from edgekd.programs.tracing import retrace

from ._padding import hoist_above_padding, merge_padding

__all__ = ["prepared"]

_ATEN = torch.ops.aten


def prepared(program: ExportedProgram, *, dynamic: bool) -> ExportedProgram:
    """The program for a batch of one.

    Args:
        program: As ``edgekd.compression.compress`` made it.
        dynamic: Linear layers with int8 weights quantize their inputs as they come, one scale a row.

    Raises:
        ExportError: ``dynamic``, and there is no linear layer or embedding with int8 weights.
        ModelFileError: The program has a dynamic axis besides the batch.
    """
    module = folded_module(program)
    for rewrite in (hoist_above_padding, merge_padding, _quantize_after_padding):
        rewrite(module)
    operators = _operators()
    found = 0
    for node in list(module.graph.nodes):
        if node.target is not operators.dequantize_per_channel.default:
            continue
        for user in list(node.users):
            if user.target is _ATEN.embedding.default and user.args[0] is node:
                _gather_then_dequantize(module, node, user)
                found += 1
            elif dynamic and user.target in LINEAR and user.args[1] is node:
                _quantize_input(module, user)
                found += 1
            elif not _computes_in_integers(user, node):
                user.replace_input_with(node, _folded(module, node))
    if dynamic and not found:
        raise ExportError(
            "w8d8 quantizes linear layers and embeddings, and this model has none; take w8a8, which quantizes "
            "convolutions too"
        )
    return retrace(clean(module), program, batch=1)


def _operators() -> Any:
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

    return torch.ops.quantized_decomposed


def _computes_in_integers(layer: Node, weight: Node) -> bool:
    """Whether XNNPACK has an integer kernel for a layer with this weight: only where its input is quantized, too."""
    if layer.target not in CONVOLUTIONS | LINEAR or layer.args[1] is not weight:
        return False
    data = layer.args[0]
    return isinstance(data, Node) and data.target in {
        _operators().dequantize_per_tensor.default,
        _operators().dequantize_per_token.default,
    }


def _gather_then_dequantize(module: GraphModule, table: Node, gather: Node) -> None:
    """Gather int8 rows and their scales, and multiply these: a whole table would be made float in every inference."""
    integers, scales = table.args[0], table.args[1]
    ids = gather.args[1]
    assert isinstance(scales, Node)
    column = attribute(module, str(scales.target)).reshape(-1, 1)
    scale = set_constant(module, f"{scales.target}_column", column, gather)
    call: Callable[..., Node] = module.graph.call_function
    with module.graph.inserting_before(gather):
        rows = call(_ATEN.to.dtype, (call(_ATEN.embedding.default, (integers, ids)), torch.float32))
        product = call(_ATEN.mul.Tensor, (rows, call(_ATEN.embedding.default, (scale, ids))))
    gather.replace_all_uses_with(product)
    module.graph.erase_node(gather)


def _quantize_input(module: GraphModule, layer: Node) -> None:
    """Quantize and dequantize the input of a layer with a scale that is taken from each of its rows."""
    operators = _operators()
    data, call = layer.args[0], module.graph.call_function
    with module.graph.inserting_before(layer):
        chosen = call(operators.choose_qparams_per_token_asymmetric.default, (data, torch.int8))
        scale, zero = (call(operator.getitem, (chosen, index)) for index in (0, 1))
        bounds = (-128, 127, torch.int8)
        integers = call(operators.quantize_per_token.default, (data, scale, zero, *bounds))
        layer.update_arg(
            0, call(operators.dequantize_per_token.default, (integers, scale, zero, *bounds, torch.float32))
        )


def _quantize_after_padding(module: GraphModule) -> None:
    """Quantize again, with the same scale, what is padded after it was dequantized: a convolution takes integers only.

    An input of the program is padded in float, and quantized once. (XNNPACK's padding is in float in ExecuTorch 1.5.)
    """
    operators = _operators()
    for pad in [node for node in module.graph.nodes if node.target is _ATEN.constant_pad_nd.default]:
        source, users = pad.args[0], list(pad.users)
        if not isinstance(source, Node) or source.target is not operators.dequantize_per_tensor.default:
            continue
        quantized, arguments = source.args[0], source.args[1:]
        assert isinstance(quantized, Node)
        if isinstance(quantized.args[0], Node) and quantized.args[0].op == "placeholder" and len(source.users) == 1:
            pad.update_arg(0, quantized.args[0])
        for user in users:
            if user.target not in CONVOLUTIONS:
                continue
            with module.graph.inserting_before(user):
                integers = module.graph.call_function(operators.quantize_per_tensor.default, (pad, *arguments))
                user.update_arg(0, module.graph.call_function(source.target, (integers, *arguments)))


def _folded(module: GraphModule, node: Node) -> Node:
    """The float weight that a dequantize node makes of a constant, as a constant."""
    values = [
        attribute(module, str(argument.target)) if isinstance(argument, Node) else argument for argument in node.args
    ]
    source = node.args[0]
    assert isinstance(source, Node)
    return set_constant(module, f"{source.target}_float", node.target(*values), node, parameter=True)
