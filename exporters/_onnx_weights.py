"""Constant weights in int8, in the form in which ONNX Runtime computes with them best; the numbers stay the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._onnx_graph import add_constant, array_of, producer_type, replace_node

__all__ = [
    "gather_then_dequantize",
    "multiply_weights",
    "own_zero_points",
    "quantize_tables",
    "store_in_4_bits",
    "transpose_weights",
]


def quantize_tables(graph: ir.Graph) -> int:
    """Put float tables that rows are gathered from (embeddings) in int8 with one scale a row, as ``w8`` programs do.

    Returns:
        How many tables were quantized.
    """
    tables = [node.inputs[0] for node in graph if _gathers_rows(node)]
    quantized = 0
    for table in dict.fromkeys(value for value in tables if value is not None):
        weight = array_of(table)
        if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            continue
        scales = np.maximum(np.abs(weight).max(axis=1) / np.float32(127), np.finfo(np.float32).eps).astype(np.float32)
        integers = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
        for node, position in list(table.uses()):
            if _gathers_rows(node) and position == 0:
                inputs = [
                    add_constant(graph, f"{table.name}_int8", integers),
                    add_constant(graph, f"{table.name}_scale", scales),
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
        values = array_of(scales)
        zeros = not any(point is None or point.any() for point in map(array_of, points))
        axis = dequantize.attributes["axis"].as_int() if "axis" in dequantize.attributes else 1
        if values is None or values.ndim != 1 or axis != 0 or not zeros or integers is None or integers.shape is None:
            continue
        if len(integers.shape) != 2:
            continue
        name = node.outputs[0].name
        column = add_constant(graph, f"{integers.name}_row_scale", values[:, None])
        rows = ir.node("Gather", [integers, node.inputs[1]], {"axis": 0})
        cast = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
        factors = ir.node("Gather", [column, node.inputs[1]], {"axis": 0})
        product = ir.node("Mul", [cast.outputs[0], factors.outputs[0]])
        new = {rows: "int8", cast: "float", factors: "row_scale", product: "dequantized"}
        for part, suffix in new.items():
            part.outputs[0].name = f"{name}_{suffix}"
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, list(new))
        replace_node(graph, node, product.outputs[0])
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
        integers, scales = array_of(node.inputs[0]), array_of(node.inputs[1])
        point = array_of(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
        if integers is None or scales is None or point is None or point.any() or _feeds_integers(node.outputs[0]):
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        shape = [-1 if other == axis else 1 for other in range(integers.ndim)] if scales.ndim else []
        name = node.outputs[0].name
        factors = add_constant(graph, f"{name}_scale", scales.reshape(shape))
        cast = ir.node("Cast", [node.inputs[0]], {"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [cast.outputs[0], factors])
        cast.outputs[0].name, product.outputs[0].name = f"{name}_cast", f"{name}_product"
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, [cast, product])
        replace_node(graph, node, product.outputs[0])
        rewritten += 1
    return rewritten


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
        integers = array_of(before.inputs[0])
        if integers is None or before.inputs[0] is None or "perm" not in node.attributes:
            continue
        order = list(node.attributes["perm"].as_ints())
        axis = before.attributes["axis"].as_int() if "axis" in before.attributes else 1
        name = f"{before.inputs[0].name}_transposed"
        weight = add_constant(graph, name, np.ascontiguousarray(integers.transpose(order)))
        dequantize = ir.node("DequantizeLinear", [weight, *before.inputs[1:]], {"axis": order.index(axis)})
        output = dequantize.outputs[0]
        output.name = f"{node.outputs[0].name}_dequantized"
        output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, dequantize)
        replace_node(graph, node, output)
        if not before.outputs[0].uses():
            graph.remove(before, safe=True)
        turned += 1
    return turned


def own_zero_points(graph: ir.Graph) -> None:
    """Give every ``DequantizeLinear`` of a constant a zero point of its own.

    ONNX Runtime 1.32 turns int8 weights into uint8 where that is asked for (``session.x64quantprecision``), and fails
    on a zero point that two of them share ("Attempt to replace the existing tensor").
    """
    for node in graph:
        if node.op_type == "DequantizeLinear" and len(node.inputs) > 2 and array_of(node.inputs[0]) is not None:
            point = array_of(node.inputs[2])
            if point is not None:
                node.replace_input_with(
                    2, add_constant(graph, f"{node.outputs[0].name}_zero_point", point, shared=False)
                )


def store_in_4_bits(graph: ir.Graph) -> int:
    """Store int8 weights of −7 to 7 as int4 and cast them: ONNX Runtime does so once, when it loads the file.

    It has no integer kernel for a ``DequantizeLinear`` of int4; of what the cast gives it makes the same as of int8.

    Returns:
        How many were stored so.
    """
    stored = 0
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        integers = array_of(weight)
        if weight is None or integers is None or integers.dtype != np.int8 or integers.ndim < 2:
            continue
        if np.abs(integers).max() > 7 or not weight.is_initializer():
            continue
        name = f"{weight.name}_int4"
        if name not in graph.initializers:
            tensor = ir.tensor(integers.astype(ir.DataType.INT4.numpy()), ir.DataType.INT4, name=name)
            graph.register_initializer(ir.val(name, const_value=tensor))
        cast = ir.node("Cast", [graph.initializers[name]], {"to": ir.DataType.INT8})
        cast.outputs[0].name, cast.outputs[0].dtype = f"{node.outputs[0].name}_int8", ir.DataType.INT8
        cast.outputs[0].shape = weight.shape
        graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])
        stored += 1
    return stored


def _feeds_integers(weight: ir.Value) -> bool:
    """Whether a dequantized weight is read by a layer whose data is dequantized too: one that runs in integers."""
    for reader, _ in weight.uses():
        if reader.op_type == "Transpose":
            if _feeds_integers(reader.outputs[0]):
                return True
        elif reader.inputs[0] is not weight and producer_type(reader.inputs[0]) == "DequantizeLinear":
            return True
    return False


def _gathers_rows(node: ir.Node) -> bool:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return node.op_type == "Gather" and axis == 0
