"""Which operators of a program are layers with a weight: convolutions, transposed ones, linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

__all__ = ["CONVOLUTIONS", "LINEAR", "TRANSPOSED", "is_transposed", "transposed_groups"]

_ATEN = torch.ops.aten

CONVOLUTIONS = {
    _ATEN.conv1d.default,
    _ATEN.conv1d.padding,
    _ATEN.conv2d.default,
    _ATEN.conv2d.padding,
    _ATEN.conv3d.default,
    _ATEN.conv3d.padding,
}
TRANSPOSED = {_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input}
LINEAR = {_ATEN.linear.default}


def is_transposed(layer: Node) -> bool:
    """Whether a convolution is a transposed one: its weight has the outputs on axis 1."""
    return layer.target in TRANSPOSED or (layer.target is _ATEN.convolution.default and bool(layer.args[6]))


def transposed_groups(layer: Node) -> int:
    """Groups of a transposed convolution."""
    position = 8 if layer.target is _ATEN.convolution.default else 6
    groups: Any = layer.args[position] if len(layer.args) > position else 1
    return int(groups)
