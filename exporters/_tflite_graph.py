"""Quantize and dequantize nodes in the form that LiteRT's converter fuses; the numbers stay the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgekd.precisions import WIDE
from edgekd.programs.fold import attribute, clean, set_constant
from edgekd.types import Precision

from ._padding import hoist_above_padding, merge_padding

__all__ = ["prepare", "program_precision"]

_ATEN = torch.ops.aten

_FIXED_OUTPUTS = {
    _ATEN.sigmoid.default: (1 / 256, -128),
    _ATEN.softmax.int: (1 / 256, -128),
    _ATEN._softmax.default: (1 / 256, -128),
    _ATEN.tanh.default: (1 / 128, 0),
    _ATEN.log_softmax.int: (16 / 256, 127),
    _ATEN._log_softmax.default: (16 / 256, 127),
}
"""Scale and zero point of the only int8 output that LiteRT's plain kernels of these operators accept."""


_WITHOUT_INT16 = {_ATEN.gelu.default, _ATEN.hardswish.default, _ATEN.elu.default, _ATEN.log_softmax.int}


def _operators() -> Any:
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

    return torch.ops.quantized_decomposed


def _quantized_weights(module: GraphModule) -> list[Node]:
    """Dequantize nodes that read a constant."""
    operators = _operators()
    targets = {operators.dequantize_per_channel.default, operators.dequantize_per_tensor.default}
    return [
        node
        for node in module.graph.nodes
        if node.target in targets and isinstance(node.args[0], Node) and node.args[0].op == "get_attr"
    ]


def prepare(module: GraphModule) -> GraphModule:
    """All of this file, in place: the same numbers, in the form that the converter translates best.

    Int16 activations become int8 ones of 256 times their scale (``_tflite_edit.widen_activations`` turns them back):
    the converter knows no int16 operator but a few.
    """
    narrow_activations(module)
    for rewrite in (
        _unfold_weights,
        hoist_above_padding,
        merge_padding,
        _pool_instead_of_mean,
        _keep_float_where_scales_are_fixed,
    ):
        rewrite(module)
    return clean(module)


def program_precision(module: GraphModule) -> Precision:
    """What a program holds: ``w8a8`` with int8 activations, ``w8a16`` with int16 ones, ``w8`` with quantized weights
    only, else ``fp32``."""
    quantize = _operators().quantize_per_tensor.default
    dtypes = {node.args[5] for node in module.graph.nodes if node.target is quantize}
    if dtypes:
        return WIDE if torch.int16 in dtypes else "w8a8"
    return "w8" if _quantized_weights(module) else "fp32"


def _unfold_weights(module: GraphModule) -> None:
    """Int8 constants as float constants that are quantized in the graph, in place.

    The converter refuses to dequantize a constant, and folds this pair into the same integers: they are whole multiples
    of their scale, so rounding finds them again.
    """
    operators = _operators()
    paired = {
        operators.dequantize_per_channel.default: operators.quantize_per_channel.default,
        operators.dequantize_per_tensor.default: operators.quantize_per_tensor.default,
    }
    for node in _quantized_weights(module):
        constant = node.args[0]
        arguments = [_value(module, argument) for argument in node.args]
        weight = node.target(*arguments)
        float_constant = set_constant(module, f"{constant.target}_float", weight, node)
        with module.graph.inserting_before(node):
            quantized = module.graph.call_function(paired[node.target], (float_constant, *node.args[1:]))
        node.update_arg(0, quantized)


def _pool_instead_of_mean(module: GraphModule) -> None:
    """Turn the mean over height and width into a global pool and a reshape, in place.

    The converter knows how to pool with the channels last; before a mean it transposes everything back.
    """
    operators = _operators()
    for node in [node for node in module.graph.nodes if node.target is _ATEN.mean.dim and not node.kwargs]:
        source, axes, keep = node.args[0], node.args[1], len(node.args) > 2 and node.args[2]
        value = source.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim != 4 or sorted(axis % 4 for axis in axes or ()) != [2, 3]:
            continue
        first = next(iter(node.users), None)
        quantize = operators.quantize_per_tensor.default
        quantized = first is not None and all(
            user.target is quantize and user.args[1:] == first.args[1:] for user in node.users
        )
        with module.graph.inserting_before(node):
            pooled = module.graph.call_function(_ATEN.adaptive_avg_pool2d.default, (source, [1, 1]))
            if quantized and first is not None:  # quantize what is pooled, so that the reshape only moves integers
                integers = module.graph.call_function(quantize, (pooled, *first.args[1:]))
                pooled = module.graph.call_function(
                    operators.dequantize_per_tensor.default, (integers, *first.args[1:])
                )
            if not keep:
                pooled = module.graph.call_function(_ATEN.flatten.using_ints, (pooled, 1))
        node.replace_all_uses_with(pooled)
        module.graph.erase_node(node)


def narrow_activations(module: GraphModule) -> int:
    """See :func:`prepare`; operators without an int16 kernel stay float. Returns how many nodes were changed."""
    operators = _operators()
    changed = 0
    for node in list(module.graph.nodes):
        if node.target in (operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default):
            if node.args[5] == torch.int16:
                node.args = (node.args[0], node.args[1] * 256, 0, -128, 127, torch.int8)
                changed += 1
        elif changed and node.target in _WITHOUT_INT16 and isinstance(node.args[0], Node):
            _keep_float(module, node)
    return changed


def _keep_float_where_scales_are_fixed(module: GraphModule) -> None:
    """Keep an operator in float whose int8 kernel would demand another output scale than the program's, in place.

    The converter makes an int8 operator of whatever stands between a dequantize and a quantize node. Doubling and
    halving, which is exact and which it does not fold away, comes in between.
    """
    operators = _operators()
    for node in list(module.graph.nodes):
        source = node.args[0] if node.args else None
        if node.target not in _FIXED_OUTPUTS or not isinstance(source, Node):
            continue
        quantize = operators.quantize_per_tensor.default
        scales = [user.args[1:3] for user in node.users if user.target is quantize]
        if any(tuple(scale) != _FIXED_OUTPUTS[node.target] for scale in scales):
            _keep_float(module, node)


def _keep_float(module: GraphModule, node: Node) -> None:
    with module.graph.inserting_before(node):
        doubled = module.graph.call_function(_ATEN.mul.Tensor, (node.args[0], 2.0))
        halved = module.graph.call_function(_ATEN.mul.Tensor, (doubled, 0.5))
    node.update_arg(0, halved)


def _value(module: GraphModule, argument: Any) -> Any:
    if isinstance(argument, Node):
        value = attribute(module, str(argument.target))
        assert isinstance(value, Tensor)
        return value
    return argument
