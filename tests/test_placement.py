"""Where a browser's runtimes place nodes, from lines that they wrote.

Lines of WebGPU and wasm are those of onnxruntime-web 1.30.0 and @litertjs/core 2.5.3 in Chromium 156. No browser with
WebNN was at hand: those lines are put together from the texts in the same builds.
"""

import struct

import pytest

from edgekd.devices._placement import operators_in, placement

VERIFY = "2026-11-30 10:06:35.741589 [V:onnxruntime:, session_state.cc:1383 VerifyEachNodeIsAssignedToAnEp] "
MIXED = [
    f"{VERIFY} Node(s) placed on [CPUExecutionProvider]. Number of nodes: 1",
    f"{VERIFY}  Det (det)",
    f"{VERIFY} Node(s) placed on [WebGpuExecutionProvider]. Number of nodes: 5",
    f"{VERIFY}  MatMul (mm)",
    f"{VERIFY}  Sigmoid (sg)",
    f"{VERIFY}  Mul (mul)",
    f"{VERIFY}  MemcpyFromHost (Memcpy)",
    f"{VERIFY}  MemcpyToHost (Memcpy_token_0)",
]
GPU_PART = "1 operations will run on the GPU, and the remaining 5 operations will run on the CPU."
GPU_NONE = "No operations will run on the GPU, and all 2 operations will run on the CPU."
GPU_STARTS = "I1130 10:20:26.572999  755312 delegate_kernel.cc:855] Initializing WebGPU-based API from graph."
WEBNN = (
    "TensorFlow Lite WebNN delegate capability: number of nodes in the graph: 9, number of nodes supported by WebNN: "
)


def everywhere(unit: str, nodes: int) -> list[str]:
    return [f"{VERIFY} All nodes placed on [{unit}]. Number of nodes: {nodes}"]


@pytest.mark.parametrize(
    ("accelerator", "lines", "told", "is_partial"),
    [
        ("wasm", everywhere("CPUExecutionProvider", 4), "CPUExecutionProvider=4", False),
        ("webgpu", everywhere("WebGpuExecutionProvider", 2), "WebGpuExecutionProvider=2 CPUExecutionProvider=0", False),
        ("webgpu", everywhere("CPUExecutionProvider", 2), "WebGpuExecutionProvider=0 CPUExecutionProvider=2", True),
        ("webgpu", MIXED, "WebGpuExecutionProvider=3 CPUExecutionProvider=1", True),
        ("webnn", everywhere("WebNNExecutionProvider", 1), "WebNNExecutionProvider=1 CPUExecutionProvider=0", False),
    ],
)
def test_onnx_runtimes_nodes_are_counted_without_copies(
    accelerator: str, lines: list[str], told: str, is_partial: bool
) -> None:
    found = placement("onnx", accelerator, {"lines": lines}, 0)
    assert found == {"delegation": told} | ({"partial_delegation": told} if is_partial else {})


@pytest.mark.parametrize(
    ("accelerator", "lines", "accelerated", "told", "is_partial"),
    [
        ("wasm", [], True, "XNNPACK=6 CPU=0", False),
        ("webgpu", [GPU_STARTS], True, "WebGPU=6 CPU=0", False),
        ("webgpu", [GPU_PART, GPU_STARTS], True, "WebGPU=1 CPU=5", True),
        ("webgpu", [GPU_PART, GPU_STARTS], False, "WebGPU=1 CPU=5", True),
        ("webnn", [f"{WEBNN}9"], True, "WebNN=9 CPU=0", False),
        ("webnn", [f"{WEBNN}7"], False, "WebNN=7 CPU=2", True),
    ],
)
def test_litert_is_not_believed_that_all_is_accelerated_where_its_delegate_says_otherwise(
    accelerator: str, lines: list[str], accelerated: bool, told: str, is_partial: bool
) -> None:
    found = placement("tflite", accelerator, {"lines": lines, "accelerated": accelerated}, 6)
    assert found == {"delegation": told} | ({"partial_delegation": told} if is_partial else {})


def test_a_file_of_which_the_gpu_has_nothing_is_partial_although_litert_calls_it_accelerated() -> None:
    found = placement("tflite", "webgpu", {"lines": [GPU_NONE], "accelerated": True}, 2)
    assert found["partial_delegation"] == "WebGPU=0 CPU=2"


@pytest.mark.parametrize("accelerator", ["webgpu", "webnn"])
@pytest.mark.parametrize("target", ["onnx", "tflite"])
def test_silence_is_never_taken_for_full_delegation(target: str, accelerator: str) -> None:
    for told in ({"lines": [], "accelerated": True}, {"lines": [], "accelerated": False}, {"error": "out of memory"}):
        found = placement(target, accelerator, told, 6)
        assert found == {
            "delegation_unknown": found["delegation_unknown"],
            "partial_delegation": f"unknown: {found['delegation_unknown']}",
        }


def test_what_xnnpack_leaves_behind_is_unknown_and_forbids_nothing() -> None:
    found = placement("tflite", "wasm", {"lines": [], "accelerated": False}, 6)
    assert found == {
        "delegation_unknown": "LiteRT.js says only that XNNPACK does not run every node, not how many it runs"
    }


def test_operators_are_counted_in_all_subgraphs(tflite_file: tuple) -> None:  # type: ignore[type-arg]
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    artifact, folder = tflite_file
    content = (folder / artifact.path).read_bytes()
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    assert operators_in(content) == sum(len(graph.operators) for graph in model.subgraphs) > 2
    # A model without a field of its own: https://flatbuffers.dev/internals/
    assert operators_in(struct.pack("<IHHi", 8, 4, 4, 4)) == 0
