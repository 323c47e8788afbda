"""What is in a TFLite file: its operators and constants, read from the flatbuffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.contents import Contents, OperatorFact, OperatorKind, WeightFact, stored_bytes

from ._tflite_edit import read_model

__all__ = ["read_contents"]

_KINDS: dict[str, OperatorKind] = {
    "QUANTIZE": "quantize",
    "DEQUANTIZE": "dequantize",
    "TRANSPOSE": "transpose",
    "CAST": "cast",
    "EMBEDDING_LOOKUP": "embedding",
    "GATHER": "embedding",
}


def read_contents(path: Path) -> Contents:
    """Operators and constants of the first subgraph.

    A file that holds half-precision or int8 constants between float kernels has a ``DEQUANTIZE`` for each; the runtime
    does these once, when it loads the file, so they are not among the operators.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = read_model(path.read_bytes())
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    types = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
    graph = model.subgraphs[0]

    def kind(operator: Any) -> str:
        code = model.operatorCodes[operator.opcodeIndex]
        return names[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def size(tensor: Any) -> int:
        shape = tensor.shape if tensor.shape is not None else ()
        return stored_bytes(types[tensor.type], tuple(int(n) for n in shape))

    constant = {i for i, t in enumerate(graph.tensors) if _holds(model, t)}
    readers: dict[int, str] = {}
    operators = []
    for operator in reversed(graph.operators):
        reads = [int(i) for i in operator.inputs if i >= 0]
        written = int(operator.outputs[0])
        widened = kind(operator) == "DEQUANTIZE" and reads[0] in constant
        for index in reads:
            readers[index] = readers.get(written, "DEQUANTIZE") if widened else kind(operator)
        if not widened:
            name = _text(graph.tensors[written].name)
            facts = OperatorFact(
                name, kind(operator), _kind(kind(operator), reads, constant), size(graph.tensors[written])
            )
            operators.append(facts)
    weights = tuple(
        WeightFact(
            name=_text(graph.tensors[i].name),
            dtype=types[graph.tensors[i].type].lower(),
            size_bytes=len(model.buffers[graph.tensors[i].buffer].data),
            shape=tuple(int(n) for n in graph.tensors[i].shape),
            reader=readers.get(i, ""),
        )
        for i in sorted(constant)
    )
    return Contents(tuple(reversed(operators)), weights)


def _holds(model: Any, tensor: Any) -> bool:
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0


def _kind(name: str, reads: list[int], constant: set[int]) -> OperatorKind:
    """A gather is an embedding where it reads from a constant table."""
    found = _KINDS.get(name, "other")
    return "other" if found == "embedding" and not any(index in constant for index in reads[:2]) else found


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
