"""Rewrites of an ONNX graph into the form that ONNX Runtime is fast on, each of which leaves the numbers as they are.

A quantized program arrives as int8 ``QuantizeLinear`` and ``DequantizeLinear`` nodes, number for number. On x86 ONNX
Runtime fuses them into integer operators only where activations are uint8 and where nothing stands between an operator
and its ``QuantizeLinear``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = [
    "drop_requantized",
    "drop_saturated",
    "drop_unused",
    "gather_then_dequantize",
    "multiply_weights",
    "own_zero_points",
    "pad_in_convolutions",
    "pool_globally",
    "quantize_tables",
    "tidy",
    "transpose_weights",
    "unsigned_activations",
]


def tidy(graph: ir.Graph) -> None:
    """Drop torch's notes on where each node comes from, and rename what shares the name of an output.

    torch 2.13 gives outputs the names it is asked for and does not look whether an inner value has the name already.
    """
    taken = {value.name: value for value in graph.outputs}
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value.name in taken and value is not taken[value.name]:
                value.name = f"{value.name}_inner"


def drop_unused(graph: ir.Graph) -> None:
    """Drop nodes and constants that nothing reads."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


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
            _replace(graph, node, source)
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
        points = [_array(reader.inputs[2]) if len(reader.inputs) > 2 else None for reader in (node, *readers)]
        if any(reader.op_type != "DequantizeLinear" for reader in readers):
            continue
        if any(point is None or point.dtype != np.int8 or point.ndim for point in points):
            continue
        for reader, point in zip((node, *readers), points, strict=True):
            assert point is not None
            shifted = np.asarray(point.astype(np.int16) + 128, np.uint8)
            reader.replace_input_with(2, _constant(graph, f"{node.outputs[0].name}_zero_point", shifted))
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
        pads, source = _array(node.inputs[1]), node.inputs[0]
        if pads is None or source is None or pads[:2].any() or pads[len(pads) // 2 :][:2].any():
            continue
        half = len(pads) // 2
        around = [int(pad) for pad in (*pads[2:half], *pads[half + 2 :])]
        value = node.outputs[0]
        for step in ("QuantizeLinear", "DequantizeLinear"):
            users = [user for user, _ in value.uses()]
            if len(users) == 1 and users[0].op_type == step and not users[0].outputs[0].is_graph_output():
                value = users[0].outputs[0]
        readers = [(user, position) for user, position in value.uses()]
        if not readers or value.is_graph_output():
            continue
        if any(user.op_type != "Conv" or position or not _pads_explicitly(user) for user, position in readers):
            continue
        for user, _ in readers:
            own = user.attributes["pads"].as_ints() if "pads" in user.attributes else [0] * len(around)
            total = [a + b for a, b in zip(own, around, strict=True)]
            user.attributes["pads"] = ir.AttrInt64s("pads", total)
        _replace(graph, node, source)
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
        arrays = [(_array(a), _array(b)) for a, b in pairs]
        if len(arrays) < 2 or any(
            a is None or b is None or a.dtype != b.dtype or not np.array_equal(a, b) for a, b in arrays
        ):
            continue
        _replace(graph, node, before.inputs[0])
        if not before.outputs[0].uses() and not before.outputs[0].is_graph_output():
            graph.remove(before, safe=True)
        dropped += 1
    return dropped


def transpose_weights(graph: ir.Graph) -> int:
    """Turn int8 weights in the file, where a Transpose turns them after each ``DequantizeLinear``.

    Returns:
        How many were turned.
    """
    turned = 0
    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if before is None or before.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
            continue
        integers = _array(before.inputs[0])
        if integers is None or before.inputs[0] is None or "perm" not in node.attributes:
            continue
        order = list(node.attributes["perm"].as_ints())
        axis = before.attributes["axis"].as_int() if "axis" in before.attributes else 1
        name = f"{before.inputs[0].name}_transposed"
        weight = _constant(graph, name, np.ascontiguousarray(integers.transpose(order)))
        dequantize = ir.node("DequantizeLinear", [weight, *before.inputs[1:]], {"axis": order.index(axis)})
        output = dequantize.outputs[0]
        output.name = f"{node.outputs[0].name}_dequantized"
        output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, dequantize)
        _replace(graph, node, output)
        if not before.outputs[0].uses():
            graph.remove(before, safe=True)
        turned += 1
    return turned


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
        axes, source = _array(node.inputs[1]), node.inputs[0]
        keeps = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        if axes is None or not keeps or source.shape is None or len(source.shape) != 4:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3] or _producer(source) != "DequantizeLinear":
            continue
        if [user.op_type for user, _ in node.outputs[0].uses()] != ["QuantizeLinear"]:
            continue
        pool = ir.node("GlobalAveragePool", [source], name=node.name)
        pool.outputs[0].type, pool.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, pool)
        _replace(graph, node, pool.outputs[0])
        rewritten += 1
    return rewritten


