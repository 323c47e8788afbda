"""Quantized activations in the form that ONNX Runtime runs in integers; the numbers stay the same.

A quantized program arrives as int8 ``QuantizeLinear`` and ``DequantizeLinear`` nodes, number for number. On x86 ONNX
Runtime fuses them into integer operators only where activations are uint8 and where nothing stands between an operator
and its ``QuantizeLinear``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._onnx_graph import add_constant, array_of, producer_type, replace_node

__all__ = [
    "drop_requantized",
    "drop_saturated",
    "pad_in_convolutions",
    "pool_globally",
    "unsigned_activations",
]


def drop_saturated(graph: ir.Graph) -> int:
    """Drop every Relu and Clip of whose range a following ``QuantizeLinear`` lets nothing out anyway.

    Where all readers are ``QuantizeLinear`` that map the lower bound to their smallest integer and the upper bound to
    their largest, what lies beyond the bounds saturates to the same integers: the numbers stay the same.

    Returns:
        How many were dropped.
    """
    dropped = 0
    for node in list(graph):
        bounds = _bounds(node)
        if bounds is None or node.outputs[0].is_graph_output():
            continue
        readers = [user for user, _ in node.outputs[0].uses()]
        if readers and all(reader.op_type == "QuantizeLinear" and _saturates(reader, *bounds) for reader in readers):
            source = node.inputs[0]
            assert source is not None
            replace_node(graph, node, source)
            dropped += 1
    return dropped


def unsigned_activations(graph: ir.Graph) -> int:
    """Turn int8 activations into uint8 with a zero point that is 128 larger: the same scales, the same numbers.

    Returns:
        How many tensors were turned.
    """
    turned = 0
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
            continue
        readers = [user for user, _ in node.outputs[0].uses()]
        points = [array_of(reader.inputs[2]) if len(reader.inputs) > 2 else None for reader in (node, *readers)]
        if any(reader.op_type != "DequantizeLinear" for reader in readers):
            continue
        if any(point is None or point.dtype != np.int8 or point.ndim for point in points):
            continue
        for reader, point in zip((node, *readers), points, strict=True):
            assert point is not None
            shifted = np.asarray(point.astype(np.int16) + 128, np.uint8)
            reader.replace_input_with(2, add_constant(graph, f"{node.outputs[0].name}_zero_point", shifted))
        node.outputs[0].dtype = ir.DataType.UINT8
        turned += 1
    return turned


def pad_in_convolutions(graph: ir.Graph) -> int:
    """Let convolutions pad with zeros themselves, where a Pad (and perhaps quantization) stands before them.

    Zero is quantized to the zero point, with which an integer convolution pads: the same numbers.

    Returns:
        How many Pads were dropped.
    """
    dropped = 0
    for node in list(graph):
        if node.op_type != "Pad" or node.outputs[0].is_graph_output() or not _pads_with_zero(node):
            continue
        pads, source = array_of(node.inputs[1]), node.inputs[0]
        if pads is None or source is None or (pads < 0).any() or pads[:2].any() or pads[len(pads) // 2 :][:2].any():
            continue
        half = len(pads) // 2
        around = [int(pad) for pad in (*pads[2:half], *pads[half + 2 :])]
        value, between = node.outputs[0], []
        for step in ("QuantizeLinear", "DequantizeLinear"):
            users = [user for user, _ in value.uses()]
            if len(users) == 1 and users[0].op_type == step and not users[0].outputs[0].is_graph_output():
                value = users[0].outputs[0]
                between.append(value)
        readers = [(user, position) for user, position in value.uses()]
        if not readers or value.is_graph_output():
            continue
        if any(user.op_type != "Conv" or position or not _pads_explicitly(user) for user, position in readers):
            continue
        for user, _ in readers:
            own = user.attributes["pads"].as_ints() if "pads" in user.attributes else [0] * len(around)
            total = [a + b for a, b in zip(own, around, strict=True)]
            user.attributes["pads"] = ir.AttrInt64s("pads", total)
        for smaller in between:
            smaller.shape = source.shape
        replace_node(graph, node, source)
        dropped += 1
    return dropped


def drop_requantized(graph: ir.Graph) -> int:
    """Drop quantizing again, with the same scale, of what was dequantized just before: the integers come out the same.

    Returns:
        How many pairs were dropped.
    """
    dropped = 0
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None or node.outputs[0].is_graph_output():
            continue
        before = node.inputs[0].producer()
        if before is None or before.op_type != "DequantizeLinear" or before.inputs[0] is None:
            continue
        pairs = zip(before.inputs[1:], node.inputs[1:], strict=False)
        arrays = [(array_of(a), array_of(b)) for a, b in pairs]
        if len(arrays) < 2 or any(
            a is None or b is None or a.dtype != b.dtype or not np.array_equal(a, b) for a, b in arrays
        ):
            continue
        replace_node(graph, node, before.inputs[0])
        if not before.outputs[0].uses() and not before.outputs[0].is_graph_output():
            graph.remove(before, safe=True)
        dropped += 1
    return dropped


def pool_globally(graph: ir.Graph) -> int:
    """Write a mean over both image axes between ``DequantizeLinear`` and ``QuantizeLinear`` as global average pooling.

    It is the same, but ONNX Runtime has an integer form only of the latter.

    Returns:
        How many were rewritten.
    """
    rewritten = 0
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2 or node.inputs[0] is None:
            continue
        axes, source = array_of(node.inputs[1]), node.inputs[0]
        keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        if axes is None or not keeps or source.shape is None or len(source.shape) != 4:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3] or producer_type(source) != "DequantizeLinear":
            continue
        if [user.op_type for user, _ in node.outputs[0].uses()] != ["QuantizeLinear"]:
            continue
        pool = ir.node("GlobalAveragePool", [source], name=node.name)
        pool.outputs[0].type, pool.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, pool)
        replace_node(graph, node, pool.outputs[0])
        rewritten += 1
    return rewritten


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or a Clip with constant bounds keeps its values between."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    limits = []
    for position, default in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[position] if len(node.inputs) > position else None
        array = np.asarray(default) if value is None else array_of(value)
        if array is None:
            return None
        limits.append(float(array))
    return limits[0], limits[1]


def _saturates(quantize: ir.Node, lower: float, upper: float) -> bool:
    """Whether a ``QuantizeLinear`` maps these bounds to its smallest and its largest integer."""
    scale = array_of(quantize.inputs[1])
    point = array_of(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if scale is None or point is None or scale.ndim or point.ndim or point.dtype not in (np.int8, np.uint8):
        return False
    limits = np.iinfo(point.dtype)
    # As ONNX Runtime computes it: float32 division, ties to even.
    low = np.rint(np.float32(lower) / scale) + np.float32(point)
    high = np.rint(np.float32(upper) / scale) + np.float32(point)
    return bool(low <= limits.min and high >= limits.max)


def _pads_with_zero(node: ir.Node) -> bool:
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    value = array_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    return mode == "constant" and axes is None and value is not None and not value.any()


def _pads_explicitly(convolution: ir.Node) -> bool:
    return "auto_pad" not in convolution.attributes or convolution.attributes["auto_pad"].as_string() == "NOTSET"
