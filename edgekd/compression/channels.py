"""Channels that can be removed: which layers make them, which read them, and which must agree on them.

A residual sum, a product or a depthwise convolution ties the channels of all its sides together: they are removed
together or not at all. What this file does not know, an output, a concatenation, or a weight with two readers keeps all
the channels that it touches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgekd.programs.fold import attribute
from edgekd.programs.layers import CONVOLUTIONS, LINEAR

__all__ = ["Channels", "find_channels", "remove_channels"]

_ATEN = torch.ops.aten
_KEEPING = {
    _ATEN.relu.default,
    _ATEN.relu6.default,
    _ATEN.hardtanh.default,
    _ATEN.clamp.default,
    _ATEN.hardswish.default,
    _ATEN.hardsigmoid.default,
    _ATEN.silu.default,
    _ATEN.gelu.default,
    _ATEN.sigmoid.default,
    _ATEN.tanh.default,
    _ATEN.leaky_relu.default,
    _ATEN.max_pool2d.default,
    _ATEN.avg_pool2d.default,
    _ATEN.adaptive_avg_pool2d.default,
    _ATEN.contiguous.default,
    _ATEN.clone.default,
    _ATEN.upsample_nearest2d.vec,
}
_TYING = {_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor}
_FLATTENING = {_ATEN.view.default, _ATEN.reshape.default, _ATEN.flatten.using_ints}


@dataclass
class Channels:
    """Channels that are removed together.

    Attributes:
        count: How many there are.
        makers: Layers with one row of weights a channel; depthwise ones among them.
        readers: Layers that read them, and how many inputs belong to one channel (a flattened image).
        views: Nodes whose sizes name them, and how many numbers stand for one channel.
        fixed: Whether something needs all of them.
    """

    count: int
    makers: list[Node] = field(default_factory=list)
    readers: list[tuple[Node, int]] = field(default_factory=list)
    views: list[tuple[Node, int]] = field(default_factory=list)
    fixed: bool = False


def find_channels(module: GraphModule) -> list[Channels]:
    """All groups of channels of which some can be removed, in the order of the graph.

    Args:
        module: Float, batch norm folded (``edgekd.programs.fold.folded_module``).
    """
    return _Finder(module).run()


class _Finder:
    """Walks the graph once; tied groups become one."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.groups: list[Channels] = []
        self.of: dict[Node, tuple[Channels, int]] = {}  # channels of a tensor, and numbers of one side by side
        self.uses: dict[str, int] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.uses[str(node.target)] = self.uses.get(str(node.target), 0) + len(node.users)

    def run(self) -> list[Channels]:
        for node in self.module.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                self._fix(node)
        return [group for group in self.groups if group.makers and not group.fixed]

    def _visit(self, node: Node) -> None:
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        known = self.of.get(source) if source is not None else None
        if node.target in CONVOLUTIONS | LINEAR and self._is_own(node):
            self._layer(node, known)
        elif known is None:
            self._fix(node)
        elif node.target in _KEEPING or _pools_all(node) or _pads(node):
            self.of[node] = known
        elif node.target in _TYING:
            self._tie(node)
        elif node.target in _FLATTENING and (times := _flattened(node, known[1])) is not None:
            self.of[node] = known[0], times
            known[0].views.append((node, times))
        else:
            self._fix(node)

    def _layer(self, node: Node, known: tuple[Channels, int] | None) -> None:
        weight = self._shape(node)
        groups = _groups(node)
        if groups > 1:
            depthwise = groups == weight[0] and weight[1] == 1 and known is not None and known[1] == 1
            if not depthwise:
                self._fix(node)
                return
            assert known is not None
            known[0].makers.append(node)
            self.of[node] = known
            return
        if known is not None:
            channel_axis = node.target in CONVOLUTIONS or len(_value(node.args[0]).shape) == 2
            if channel_axis and known[0].count * known[1] == weight[1]:
                known[0].readers.append((node, known[1]))
            else:
                known[0].fixed = True
        made = Channels(weight[0], [node])
        self.groups.append(made)
        if node.target in CONVOLUTIONS or len(_value(node).shape) == 2:
            self.of[node] = made, 1  # else they stand on another axis, and are left alone
        else:
            made.fixed = True

    def _tie(self, node: Node) -> None:
        sides = [argument for argument in node.args[:2] if isinstance(argument, Node)]
        found = [self.of.get(side) for side in sides]
        first = found[0]
        if first is None or any(f is None or f[1] != first[1] or f[0].count != first[0].count for f in found):
            self._fix(node)
            return
        if len(sides) == 2 and {len(_value(side).shape) for side in sides} != {len(_value(node).shape)}:
            self._fix(node)
            return
        for other in found[1:]:
            assert other is not None
            self._merge(first[0], other[0])
        self.of[node] = first

    def _merge(self, kept: Channels, gone: Channels) -> None:
        if kept is gone:
            return
        kept.makers += [maker for maker in gone.makers if maker not in kept.makers]
        kept.readers += gone.readers
        kept.views += gone.views
        kept.fixed |= gone.fixed
        self.groups.remove(gone)
        for node, (group, times) in self.of.items():
            if group is gone:
                self.of[node] = kept, times

    def _fix(self, node: Node) -> None:
        """Keep all channels of what a node reads."""
        for source in node.all_input_nodes:
            if source in self.of:
                self.of[source][0].fixed = True

    def _is_own(self, node: Node) -> bool:
        constants = [argument for argument in node.args[1:3] if argument is not None]
        return all(isinstance(c, Node) and c.op == "get_attr" and self.uses[str(c.target)] == 1 for c in constants)

    def _shape(self, node: Node) -> torch.Size:
        return attribute(self.module, str(node.args[1].target)).shape


