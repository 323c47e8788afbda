"""Transformers in ONNX Runtime's own fused operators: attention as one, what surrounds it as onnxruntime fuses it.

``onnxruntime.transformers.optimizer`` knows the attention of graphs that torch's old exporter made, and not that of
today's; so edgekd fuses attention itself, and leaves biases, activations and residual sums to that optimizer.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ._onnx_graph import add_constant, array_of, drop_unused, replace_node

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["FUSED", "fuse_attention", "fuse_rest", "fused_operators"]

_DOMAIN = "com.microsoft"
FUSED = ("MultiHeadAttention", "SkipLayerNormalization", "BiasGelu", "FastGelu", "EmbedLayerNormalization")
"""What can come out, as in https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md."""


@dataclass(frozen=True)
class _Attention:
    """softmax(query · keyᵀ · scale + bias) · value; each (batch, heads, length, size), or as ``rows`` before the heads
    were split.

    Attributes:
        last: The node that gives the result.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    bias: ir.Value | None
    last: ir.Node


def fuse_attention(graph: ir.Graph) -> int:
    """Write attention as ``MultiHeadAttention``.

    Returns:
        How many were fused.
    """
    _turn_twice(graph)
    fused = 0
    for node in list(graph):
        found = _attention(node) if node.op_type == "Softmax" else None
        if found is not None and _fuse(graph, found):
            fused += 1
    if fused:
        graph.opset_imports[_DOMAIN] = 1
        drop_unused(graph)
    return fused


def _turn_twice(graph: ir.Graph) -> None:
    """Write the transposition of a key that splits its heads too as these two steps; what stays, ONNX Runtime joins."""
    for node in list(graph):
        if _perm(node) == [0, 2, 3, 1] and node.outputs[0].shape is not None and not node.outputs[0].is_graph_output():
            heads, old = ir.node("Transpose", [node.inputs[0]], {"perm": [0, 2, 1, 3]}), node.outputs[0]
            heads.outputs[0].name, heads.outputs[0].type = f"{old.name}_split", old.type
            assert old.shape is not None
            heads.outputs[0].shape = ir.Shape([old.shape[0], old.shape[1], old.shape[3], old.shape[2]])
            graph.insert_before(node, heads)
            node.replace_input_with(0, heads.outputs[0])
            node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])


def _attention(softmax: ir.Node) -> _Attention | None:
    """What surrounds a softmax, where it is attention and nothing else reads what lies between."""
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    last = _only_reader(softmax.outputs[0])
    if axis not in (-1, 3) or last is None or last.op_type != "MatMul" or last.inputs[0] is not softmax.outputs[0]:
        return None
    value, scores, bias, scale = last.inputs[1], softmax.inputs[0], None, 1.0
    step = _producer(scores)
    if step is not None and step.op_type == "Add":
        sides = [side for side in step.inputs if _reaches_product(side)]
        if len(sides) != 1:
            return None
        bias = step.inputs[1] if step.inputs[0] is sides[0] else step.inputs[0]
        scores = sides[0]
    scores, scale = _unscaled(scores)
    product = _producer(scores)
    if product is None or product.op_type != "MatMul" or _only_reader(product.outputs[0]) is None:
        return None
    (query, first), (turned, second) = _unscaled(product.inputs[0]), _unscaled(product.inputs[1])
    key = _turned_back(turned)
    if query is None or key is None or value is None or any(_rank(side) != 4 for side in (query, key, value)):
        return None
    return _Attention(query, key, value, scale * first * second, bias, last)


