"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): outliers of activations moved into weights; the function stays.

A few channels of a transformer's hidden state are a hundred times larger than the others, and one scale for the whole
tensor then rounds the others away. What a linear layer reads is divided channel by channel, and the columns of its
weight are multiplied by the same numbers. The division is folded into the layer norm before, where only such linear
layers read it; elsewhere (BERT's layer norm also feeds the residual stream) it is one multiplication, shared by all
layers that read the same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from edgekd.compression.static import interpret
from edgekd.programs.fold import attribute, free_name, set_constant
from edgekd.programs.layers import CONVOLUTIONS, LINEAR
from edgekd.protocols import Arrays

__all__ = ["ALPHA", "OUTLIER", "smooth"]

ALPHA = 0.5
"""Share of the difficulty that moves into the weights; the paper's choice for most models."""

OUTLIER = 4.0
"""A tensor is smoothed when its largest channel is so many times its median one: below, there is nothing to move."""

_ATEN = torch.ops.aten
_FLOAT = {_ATEN.gelu.default, _ATEN.silu.default, _ATEN.tanh.default, _ATEN.sigmoid.default, _ATEN.softmax.int}
_SAMPLES = 32


def smooth(module: GraphModule, program: ExportedProgram, samples: Arrays) -> int:
    """Smooth what linear layers read, in place; the float function stays the same.

    Args:
        module: Float, batch norm folded.
        samples: Show the range of every channel; the first 32 are looked at.

    Returns:
        How many tensors were smoothed.
    """
    layers = _readers(module)
    ranges = _Ranges(module, layers)
    interpret(ranges, program, samples, _SAMPLES)
    count = 0
    with torch.no_grad():
        for source, linears in layers.items():
            largest = ranges.largest[source.name]
            if float(largest.max()) < OUTLIER * float(largest.median().clamp_min(1e-12)):
                continue
            weights = [attribute(module, str(linear.args[1].target)) for linear in linears]
            columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
            factors = largest.clamp_min(1e-5) ** ALPHA / columns.clamp_min(1e-5) ** (1 - ALPHA)
            factors = factors.clamp_min(1e-5)
            for weight in weights:
                weight.mul_(factors)
            _divide(module, source, linears, factors)
            count += 1
    module.recompile()
    return count


def _readers(module: GraphModule) -> dict[Node, list[Node]]:
    """By what they read, the linear layers that have a constant weight of their own."""
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    layers: dict[Node, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in LINEAR:
            source, weight = node.args[:2]
            own = isinstance(weight, Node) and weight.op == "get_attr" and uses[str(weight.target)] == 1
            if own and not _comes_in_integers(source):
                layers.setdefault(source, []).append(node)
    return layers


def _comes_in_integers(node: Node) -> bool:
    """Whether a tensor comes out of a quantized layer: a multiplication in float would tear the two apart."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1 and node.target not in _FLOAT:
        node = node.all_input_nodes[0]
    return node.op == "call_function" and node.target in CONVOLUTIONS | LINEAR


class _Ranges(Interpreter):
    """Runs a module and takes the largest absolute value of each channel (last axis) of some tensors."""

    def __init__(self, module: GraphModule, sources: Mapping[Node, Any]) -> None:
        super().__init__(module)
        self.sources = {node.name for node in sources}
        self.largest: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.sources:
            self.largest[n.name] = value.abs().reshape(-1, value.shape[-1]).amax(0)
        return value


def _divide(module: GraphModule, source: Node, linears: list[Node], factors: Tensor) -> None:
    """Divide what some linear layers read."""
    foldable = (
        source.target is _ATEN.layer_norm.default
        and set(source.users) == set(linears)
        and len(source.args[1]) == 1
        and all(isinstance(c, Node) and c.op == "get_attr" and len(c.users) == 1 for c in source.args[2:4])
        and len(source.args) >= 4
    )
    if foldable:
        for constant in source.args[2:4]:
            attribute(module, str(constant.target)).detach().div_(factors)
        return
    name = free_name(module, f"{source.name}_smooth")
    with module.graph.inserting_after(source):
        # The node is made first: the constant must stand before it.
        divided = module.graph.call_function(_ATEN.mul.Tensor, (source, source))
    divided.meta["val"] = source.meta["val"]
    divided.args = (source, set_constant(module, name, 1 / factors, divided))
    for linear in linears:
        linear.replace_input_with(source, divided)
