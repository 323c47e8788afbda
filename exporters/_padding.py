"""Paddings with zeros put where converters merge them into the convolution behind; the numbers stay the same."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from edgekd.programs.fold import pads_with_zero

__all__ = ["hoist_above_padding", "merge_padding"]

_ATEN = torch.ops.aten


def hoist_above_padding(module: GraphModule) -> None:
    """Quantize before a padding with zeros instead of after it, in place; zero is always a quantized value.

    Between a padding and its convolution, the quantize and dequantize pair keeps the converter from merging the two,
    and leaves a transposition on each side: three operators that only move numbers.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

    operators = torch.ops.quantized_decomposed
    for pad in [node for node in module.graph.nodes if pads_with_zero(node)]:
        pairs = [(quantize, list(quantize.users)) for quantize in pad.users]
        first = next(iter(pad.users), None)
        if first is None or any(
            quantize.target is not operators.quantize_per_tensor.default
            or quantize.args[1:] != first.args[1:]
            or any(user.target is not operators.dequantize_per_tensor.default for user in users)
            for quantize, users in pairs
        ):
            continue
        source = pad.args[0]
        assert isinstance(source, Node)
        for _, users in pairs:
            for dequantize in users:
                dequantize.replace_all_uses_with(pad)
        if source.target is not operators.dequantize_per_tensor.default or source.args[1:] != first.args[1:]:
            with module.graph.inserting_before(pad):
                quantized = module.graph.call_function(first.target, (source, *first.args[1:]))
                source = module.graph.call_function(
                    operators.dequantize_per_tensor.default, (quantized, *first.args[1:])
                )
        pad.update_arg(0, source)


def merge_padding(module: GraphModule) -> None:
    """Merge a symmetric padding with zeros into the convolutions that read it, in place."""
    for pad in [node for node in module.graph.nodes if pads_with_zero(node)]:
        amounts = pad.args[1]
        if len(amounts) != 4 or amounts[0] != amounts[1] or amounts[2] != amounts[3] or min(amounts) < 0:
            continue
        for user in list(pad.users):
            if user.target is not _ATEN.conv2d.default or user.args[0] is not pad:
                continue
            arguments: list[Any] = [*user.args, *[None, [1, 1], [0, 0]][len(user.args) - 2 :]][: max(len(user.args), 5)]
            height, width = arguments[4] if len(arguments[4]) == 2 else arguments[4] * 2
            arguments[0] = pad.args[0]
            arguments[4] = [height + amounts[2], width + amounts[0]]
            user.args = tuple(arguments)
