"""What is in a ``.pte`` file: the calls of its program, and the graphs that it hands to XNNPACK."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekd.contents import Contents, OperatorFact, OperatorKind, WeightFact, stored_bytes

__all__ = ["DTYPES", "read_contents"]

_KINDS: dict[str, OperatorKind] = {
    "aten::embedding": "embedding",
    "aten::permute_copy": "transpose",
    "aten::transpose_copy": "transpose",
    "aten::_native_batch_norm_legit_no_training": "batch_norm",
    "dim_order_ops::_to_dim_order_copy": "cast",
    "xnnpack.StaticTranspose": "transpose",
}

DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
"""By number, as ``executorch/runtime/core/portable_type/scalar_type.h`` has it."""

_XNN_TYPES = {
    "xnn_datatype_fp32": "float32",
    "xnn_datatype_fp16": "float16",
    "xnn_datatype_qint8": "int8",
    "xnn_datatype_quint8": "uint8",
    "xnn_datatype_qint32": "int32",
    "xnn_datatype_qcint8": "int8",
    "xnn_datatype_qcint32": "int32",
    "xnn_datatype_qcint4": "int4",
    "xnn_datatype_qdint8": "int8",
    "xnn_datatype_qbint4": "int4",
}


def read_contents(content: bytes) -> Contents:
    """Operators in the order in which they run, and every constant.

    Args:
        content: Of the file.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall, Tensor

    program = deserialize_pte_binary(content).program
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    operators: list[OperatorFact] = []
    weights: list[WeightFact] = []
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if isinstance(call, KernelCall):
                name = plan.operators[call.op_index].name
                values = [plan.values[index].val for index in call.args]
                tensors = [value for value in values if isinstance(value, Tensor)]
                operators.append(OperatorFact(name, name, _KINDS.get(name, "other"), _size(tensors[-1:])))
                weights += _constants(name, call.args, plan, program)
            elif isinstance(call, DelegateCall):
                delegate = plan.delegates[call.delegate_index]
                graph = _graph(program.backend_delegate_data[delegate.processed.index].data)
                operators += _graph_operators(graph)
                weights += _graph_weights(graph)
    return Contents(tuple(operators), tuple({fact.name: fact for fact in weights}.values()))


def _size(tensors: list[Any]) -> int:
    return sum(stored_bytes(DTYPES.get(int(t.scalar_type), ""), tuple(t.sizes)) for t in tensors)


def _constants(operator: str, arguments: list[int], plan: Any, program: Any) -> Iterator[WeightFact]:
    from executorch.exir.schema import Tensor

    for index in arguments:
        value = plan.values[index].val
        if isinstance(value, Tensor) and value.data_buffer_idx > 0 and value.allocation_info is None:
            dtype = DTYPES.get(int(value.scalar_type), str(value.scalar_type))
            size = len(program.constant_buffer[value.data_buffer_idx].storage)
            yield WeightFact(f"constant_{value.data_buffer_idx}", dtype, size, tuple(value.sizes), operator)


def _graph(payload: bytes) -> dict[str, Any]:
    """A graph of XNNPACK as plain data, by ExecuTorch's own schema and its copy of flatc."""
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    flatbuffer = payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(files(serialization).joinpath("schema.fbs").read_bytes())
        binary.write_bytes(flatbuffer)
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = (Path(folder) / "graph.json").read_text(encoding="utf-8")
        return json.loads(re.sub(r": (-?(?:inf|nan))\b", r': "\1"', text))  # flatc writes what JSON has no word for


def _values(graph: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every value of a graph, and its type."""
    for value in graph["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        yield tensor, _XNN_TYPES.get(tensor["datatype"], tensor["datatype"])


def _graph_operators(graph: dict[str, Any]) -> Iterator[OperatorFact]:
    sizes = {t["id_out"]: stored_bytes(dtype, tuple(t["dims"])) for t, dtype in _values(graph)}
    types = {t["id_out"]: dtype for t, dtype in _values(graph)}
    for node in graph["xnodes"]:
        name, body = f"xnnpack.{node['xnode_union_type'].removeprefix('XNN')}", node["xnode_union"]
        output = body.get("output_id", body.get("output1_id", -1))
        kind = _KINDS.get(name, "other")
        if name == "xnnpack.Convert":
            kind = "quantize" if types.get(output) in ("int8", "uint8") else "cast"
            if kind == "cast" and types.get(body["input_id"]) in ("int8", "uint8"):
                kind = "dequantize"
        yield OperatorFact(name, name, kind, sizes.get(output, 0))


def _graph_weights(graph: dict[str, Any]) -> Iterator[WeightFact]:
    readers: dict[int, str] = {}
    for node in graph["xnodes"]:
        for key, value in node["xnode_union"].items():
            if key.endswith("_id") and "output" not in key:
                readers.setdefault(value, f"xnnpack.{node['xnode_union_type'].removeprefix('XNN')}")
    for tensor, dtype in _values(graph):
        if tensor["constant_buffer_idx"]:
            data = graph["constant_data"][tensor["constant_buffer_idx"]]
            name = data.get("named_key") or f"xnnpack_{data['offset']}"
            size = data["size"] or stored_bytes(dtype, tuple(tensor["dims"]))
            yield WeightFact(name, dtype, int(size), tuple(tensor["dims"]), readers.get(tensor["id_out"], ""))
