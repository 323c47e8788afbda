"""Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, section 4.1): the same function, evener channels.

Scaling a channel of one layer down and the matching inputs of the next layer up changes nothing in float, as long as
what lies between keeps its shape under scaling: relu, pooling, moving. One scale for a whole tensor then wastes no
levels on channels that are far smaller than others, which depthwise convolutions make.

relu6 does not scale. There a channel is only changed where its bounds prove that it reaches 6 neither before nor after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from edgekd.programs.fold import attribute, pads_with_zero
from edgekd.programs.layers import CONVOLUTIONS, LINEAR

__all__ = ["Pair", "equalize", "pairs_of"]

_ATEN = torch.ops.aten
_ROUNDS = 20
_SMALLEST, _LARGEST = 1e-3, 1e3  # of a channel's scale, so that no weight leaves float32's comfortable range

_SCALING = {
    _ATEN.relu.default,
    _ATEN.max_pool2d.default,
    _ATEN.avg_pool2d.default,
    _ATEN.adaptive_avg_pool2d.default,
    _ATEN.mean.dim,
    _ATEN.contiguous.default,
    _ATEN.clone.default,
    _ATEN.upsample_nearest2d.vec,
}
_FLATTENING = {
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN.flatten.using_ints,
    _ATEN.squeeze.dims,
    _ATEN.squeeze.dim,
}


@dataclass(frozen=True)
class Pair:
    """Two layers whose common channels can be scaled.

    Attributes:
        first, second: Nodes of the layers; the second alone reads the first.
        repeat: Inputs of a linear layer that belong to one channel (a flattened image), else 1.
        clip: Where an activation between them stops growing (6 for relu6); None where it does not.
    """

    first: Node
    second: Node
    repeat: int
    clip: float | None


def equalize(module: GraphModule) -> int:
    """Even out the channels of all pairs of layers, in place; the float function stays the same.

    Returns:
        How many pairs were changed.
    """
    pairs = pairs_of(module)
    if not pairs:
        return 0
    with torch.no_grad():
        for _ in range(_ROUNDS):  # a layer between two others belongs to two pairs
            if max(_scale(module, pair) for pair in pairs) < 1.01:
                break
    return len(pairs)


def pairs_of(module: GraphModule) -> list[Pair]:
    """All pairs of layers between which nothing forbids scaling."""
    readers: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)] = readers.get(str(node.target), 0) + len(node.users)
    found = []
    for node in module.graph.nodes:
        if _is_layer(node, readers) and (pair := _pair_from(node, readers)) is not None:
            found.append(pair)
    return found


def _is_layer(node: Node, readers: dict[str, int]) -> bool:
    """Whether a node is a layer with constants of its own."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS | LINEAR:
        return False
    constants = [argument for argument in node.args[1:3] if argument is not None]
    return all(isinstance(c, Node) and c.op == "get_attr" and readers[str(c.target)] == 1 for c in constants)


def _pair_from(first: Node, readers: dict[str, int]) -> Pair | None:
    clip: float | None = None
    node, repeat = first, 1
    while True:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if not user.args or user.args[0] is not node:
            return None
        if _is_layer(user, readers):
            break
        ends = _clamp_ends(user)
        if ends is not None:
            if ends[0] != 0 or clip is not None:
                return None
            clip = ends[1]
        elif user.target in _FLATTENING:
            if (times := _flattened(node, user)) is None:
                return None
            repeat *= times
        elif (user.target is _ATEN.mean.dim and 1 in [axis % _rank(node) for axis in user.args[1]]) or (
            user.target not in _SCALING and not pads_with_zero(user)
        ):
            return None
        node = user
    channels, inputs = _weight_shape(first)[0], _weight_shape(user)[1]
    axis = 1 if first.target in CONVOLUTIONS else _rank(first) - 1
    if user.target in LINEAR and (_rank(node) - 1 if first.target in LINEAR else 1) != _rank(node) - 1:
        return None  # the linear layer reads another axis than the channels
    if user.target in CONVOLUTIONS and axis != 1:
        return None
    groups = _groups(user)
    if groups == 1:
        return Pair(first, user, repeat, clip) if channels * repeat == inputs else None
    depthwise = groups == channels and inputs == 1 and repeat == 1
    return Pair(first, user, 1, clip) if depthwise else None


