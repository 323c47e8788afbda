"""LiteRT's ``benchmark_model``: how it is called, what its log says, and how its inputs and outputs lie in files.

Source: google-ai-edge/LiteRT, tflite/tools/benchmark/benchmark_model.cc and benchmark_tflite_model.cc.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.errors import DataError, DeviceError, MissingToolchainError, UsageError
from edgekd.measurement import Block, Plan
from edgekd.plugins import missing
from edgekd.protocols import Arrays
from edgekd.types import Artifact

__all__ = ["Log", "Tensors", "block_of", "flags", "parse_log", "read_outputs", "tensors_of", "write_sample"]

# INFO: count=50 first=1 curr=1 min=1 max=1 avg=1.5 std=0 p5=1 median=1 p95=1 (percentiles: builds since 2024)
COUNT = re.compile(r"count=(\d+) (.*)")
TIMINGS = re.compile(r"Inference timings in us: (.*)")
DELEGATED = re.compile(
    r"Replacing (\d+) out of (\d+) node\(s\) with delegate \((\w+)\) node, yielding (\d+) partitions"
)
FOOTPRINT = re.compile(r"Memory footprint delta from the start of the tool \(MB\): init=[\d.]+ overall=([\d.]+)")


@dataclass(frozen=True)
class Tensors:
    """A file's own tensors, in the order of its graph.

    Attributes:
        inputs, outputs: (name by which the artifact calls it, name of the tensor, shape, NumPy's dtype).
    """

    inputs: tuple[tuple[str, str, tuple[int, ...], str], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...], str], ...]


@dataclass(frozen=True)
class Log:
    """What one launch told, microseconds.

    Attributes:
        init, first: Loading, and the first inference.
        warmup, timed: ``avg``, ``curr``, ``median`` … of the two phases.
        counts: Inferences in the two phases.
        delegation: Which delegate took how many nodes; empty when none was told.
        is_partial: Some nodes stayed with the plain interpreter.
        footprint_mb: Growth of the process; None when not told.
    """

    init: float
    first: float
    warmup: dict[str, float]
    timed: dict[str, float]
    counts: tuple[int, int]
    delegation: str
    is_partial: bool
    footprint_mb: float | None


def parse_log(text: str) -> Log:
    """Read a launch's stdout and stderr; by key, since the order has changed between builds.

    Raises:
        DeviceError: It tells of no timed inference; with its last error.
    """
    counts = [(int(found[1]), _numbers(found[2], "=")) for found in COUNT.finditer(text)]
    timings = TIMINGS.search(text)
    if timings is None or not counts:
        errors = [line.strip() for line in text.splitlines() if line.strip().startswith("ERROR")]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        # The last error is "Benchmarking failed.", and the one before it says less than the first.
        said = (errors or lines[-1:] or ["it said nothing"])[0]
        raise DeviceError(f"benchmark_model gave no timings: {said}")
    told = _numbers(timings[1], ": ")
    taken = [(int(found[1]), int(found[2]), int(found[4]), found[3]) for found in DELEGATED.finditer(text)]
    footprint = FOOTPRINT.search(text)
    return Log(
        init=told.get("Init", 0.0),
        first=told.get("First inference", counts[0][1].get("first", 0.0)),
        warmup=counts[0][1] if len(counts) > 1 else {},
        timed=counts[-1][1],
        counts=(counts[0][0] if len(counts) > 1 else 0, counts[-1][0]),
        delegation="; ".join(f"{name} {some}/{total} nodes in {parts}" for some, total, parts, name in taken),
        is_partial=any(some < total for some, total, _, _ in taken),
        footprint_mb=float(footprint[1]) if footprint else None,
    )


def _numbers(text: str, equals: str) -> dict[str, float]:
    pairs = re.finditer(rf"([A-Za-z0-9 ()]+?){equals}(-?[\d.]+(?:e[+-]?\d+)?)", text)
    return {pair[1].strip(" ,"): float(pair[2]) for pair in pairs}


def block_of(log: Log, conditions: dict[str, str], void: str = "") -> Block:
    """A launch as a block. The tool keeps no samples: the block's one value is the median that it reports.

    Builds before 2024 report no median; then it is the mean, and the conditions say so.
    """
    which = "median" if "median" in log.timed else "avg"
    value, last = log.timed[which], log.warmup.get("curr", log.first)
    described = conditions | {
        "runtime": "benchmark_model",
        "statistic": f"{which} of {log.counts[1]} inferences, as benchmark_model reports it",
        "inferences": str(log.counts[1]),
        "delegation": log.delegation,
        "partial_delegation": log.delegation if log.is_partial else "",
        "footprint_mb": "" if log.footprint_mb is None else f"{log.footprint_mb:.1f}",
    }
    return Block(
        runtime_load_ms=0.0,  # a native program: there is no runtime to import
        model_load_ms=log.init / 1e3,
        first_inference_ms=log.first / 1e3,
        warmup_ms=(log.warmup["avg"] / 1e3,) if "avg" in log.warmup else (),
        latency_ms=(value / 1e3,),
        peak_memory_bytes=None,  # its footprint is a growth, and a peak would disturb the times
        converged=abs(last - value) < 0.1 * value,  # the last of the warm-up is all that can be compared
        conditions={key: text for key, text in described.items() if text},
        void=void,
    )


def tensors_of(path: Path, artifact: Artifact) -> Tensors:
    """Tensors of a .tflite, and what the artifact calls them: names of its signature, or the tensors' own.

    Raises:
        MissingToolchainError: LiteRT is not installed here.
        UsageError: The file lacks one that the artifact names.
    """
    if missing(("ai_edge_litert",)):
        raise MissingToolchainError("benchmark_model's inputs", "ai_edge_litert", "tflite")
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    called: dict[int, str] = {}
    for key in interpreter.get_signature_list():
        runner = interpreter.get_signature_runner(key)
        for details in (runner.get_input_details(), runner.get_output_details()):
            called |= {int(detail["index"]): name for name, detail in details.items()}
    names = {spec.name for spec in (*artifact.inputs, *artifact.outputs)}

    def listed(details: Sequence[dict[str, object]]) -> tuple[tuple[str, str, tuple[int, ...], str], ...]:
        found = []
        for detail in details:
            own = str(detail["name"])
            name = own if own in names else called.get(int(str(detail["index"])), own)
            shape = tuple(int(size) for size in detail["shape"])  # type: ignore[attr-defined]
            found.append((name, own, shape, np.dtype(detail["dtype"]).name))  # type: ignore[call-overload]
        return tuple(found)

    tensors = Tensors(listed(interpreter.get_input_details()), listed(interpreter.get_output_details()))
    lacking = names - {one[0] for one in (*tensors.inputs, *tensors.outputs)}
    if lacking:
        raise UsageError(f"{path.name} has no tensor {sorted(lacking)[0]!r}")
    return tensors


def flags(tensors: Tensors, model: str, plan: Plan, files: Sequence[str], output: str = "") -> list[str]:
    """Arguments of one launch.

    Args:
        files: Of the inputs' values, in the order of ``tensors.inputs``; without commas or colons.
        output: File for the outputs of the last inference; none when empty.
    """
    names = [own for _, own, _, _ in tensors.inputs]
    if any("," in name for name in names):
        raise UsageError(f"benchmark_model splits names at commas; the file has the input {names!r}")
    shapes = [",".join(map(str, shape)) for _, _, shape, _ in tensors.inputs]
    values = [f"{name.replace(':', '::')}:{file}" for name, file in zip(names, files, strict=True)]
    arguments = [
        f"--graph={model}",
        f"--num_threads={plan.threads}",
        f"--warmup_runs={max(1, plan.warmup_runs)}",
        f"--warmup_min_secs={plan.warmup_s}",
        f"--num_runs={plan.min_runs}",
        f"--min_secs={plan.min_s}",
        f"--max_secs={plan.max_s}",
        f"--input_layer={','.join(names)}",
        f"--input_layer_shape={':'.join(shapes)}",
        f"--input_layer_value_files={','.join(values)}",
    ]
    return [*arguments, f"--output_filepath={output}"] if output else arguments


def write_sample(folder: Path, tensors: Tensors, inputs: Arrays, begin: int, prefix: str) -> list[str]:
    """One batch's values as the tool reads them, one raw file for each input.

    Returns:
        The files' names, in the order of the graph.

    Raises:
        DataError: The inputs do not fit the file.
    """
    names = []
    for index, (name, _, shape, dtype) in enumerate(tensors.inputs):
        batch = inputs[name][begin : begin + shape[0]]
        if batch.shape != shape:
            raise DataError(f"input {name!r} takes {shape}; samples from {begin} on have {batch.shape}")
        if np.issubdtype(batch.dtype, np.floating) != np.issubdtype(dtype, np.floating):
            raise DataError(f"input {name!r} takes {dtype}; it got {batch.dtype}")
        names.append(f"{prefix}_{index}.bin")
        (folder / names[-1]).write_bytes(np.ascontiguousarray(batch, dtype=dtype).tobytes())
    return names


def read_outputs(content: bytes, tensors: Tensors) -> dict[str, np.ndarray]:
    """What ``--output_filepath`` holds: all outputs, one after the other, in the order of the graph.

    Raises:
        DataError: It has another size: the model was run with other shapes, or the disk was full.
    """
    wanted = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for _, _, shape, dtype in tensors.outputs)
    if len(content) != wanted:
        raise DataError(f"the outputs have {wanted} bytes; benchmark_model wrote {len(content)}")
    found, begin = {}, 0
    for name, _, shape, dtype in tensors.outputs:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found[name] = np.frombuffer(content[begin : begin + size], dtype=dtype).reshape(shape)
        begin += size
    return found
