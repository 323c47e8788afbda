"""What is in an ONNX file: its weights as stored, its operators as ONNX Runtime would run them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.contents import Contents, OperatorFact, OperatorKind, WeightFact, stored_bytes
from edgekd.errors import ModelFileError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

__all__ = ["KINDS", "WIDENERS", "read_contents", "weight_fact"]

KINDS: dict[str, OperatorKind] = {
    "QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize",
    "DynamicQuantizeLinear": "quantize",
    "Transpose": "transpose",
    "Cast": "cast",
    "BatchNormalization": "batch_norm",
}
_PACKED = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Operators that take weights of 4 bits, and at which place."""

WIDENERS = ("DequantizeLinear", "Cast")  # a weight's reader is what stands behind these


def read_contents(path: Path, options: Any) -> Contents:
    """Weights of the file, and operators of the graph that ONNX Runtime makes of it.

    Args:
        options: A session's; graph optimizations that the processor alone decides are left out.

    Raises:
        ModelFileError: ONNX Runtime cannot read the file.
    """
    import onnx
    import onnxruntime

    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelFileError(f"{path} is not a model that ONNX Runtime reads: {error}") from error
        optimized = onnx.load(options.optimized_model_filepath)
    stored = onnx.load(path)
    sizes = _sizes(onnx.shape_inference.infer_shapes(stored).graph)
    sizes |= _sizes(optimized.graph)
    return Contents(
        operators=tuple(
            OperatorFact(node.name or node.output[0], node.op_type, KINDS.get(node.op_type, "other"), _of(node, sizes))
            for node in optimized.graph.node
        ),
        weights=tuple(_weights(stored.graph)),
    )


def _sizes(graph: GraphProto) -> dict[str, int]:
    """Bytes of every value whose shape is known."""
    sizes = {value.name: _size(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    return {name: size for name, size in sizes.items() if size}


def _size(value: ValueInfoProto) -> int:
    import onnx

    tensor = value.type.tensor_type
    shape = [dimension.dim_value for dimension in tensor.shape.dim]
    if not tensor.elem_type or not all(shape):
        return 0
    return math.prod(shape) * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize


def _of(node: NodeProto, sizes: dict[str, int]) -> int:
    """Bytes of what a node writes, or reads where that is all that is known."""
    return next((sizes[name] for name in (*node.output, *node.input) if name in sizes), 0)


def _weights(graph: GraphProto) -> Iterator[WeightFact]:
    import onnx

    readers: dict[str, NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, node)
    for tensor in graph.initializer:
        reader = readers.get(tensor.name)
        while reader is not None and reader.op_type in WIDENERS and reader.output[0] in readers:
            reader = readers[reader.output[0]]
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        inputs = [] if reader is None else list(reader.input)
        yield weight_fact(tensor.name, dtype, tuple(tensor.dims), reader.op_type if reader else "", inputs)


def weight_fact(name: str, dtype: str, shape: tuple[int, ...], reader: str, inputs: Sequence[str]) -> WeightFact:
    """One constant.

    Args:
        dtype: As ONNX calls it, in small letters.
        reader: Type of the operator that computes with it.
        inputs: Of that operator.
    """
    kind = {"float": "float32", "double": "float64"}.get(dtype, dtype)
    place = _PACKED.get(reader)
    if place is not None and inputs[place] == name and dtype == "uint8":
        kind, shape = "uint4", (*shape[:-1], shape[-1] * 2)  # two numbers in a byte
    return WeightFact(name, kind, stored_bytes(kind, shape), shape, reader)