def _scale(module: GraphModule, pair: Pair) -> float:
    """Scale one pair so that both layers have the same range in every channel; returns the largest change."""
    first, second = _value(module, pair.first, 1), _value(module, pair.second, 1)
    assert first is not None
    assert second is not None
    outgoing = first.abs().flatten(1).amax(1).double()
    depthwise = _groups(pair.second) > 1
    # The ranges of the second layer, input by input: a depthwise one has its inputs on the axis of its outputs.
    rows = second if depthwise else second.transpose(0, 1)
    if depthwise:
        incoming = rows.reshape(len(outgoing), -1).abs().amax(1).double()
    else:
        incoming = rows.reshape(len(outgoing), -1).abs().amax(1).double()
    alive = (outgoing > 0) & (incoming > 0)
    scales = torch.where(alive, (outgoing / incoming.clamp_min(1e-30)).sqrt(), torch.ones_like(outgoing))
    scales = scales.clamp(_SMALLEST, _LARGEST)
    if pair.clip is not None:
        bound = _upper_bound(module, pair.first)
        below = bound < pair.clip
        # Divided by its scale, the bound must stay below the clip as well.
        scales = torch.where(below, torch.maximum(scales, bound / pair.clip), torch.ones_like(scales))
    bias = _value(module, pair.first, 2)
    first.div_(_along(scales, first, 0).to(first.dtype))
    if bias is not None:
        bias.div_(scales.to(bias.dtype))
    spread = scales if depthwise else scales.repeat_interleave(pair.repeat)
    second.mul_(_along(spread, second, 0 if depthwise else 1, len(second) if depthwise else None).to(second.dtype))
    return float(torch.maximum(scales, 1 / scales).max())


def _along(scales: Tensor, weight: Tensor, axis: int, rows: int | None = None) -> Tensor:
    """Scales in a shape that multiplies a weight along an axis."""
    if rows is not None and rows != len(scales):  # a depthwise layer that makes several outputs of each input
        scales = scales.repeat_interleave(rows // len(scales))
    return scales.reshape([-1 if other == axis else 1 for other in range(weight.ndim)])


def _upper_bound(module: GraphModule, layer: Node) -> Tensor:
    """What each channel of a layer cannot exceed, whatever comes in; infinite where nothing bounds what comes in."""
    weight = _value(module, layer, 1)
    assert weight is not None
    source = layer.args[0]
    ends = _clamp_ends(source) if isinstance(source, Node) else None
    if ends is None or ends[0] != 0 or ends[1] is None:
        return torch.full((len(weight),), torch.inf, dtype=torch.float64)
    bias = _value(module, layer, 2)
    most = weight.double().clamp_min(0).flatten(1).sum(1) * ends[1]
    return (most if bias is None else most + bias.double()).clamp_min(0)


def _clamp_ends(node: Node) -> tuple[float, float | None] | None:
    """Both ends of an activation that clamps from zero; None for other nodes."""
    if node.target is _ATEN.relu6.default:
        return 0.0, 6.0
    if node.target in (_ATEN.hardtanh.default, _ATEN.clamp.default):
        defaults = (-1.0, 1.0) if node.target is _ATEN.hardtanh.default else (None, None)
        low, high = (*node.args[1:], *defaults[len(node.args) - 1 :])[:2]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        if isinstance(low, int | float) and (high is None or isinstance(high, int | float)):
            return float(low), None if high is None else float(high)
    return None


def _flattened(before: Node, node: Node) -> int | None:
    """How many numbers of each channel lie side by side afterwards; None where channels do not stay together."""
    old, new = before.meta["val"].shape, node.meta["val"].shape
    if len(old) < 2 or len(new) < 2:
        return None
    if len(new) == 2 and len(old) > 2 and all(isinstance(size, int) for size in old[1:]):
        times = 1
        for size in old[2:]:
            times *= size
        return times if new[1] == old[1] * times else None
    return 1 if old[1] == new[1] and len(old) == 2 else None


def _value(module: GraphModule, layer: Node, position: int) -> Tensor | None:
    """The constant at a position of a layer's arguments."""
    constant = layer.args[position] if len(layer.args) > position else None
    return attribute(module, str(constant.target)).detach() if isinstance(constant, Node) else None


def _weight_shape(layer: Node) -> torch.Size:
    weight = layer.args[1]
    assert isinstance(weight, Node)
    shape: torch.Size = weight.meta["val"].shape
    return shape


def _groups(layer: Node) -> int:
    groups = layer.args[6] if layer.target in CONVOLUTIONS and len(layer.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def _rank(node: Node) -> int:
    return len(node.meta["val"].shape)