def quantize_tables(graph: ir.Graph) -> int:
    """Put float tables that rows are gathered from (embeddings) in int8 with one scale a row, as ``w8`` programs do.

    Returns:
        How many tables were quantized.
    """
    tables = [node.inputs[0] for node in graph if _gathers_rows(node)]
    quantized = 0
    for table in dict.fromkeys(value for value in tables if value is not None):
        weight = _array(table)
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            continue
        scales = np.maximum(np.abs(weight).max(axis=1) / np.float32(127), np.finfo(np.float32).eps).astype(np.float32)
        integers = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
        for node, position in list(table.uses()):
            if _gathers_rows(node) and position == 0:
                inputs = [
                    _constant(graph, f"{table.name}_int8", integers),
                    _constant(graph, f"{table.name}_scale", scales),
                ]
                dequantize = ir.node("DequantizeLinear", inputs, {"axis": 0})
                dequantize.outputs[0].name = f"{table.name}_dequantized"
                graph.insert_before(node, dequantize)
                node.replace_input_with(0, dequantize.outputs[0])
        quantized += 1
    return quantized


def gather_then_dequantize(graph: ir.Graph) -> int:
    """Gather int8 rows and dequantize these, where a whole table is dequantized to gather a few of its rows.

    An integer times its row's scale is the same number on either side of the gather.

    Returns:
        How many gathers were rewritten.
    """
    rewritten = 0
    for node in list(graph):
        table = node.inputs[0] if _gathers_rows(node) else None
        dequantize = table.producer() if table is not None else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        integers, scales, *points = dequantize.inputs
        values = _array(scales)
        zeros = not any(point is None or point.any() for point in map(_array, points))
        axis = dequantize.attributes["axis"].as_int() if "axis" in dequantize.attributes else 1
        if values is None or values.ndim != 1 or axis != 0 or not zeros or integers is None or integers.shape is None:
            continue
        if len(integers.shape) != 2:
            continue
        name = node.outputs[0].name
        column = _constant(graph, f"{integers.name}_row_scale", values[:, None])
        rows = ir.node("Gather", [integers, node.inputs[1]], {"axis": 0})
        cast = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
        factors = ir.node("Gather", [column, node.inputs[1]], {"axis": 0})
        product = ir.node("Mul", [cast.outputs[0], factors.outputs[0]])
        new = {rows: "int8", cast: "float", factors: "row_scale", product: "dequantized"}
        for part, suffix in new.items():
            part.outputs[0].name = f"{name}_{suffix}"
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, list(new))
        _replace(graph, node, product.outputs[0])
        if not dequantize.outputs[0].uses():
            graph.remove(dequantize, safe=True)
        rewritten += 1
    return rewritten


