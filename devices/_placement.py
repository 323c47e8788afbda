"""Which nodes of a file run on which unit, by what a browser's runtime says while it loads the file."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence

from edgekd.types import Json

__all__ = ["operators_in", "placement"]

# VerifyEachNodeIsAssignedToAnEp in onnxruntime/core/framework/session_state.cc, at severity 0. Copies between units are
# no nodes of the file; those are listed where several units have nodes.
PLACED = re.compile(r"VerifyEachNodeIsAssignedToAnEp\] +(?:All nodes|Node\(s\)) placed on \[(\w+)\]\.[^:]*: (\d+)")
COPIED = re.compile(r"VerifyEachNodeIsAssignedToAnEp\] +Memcpy(?:To|From)Host \(")
PROVIDERS: Mapping[str, str] = {
    "wasm": "CPUExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "webnn": "WebNNExecutionProvider",
}

# LiteRT's delegates for WebGPU and WebNN. That for WebGPU counts only where it leaves nodes behind.
ON_GPU = re.compile(r"(No|\d+) operations will run on the GPU, and (?:the remaining|all) (\d+) operations will run on")
GPU_STARTED = "Initializing WebGPU-based API from graph"
ON_WEBNN = re.compile(r"number of nodes in the graph: (\d+), number of nodes supported by WebNN: (\d+)")


def placement(target: str, accelerator: str, told: Json, operators: int) -> dict[str, str]:
    """The conditions of a block that say where its nodes run.

    Args:
        told: By the page: ``lines`` of the console from a load that was not timed, of LiteRT.js ``accelerated`` as it
            says of itself; ``error`` where that load failed.
        operators: In a TFLite file.

    Returns:
        ``delegation``, as :class:`edgekd.measurement.Block` has it, and ``partial_delegation`` where nodes run on
        another unit than the accelerator that was asked for, or may; ``delegation_unknown``, the reason, where nothing
        counts.
    """
    if "error" in told:
        unknown = f"the file could not be loaded again to ask: {told['error']}"
    elif target == "onnx":
        units = _onnx(accelerator, told["lines"])
        unknown = "" if any(units.values()) else "ONNX Runtime Web did not say where it placed the nodes"
    else:
        units, unknown = _litert(accelerator, told["lines"], told["accelerated"], operators)
    if unknown:
        barred = {} if accelerator == "wasm" else {"partial_delegation": f"unknown: {unknown}"}
        return {"delegation_unknown": unknown} | barred
    text = " ".join(f"{unit}={nodes}" for unit, nodes in units.items())
    is_whole = accelerator == "wasm" or not sum(list(units.values())[1:])
    return {"delegation": text} | ({} if is_whole else {"partial_delegation": text})


def _onnx(accelerator: str, lines: Sequence[str]) -> dict[str, int]:
    nodes, unit = {PROVIDERS[accelerator]: 0, PROVIDERS["wasm"]: 0}, ""
    for line in lines:
        if placed := PLACED.search(line):
            unit = placed[1]
            nodes[unit] = nodes.get(unit, 0) + int(placed[2])
        elif COPIED.search(line):
            nodes[unit] -= 1
    return nodes


def _litert(accelerator: str, lines: Sequence[str], accelerated: bool, operators: int) -> tuple[dict[str, int], str]:
    """Nodes by unit, and why they are unknown.

    ``accelerated`` holds too where XNNPACK has all that the accelerator left behind (``HasNonDelegatedOps`` in
    litert/runtime/compiled_model.cc): by itself it says nothing of a GPU.
    """
    text = "\n".join(lines)
    if accelerator == "wasm":
        unknown = (
            "" if accelerated else "LiteRT.js says only that XNNPACK does not run every node, not how many it runs"
        )
        return {"XNNPACK": operators, "CPU": 0}, unknown
    if accelerator == "webgpu":
        left = sum(int(found[2]) for found in ON_GPU.finditer(text))
        is_told = bool(left) or (accelerated and GPU_STARTED in text)
        return {"WebGPU": operators - left, "CPU": left}, "" if is_told else "LiteRT.js did not say what WebGPU runs"
    counts = [(int(found[1]), int(found[2])) for found in ON_WEBNN.finditer(text)]
    taken = sum(taken for _, taken in counts)
    left = sum(nodes for nodes, _ in counts) - taken
    is_told = bool(counts) and (accelerated or bool(left))
    return {"WebNN": taken, "CPU": left}, "" if is_told else "LiteRT.js did not say what WebNN runs"


def operators_in(tflite: bytes) -> int:
    """Operators of all subgraphs of a TFLite file, read without LiteRT: the browser's is the only one needed.

    The tables are those of tflite/converter/schema/schema.fbs; https://flatbuffers.dev/internals/ says how they lie.
    """

    def follow(at: int) -> int:
        return at + int(struct.unpack_from("<I", tflite, at)[0])

    def vector(table: int, field: int) -> range:
        """Where the entries of a table's vector lie; none where the table does not have it."""
        fields = table - int(struct.unpack_from("<i", tflite, table)[0])
        size = struct.unpack_from("<H", tflite, fields)[0]
        offset = struct.unpack_from("<H", tflite, fields + 4 + 2 * field)[0] if 4 + 2 * field < size else 0
        if not offset:
            return range(0)
        start = follow(table + offset)
        return range(start + 4, start + 4 + 4 * int(struct.unpack_from("<I", tflite, start)[0]), 4)

    subgraphs = vector(follow(0), field=2)
    return sum(len(vector(follow(at), field=3)) for at in subgraphs)