def remove_channels(module: GraphModule, group: Channels, keep: Tensor) -> None:
    """Keep only some channels of a group, in place.

    Args:
        keep: Their numbers, (kept,), ascending.
    """
    for maker in group.makers:
        for position in (1, 2):
            constant = maker.args[position] if len(maker.args) > position else None
            if isinstance(constant, Node):
                _replace(module, str(constant.target), attribute(module, str(constant.target))[keep])
        if _groups(maker) > 1:
            maker.update_arg(6, len(keep))
    for reader, times in group.readers:
        name = str(reader.args[1].target)
        columns = (keep[:, None] * times + torch.arange(times)).reshape(-1)
        _replace(module, name, attribute(module, name)[:, columns])
    for view, times in group.views:
        if view.target is _ATEN.flatten.using_ints:
            continue
        sizes = list(view.args[1])
        sizes[1] = len(keep) * times if sizes[1] == group.count * times else sizes[1]
        view.update_arg(1, sizes)
    module.recompile()


def _replace(module: GraphModule, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    value = value.detach().clone()
    holder = module.get_submodule(owner)
    setattr(holder, leaf, torch.nn.Parameter(value, requires_grad=False) if leaf in holder._parameters else value)


def _groups(layer: Node) -> int:
    groups = layer.args[6] if layer.target in CONVOLUTIONS and len(layer.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def _value(node: object) -> Tensor:
    assert isinstance(node, Node)
    value: Tensor = node.meta["val"]
    return value


def _pools_all(node: Node) -> bool:
    """Whether a node is a mean over places."""
    return node.target is _ATEN.mean.dim and 1 not in [axis % len(_value(node.args[0]).shape) for axis in node.args[1]]


def _pads(node: Node) -> bool:
    """Whether a node pads places, not channels."""
    return node.target is _ATEN.constant_pad_nd.default and len(node.args[1]) <= 4


def _flattened(node: Node, times: int) -> int | None:
    """Numbers of one channel that stand side by side in (batch, features); None for another shape."""
    old, new = _value(node.args[0]).shape, _value(node).shape
    if len(new) != 2 or any(not isinstance(size, int) for size in old[1:]):
        return None
    places = 1
    for size in old[2:]:
        places *= int(size)
    return times * places if new[1] == old[1] * places else None