def multiply_weights(graph: ir.Graph) -> int:
    """Write the ``DequantizeLinear`` of a constant as a cast and a product where the reader computes in float anyway.

    Same numbers; but ONNX Runtime computes cast and product once, when it loads the file, and ``DequantizeLinear`` at
    every inference, or it quantizes the activations too (``MatMulNBits``), which nobody asked for.

    Returns:
        How many were rewritten.
    """
    rewritten = 0
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
            continue
        integers, scales = _array(node.inputs[0]), _array(node.inputs[1])
        point = _array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
        if integers is None or scales is None or point is None or point.any() or _feeds_integers(node.outputs[0]):
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        shape = [-1 if other == axis else 1 for other in range(integers.ndim)] if scales.ndim else []
        name = node.outputs[0].name
        factors = _constant(graph, f"{name}_scale", scales.reshape(shape))
        cast = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [cast.outputs[0], factors])
        cast.outputs[0].name, product.outputs[0].name = f"{name}_cast", f"{name}_product"
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, [cast, product])
        _replace(graph, node, product.outputs[0])
        rewritten += 1
    return rewritten


def _feeds_integers(weight: ir.Value) -> bool:
    """Whether a dequantized weight is read by a layer whose data is dequantized too: one that runs in integers."""
    for reader, _ in weight.uses():
        if reader.op_type == "Transpose":
            if _feeds_integers(reader.outputs[0]):
                return True
        elif reader.inputs[0] is not weight and _producer(reader.inputs[0]) == "DequantizeLinear":
            return True
    return False


def own_zero_points(graph: ir.Graph) -> None:
    """Give every ``DequantizeLinear`` of a constant a zero point of its own.

    ONNX Runtime 1.32 turns int8 weights into uint8 where that is asked for (``session.x64quantprecision``), and fails
    on a zero point that two of them share ("Attempt to replace the existing tensor").
    """
    for node in graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 and _array(node.inputs[0]) is not None:
            point = _array(node.inputs[2])
            if point is not None:
                node.replace_input_with(2, _constant(graph, f"{node.outputs[0].name}_zero_point", point, shared=False))


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or a Clip with constant bounds keeps its values between."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    limits = []
    for position, default in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[position] if len(node.inputs) > position else None
        array = np.asarray(default) if value is None else _array(value)
        if array is None:
            return None
        limits.append(float(array))
    return limits[0], limits[1]


def _saturates(quantize: ir.Node, lower: float, upper: float) -> bool:
    """Whether a ``QuantizeLinear`` maps these bounds to its smallest and its largest integer."""
    scale = _array(quantize.inputs[1])
    point = _array(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if scale is None or point is None or scale.ndim or point.ndim or point.dtype not in (np.int8, np.uint8):
        return False
    limits = np.iinfo(point.dtype)
    # As ONNX Runtime computes it: float32 division, ties to even.
    low = np.rint(np.float32(lower) / scale) + np.float32(point)
    high = np.rint(np.float32(upper) / scale) + np.float32(point)
    return bool(low <= limits.min and high >= limits.max)


def _pads_with_zero(node: ir.Node) -> bool:
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    value = _array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    return mode == "constant" and axes is None and value is not None and not value.any()


def _pads_explicitly(convolution: ir.Node) -> bool:
    return "auto_pad" not in convolution.attributes or convolution.attributes["auto_pad"].as_string() == "NOTSET"


def _gathers_rows(node: ir.Node) -> bool:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return node.op_type == "Gather" and axis == 0


def _producer(value: ir.Value | None) -> str:
    producer = None if value is None else value.producer()
    return "" if producer is None else producer.op_type


def _array(value: ir.Value | None) -> np.ndarray | None:
    """The value of a constant, also of one that is cast: torch leaves the cast of a long zero point in the graph."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        source = _array(producer.inputs[0])
        kind = ir.DataType(producer.attributes["to"].as_int())
        return None if source is None else source.astype(kind.numpy())
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _constant(graph: ir.Graph, name: str, array: np.ndarray, *, shared: bool = True) -> ir.Value:
    """A constant of that name: the one that is there where it is the same and may be shared, else a new one."""
    while name in graph.initializers:
        present = _array(graph.initializers[name])
        if shared and present is not None and present.dtype == array.dtype and np.array_equal(present, array):
            return graph.initializers[name]
        name += "_"
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let another value take the place of a node's one output, also of its name where that is the graph's output."""
    old = node.outputs[0]
    if old.is_graph_output():
        name = old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name, value.name = f"{name}_replaced", name
    else:
        old.replace_all_uses_with(value)
    graph.remove(node, safe=True)
