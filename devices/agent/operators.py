"""The operators of ONNX Runtime's profile with their times, wherever it ran: in Python or in a browser."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

KERNEL = "_kernel_time"
WEBGPU = "WebGpuExecutionProvider"


def operator_times(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes in the order they first ran, each with the median of its times over the inferences.

    A GPU works while the processor goes on: what the event of a node on WebGPU counts is the handing over. What the
    node takes stands in events of its own, as far as the GPU has timestamps; without them it is left out.

    Args:
        events: Of the profile's file, all of one session (onnxruntime/core/common/profiler.cc).

    Returns:
        ``name``, ``type``, ``unit`` and ``ms`` of each node.
    """
    nodes: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    on_gpu = gpu_times(events)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            name, facts = event["name"].removesuffix(KERNEL), event["args"]
            key = f"{facts.get('node_index', '')} {name}"
            nodes.setdefault(key, {"name": name, "type": facts["op_name"], "unit": facts["provider"]})
            times.setdefault(key, []).append(event["dur"] / 1e3)
    if on_gpu is not None:  # a node that only passes its input on, as a reshape, has no program
        times |= {key: on_gpu.get(node["name"], [0.0]) for key, node in nodes.items() if node["unit"] == WEBGPU}
    kept = [key for key, node in nodes.items() if node["unit"] != WEBGPU or on_gpu is not None]
    return [nodes[key] | {"ms": statistics.median(times[key])} for key in kept]


def gpu_times(events: Sequence[dict[str, Any]]) -> dict[str, list[float]] | None:
    """Milliseconds of the programs of each node, by its name, one sum an inference; None where the GPU told none.

    A program is called ``node&operator&program`` (CollectProfilingData in
    onnxruntime/core/providers/webgpu/webgpu_context.cc). Every inference runs the same ones.
    """
    programs = [event for event in events if event.get("cat") == "Api" and event["name"].count("&") >= 2]
    inferences = sum(event["name"] == "model_run" for event in events)
    if not programs or not inferences or len(programs) % inferences:
        return None
    found: dict[str, list[float]] = {}
    for index, program in enumerate(programs):
        name = program["name"].rsplit("&", 2)[0]
        sums = found.setdefault(name, [0.0] * inferences)
        sums[index * inferences // len(programs)] += program["dur"] / 1e3
    return found
