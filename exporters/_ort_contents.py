"""What is in a file of ONNX Runtime's own format: the graph as it will run, and its weights."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekd.contents import Contents, OperatorFact, stored_bytes
from edgekd.errors import ModelFileError

from ._onnx_contents import KINDS, WIDENERS, weight_fact

__all__ = ["read_contents"]


def read_contents(path: Path) -> Contents:
    """Operators and constants, read from the flatbuffer.

    Raises:
        ModelFileError: It is damaged or of another format.
    """
    from onnx import TensorProto
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import InferenceSession

    content = path.read_bytes() if path.is_file() else b""
    if content[4:8] != b"ORTM":
        raise ModelFileError(f"{path} is not a model in ONNX Runtime's format: it does not start like one")
    try:
        graph = InferenceSession.InferenceSession.GetRootAs(content, 0).Model().Graph()
        nodes = [graph.Nodes(index) for index in range(graph.NodesLength())]
        sizes = {_text(value.Name()): _size(value) for value in _each(graph, "NodeArgs")}
        operators = tuple(_operator(node, sizes) for node in nodes)
        readers: dict[str, Any] = {}
        for node in nodes:
            for place in range(node.InputsLength()):
                readers.setdefault(_text(node.Inputs(place)), node)
        weights = []
        for tensor in _each(graph, "Initializers"):
            name = _text(tensor.Name())
            reader = readers.get(name)
            while reader is not None and _text(reader.OpType()) in WIDENERS and _text(reader.Outputs(0)) in readers:
                reader = readers[_text(reader.Outputs(0))]
            shape = tuple(tensor.Dims(axis) for axis in range(tensor.DimsLength()))
            kind = TensorProto.DataType.Name(tensor.DataType()).lower()
            inputs = [] if reader is None else [_text(reader.Inputs(place)) for place in range(reader.InputsLength())]
            weights.append(weight_fact(name, kind, shape, _text(reader.OpType()) if reader is not None else "", inputs))
    except (struct.error, ValueError, TypeError, IndexError, AttributeError) as error:  # offsets that lead nowhere
        raise ModelFileError(f"{path} is damaged: its flatbuffer cannot be read ({error})") from error
    return Contents(operators, tuple(weights))


def _operator(node: Any, sizes: dict[str, int]) -> OperatorFact:
    kind, written = _text(node.OpType()), _text(node.Outputs(0))
    return OperatorFact(_text(node.Name()) or written, kind, KINDS.get(kind, "other"), sizes.get(written, 0))


def _size(value: Any) -> int:
    """Bytes of a value, 0 where its shape is open."""
    from onnx import TensorProto
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import TensorTypeAndShape

    info = value.Type()
    if info is None or info.Value() is None:
        return 0
    tensor = TensorTypeAndShape.TensorTypeAndShape()
    tensor.Init(info.Value().Bytes, info.Value().Pos)
    if tensor.Shape() is None:
        return 0
    shape = tuple(size.Value().DimValue() if size.Value() is not None else 0 for size in _each(tensor.Shape(), "Dim"))
    name = TensorProto.DataType.Name(tensor.ElemType()).lower()
    return stored_bytes({"float": "float32", "double": "float64"}.get(name, name), shape)


def _each(table: Any, field: str) -> Iterator[Any]:
    return (getattr(table, field)(index) for index in range(getattr(table, f"{field}Length")()))


def _text(value: bytes | None) -> str:
    return (value or b"").decode()
