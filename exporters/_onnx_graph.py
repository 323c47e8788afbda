"""Reading and editing the one graph of an ONNX model."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

__all__ = ["add_constant", "array_of", "drop_unused", "name_axes", "producer_type", "replace_node", "tidy", "untie"]


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


def name_axes(graph: ir.Graph) -> None:
    """Call open axes ``batch`` and ``length``, where torch calls them ``s43``, also in sizes that follow from them."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and size.value not in names:
                name = "batch" if axis == 0 else "length"
                while name in names.values():
                    name += "_"
                names[size.value] = name
    if not names:
        return
    symbols = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                symbols.sub(lambda found: names[found.group()], size.value)
                if isinstance(size, ir.SymbolicDim) and size.value is not None
                else size
                for size in value.shape
            )


def untie(graph: ir.Graph) -> None:
    """Give a matrix product whose weight is a turned table (tied embeddings) a constant of its own: what quantizes
    weights looks for constants.
    """
    for node in [node for node in graph if node.op_type == "Transpose"]:
        weight = array_of(node.inputs[0])
        readers = node.outputs[0].uses()
        if weight is None or weight.ndim != 2 or not all(reader.op_type == "MatMul" for reader, _ in readers):
            continue
        assert node.inputs[0] is not None
        turned = add_constant(graph, f"{node.inputs[0].name}_turned", np.ascontiguousarray(weight.T))
        node.outputs[0].replace_all_uses_with(turned)
        graph.remove(node, safe=True)


def drop_unused(graph: ir.Graph) -> None:
    """Drop nodes and constants that nothing reads."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The value of a constant, also of one that is cast: torch leaves the cast of a long zero point in the graph."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        source = array_of(producer.inputs[0])
        kind = ir.DataType(producer.attributes["to"].as_int())
        return None if source is None else source.astype(kind.numpy())
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_constant(graph: ir.Graph, name: str, array: np.ndarray, *, shared: bool = True) -> ir.Value:
    """A constant of that name: the one that is there where it is the same and may be shared, else a new one."""
    while name in graph.initializers:
        present = array_of(graph.initializers[name])
        if shared and present is not None and present.dtype == array.dtype and np.array_equal(present, array):
            return graph.initializers[name]
        name += "_"
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def replace_node(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let another value take the place of a node's one output, also of its name where that is the graph's output."""
    old = node.outputs[0]
    if old.is_graph_output():
        name = old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        old.name, value.name = f"{name}_replaced", name
    else:
        old.replace_all_uses_with(value)
    graph.remove(node, safe=True)


def producer_type(value: ir.Value | None) -> str:
    producer = None if value is None else value.producer()
    return "" if producer is None else producer.op_type