def _fuse(graph: ir.Graph, found: _Attention) -> bool:
    sizes = found.query.shape
    assert sizes is not None
    heads, size = sizes[1], sizes[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        return False
    name = found.last.outputs[0].name
    rows = [_rows(side) for side in (found.query, found.key, found.value)]
    before = found.last
    if any(side is None for side in rows):  # keys and values may come with their heads split, queries may not
        rows = [_joined(graph, before, found.query, f"{name}_query"), found.key, found.value]
    bias = found.bias
    if bias is not None:
        bias = _full_bias(graph, before, bias, found.query, f"{name}_bias")
        if bias is None:
            return False
    inputs = [*rows, None, None, bias] if bias is not None else rows
    attention = ir.node(
        "MultiHeadAttention", inputs, {"num_heads": heads, "scale": found.scale}, domain=_DOMAIN, name=f"{name}_fused"
    )
    result = attention.outputs[0]
    result.name, result.type = f"{name}_rows", found.last.outputs[0].type
    result.shape = ir.Shape([sizes[0], sizes[2], heads * size])
    graph.insert_before(before, attention)
    turn = _only_reader(found.last.outputs[0])
    join = _only_reader(turn.outputs[0]) if turn is not None and _perm(turn) == [0, 2, 1, 3] else None
    if join is not None and join.op_type == "Reshape" and _same(join.outputs[0].shape, result.shape):
        replace_node(graph, join, result)
        return True
    split = add_constant(graph, f"{name}_split", np.array([0, 0, heads, -1], np.int64))
    apart = ir.node("Reshape", [result, split])
    back = ir.node("Transpose", [apart.outputs[0]], {"perm": [0, 2, 1, 3]})
    apart.outputs[0].name, back.outputs[0].name = f"{name}_apart", f"{name}_heads"
    back.outputs[0].type, back.outputs[0].shape = found.last.outputs[0].type, found.last.outputs[0].shape
    graph.insert_before(before, [apart, back])
    replace_node(graph, found.last, back.outputs[0])
    return True


def _rows(side: ir.Value) -> ir.Value | None:
    """(batch, length, heads · size), where heads were split from it by Reshape and Transpose."""
    turn = _producer(side)
    if turn is None:
        return None
    if _perm(turn) == [0, 2, 1, 3]:
        split = _producer(turn.inputs[0])
        source = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
        if source is not None and source.shape is not None and side.shape is not None and len(source.shape) == 3:
            heads, size = side.shape[1], side.shape[3]
            if isinstance(heads, int) and isinstance(size, int) and source.shape[2] == heads * size:
                return source
    return None


def _joined(graph: ir.Graph, before: ir.Node, side: ir.Value, name: str) -> ir.Value:
    """(batch, heads, length, size) as (batch, length, heads · size)."""
    turn = ir.node("Transpose", [side], {"perm": [0, 2, 1, 3]})
    shape = add_constant(graph, f"{name}_shape", np.array([0, 0, -1], np.int64))
    join = ir.node("Reshape", [turn.outputs[0], shape])
    turn.outputs[0].name, join.outputs[0].name = f"{name}_turned", f"{name}_joined"
    join.outputs[0].type = side.type
    graph.insert_before(before, [turn, join])
    return join.outputs[0]


def _full_bias(graph: ir.Graph, before: ir.Node, bias: ir.Value, query: ir.Value, name: str) -> ir.Value | None:
    """A bias with a row for each query, since the operator repeats none; None where it is no bias of scores."""
    if bias.shape is None or query.shape is None or len(bias.shape) != 4:
        return None
    length = query.shape[2]
    if bias.shape[2] != 1 or length == 1:
        return bias
    for user, _ in bias.uses():  # the other layers have the same one
        if user.op_type == "Expand" and (user.name or "").endswith("_bias_for_all_queries"):
            return user.outputs[0]
    if not isinstance(length, int):
        return None
    shape = add_constant(graph, f"{name}_shape", np.array([1, 1, length, 1], np.int64))
    expand = ir.node("Expand", [bias, shape], name=f"{name}_for_all_queries")
    expand.outputs[0].name, expand.outputs[0].type = f"{name}_full", bias.type
    expand.outputs[0].shape = ir.Shape([*bias.shape[:2], length, bias.shape[3]])
    graph.insert_before(before, expand)
    return expand.outputs[0]


def _turned_back(side: ir.Value | None) -> ir.Value | None:
    """What a transposed key was before: by one Transpose, or, as torch writes it, by Reshape, Transpose and Reshape."""
    step = _producer(side)
    if step is None or side is None:
        return None
    if _perm(step) == [0, 1, 3, 2]:
        return step.inputs[0]
    if step.op_type == "Reshape":
        turn = _producer(step.inputs[0])
        flat = _producer(turn.inputs[0]) if turn is not None and _perm(turn) == [0, 2, 1] else None
        source = flat.inputs[0] if flat is not None and flat.op_type == "Reshape" else None
        if source is None or source.shape is None or side.shape is None or flat is None:
            return None
        before, after = list(source.shape), list(side.shape)
        if len(before) == len(after) == 4 and before == [*after[:2], after[3], after[2]]:
            return source
        there, back = _producer(flat.inputs[1]), _producer(step.inputs[1])  # with an open batch these are computed
        computed = [concat.inputs for concat in (there, back) if concat is not None and concat.op_type == "Concat"]
        if [len(parts) for parts in computed] == [3, 3] and computed[0][1:] == (computed[1][2], computed[1][1]):
            return source
    return None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value before it was multiplied with or divided by one number, and that number."""
    step = _producer(value)
    if step is not None and step.op_type in ("Mul", "Div"):
        for position in (1,) if step.op_type == "Div" else (1, 0):
            number = array_of(step.inputs[position])
            if number is not None and number.size == 1:
                factor = float(number.reshape(()))
                return step.inputs[1 - position], factor if step.op_type == "Mul" else 1 / factor
    return value, 1.0


def _reaches_product(value: ir.Value | None) -> bool:
    step = _producer(_unscaled(value)[0])
    return step is not None and step.op_type == "MatMul"


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [user for user, _ in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _perm(node: ir.Node) -> list[int] | None:
    return (
        list(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" and "perm" in node.attributes else None
    )


def _rank(value: ir.Value | None) -> int:
    return -1 if value is None or value.shape is None else len(value.shape)


def _same(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    return a is not None and b is not None and list(a) == list(b)


def fuse_rest(model: ModelProto) -> ModelProto:
    """Biases, activations, residual sums and normalizations as ``onnxruntime.transformers.optimizer`` fuses them."""
    import onnx
    from onnxruntime.transformers.optimizer import optimize_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        fused: ModelProto = optimize_model(str(path), model_type="bert", opt_level=0).model
    if fused_operators(fused) and all(opset.domain != _DOMAIN for opset in fused.opset_import):
        fused.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    return fused


def fused_operators(model: ModelProto) -> dict[str, int]:
    """How many of each of :data:`FUSED` a model holds."""
    found = Counter(node.op_type for node in model.graph.node if node.op_type in FUSED)
    return dict(sorted(found.items()))
