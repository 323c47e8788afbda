"""LiteRT's ``benchmark_model``: how it is called, what its log says, and how its inputs and outputs lie in files.

Source: google-ai-edge/LiteRT, tflite/tools/benchmark/benchmark_model.cc and benchmark_tflite_model.cc.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from edgekd.errors import DataError, DeviceError, MissingToolchainError, UsageError
from edgekd.measurement import Block, OperatorTime, Plan
from edgekd.plugins import missing
from edgekd.protocols import Arrays
from edgekd.types import Artifact

__all__ = [
    "PROFILE",
    "RUN",
    "Log",
    "Tensors",
    "block_of",
    "flags",
    "launches",
    "logs_of",
    "operators_of",
    "parse_log",
    "read_outputs",
    "share_of",
    "tensors_of",
    "write_sample",
]

# INFO: count=50 first=1 curr=1 min=1 max=1 avg=1.5 std=0 p5=1 median=1 p95=1 (percentiles: builds since 2024)
COUNT = re.compile(r"count=(\d+) (.*)")
TIMINGS = re.compile(r"Inference timings in us: (.*)")
DELEGATED = re.compile(
    r"Replacing (\d+) out of (\d+) node\(s\) with delegate \((\w+)\) node, yielding (\d+) partitions"
)
MARK = "@launch"
PROFILE = "--enable_op_profiling=true"
PROFILED = "Profiling Info for"  # heads each of its tables: of loading, of the timed inferences
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
        units: Nodes by the delegate that took them, in the order it was asked, and last those that none took (``CPU``);
            empty when the build does not tell.
        partitions: Pieces that the delegates cut the graph into; 0 when not told.
        footprint_mb: Growth of the process; None when not told.
    """

    init: float
    first: float
    warmup: dict[str, float]
    timed: dict[str, float]
    counts: tuple[int, int]
    units: dict[str, int]
    partitions: int
    footprint_mb: float | None


def parse_log(text: str) -> Log:
    """Read a launch's stdout and stderr; by key, since the order has changed between builds.

    Raises:
        DeviceError: It tells of no timed inference; with its last error.
    """
    text = text.partition(PROFILED)[0]  # a user's flags may ask for tables, which have counts of their own
    counts = [(int(found[1]), _numbers(found[2], "=")) for found in COUNT.finditer(text)]
    timings = TIMINGS.search(text)
    if timings is None or not counts:
        errors = [line.strip() for line in text.splitlines() if line.strip().startswith("ERROR")]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        # The last error is "Benchmarking failed.", and the one before it says less than the first.
        said = (errors or lines[-1:] or ["it said nothing"])[0]
        raise DeviceError(f"benchmark_model gave no timings: {said}")
    told = _numbers(timings[1], ": ")
    footprint = FOOTPRINT.search(text)
    return Log(
        init=told.get("Init", 0.0),
        first=told.get("First inference", counts[0][1].get("first", 0.0)),
        warmup=counts[0][1] if len(counts) > 1 else {},
        timed=counts[-1][1],
        counts=(counts[0][0] if len(counts) > 1 else 0, counts[-1][0]),
        units=_units(text),
        partitions=sum(int(found[4]) for found in DELEGATED.finditer(text)),
        footprint_mb=float(footprint[1]) if footprint else None,
    )


def operators_of(text: str) -> tuple[OperatorTime, ...]:
    """The operators of a launch with ``PROFILE``, in the order they ran; none of a build that does not tell them.

    The first table of the timed inferences is that of the main graph. A delegate that does not time its own operators
    is one node there.
    """
    units = _units(text)
    delegate = next(iter(units), "delegate")
    table = text.partition(f"Operator-wise {PROFILED}")[2].partition("Run Order")[2].partition("\n\n")[0]
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 9 or cells[1].startswith("["):
            continue
        kind, ms, name = cells[1], float(cells[3]), cells[8]
        is_inside = name.startswith("Delegate/")
        unit = kind if kind in units else delegate if is_inside else "CPU"
        found.append(OperatorTime(name.removeprefix("Delegate/"), kind, unit, ms))
    return tuple(found)


def _units(text: str) -> dict[str, int]:
    """A delegate tells once for each subgraph; one that is asked later counts the one node of each earlier part too."""
    units: dict[str, int] = {}
    total, first = 0, ""
    for found in DELEGATED.finditer(text):
        first = first or found[3]
        units[found[3]] = units.get(found[3], 0) + int(found[1])
        total += int(found[2]) if found[3] == first else 0
    return units | {"CPU": total - sum(units.values())} if units else {}


def _numbers(text: str, equals: str) -> dict[str, float]:
    pairs = re.finditer(rf"([A-Za-z0-9 ()]+?){equals}(-?[\d.]+(?:e[+-]?\d+)?)", text)
    return {pair[1].strip(" ,"): float(pair[2]) for pair in pairs}


def block_of(logs: Sequence[Log], conditions: dict[str, str], void: str = "") -> Block:
    """The launches of a block. The tool keeps no samples: the median that it reports is the one of each launch.

    Builds before 2024 report no median; then it is the mean, and the conditions say so. Loading and the first inference
    are medians over the launches.
    """
    which = "median" if all("median" in log.timed for log in logs) else "avg"
    values = [log.timed.get(which, log.timed["curr"]) for log in logs]  # of a single inference only that is told
    count, units, footprints = sum(log.counts[1] for log in logs), logs[0].units, [log.footprint_mb for log in logs]
    told = " ".join(f"{unit}={nodes}" for unit, nodes in units.items())
    described = conditions | {
        "runtime": "benchmark_model",
        "statistic": f"{which} of {count} inferences in {len(logs)} launches, as benchmark_model reports it",
        "inferences": str(count),
        "launches": str(len(logs)),
        "delegation": told,
        "partitions": str(logs[0].partitions or ""),
        "partial_delegation": told if units.get("CPU") else "",
        "footprint_mb": "" if None in footprints else f"{max(one for one in footprints if one is not None):.1f}",
    }
    lasts = [log.warmup.get("curr", log.first) for log in logs]
    return Block(
        runtime_load_ms=0.0,  # a native program: there is no runtime to import
        model_load_ms=median(log.init for log in logs) / 1e3,
        first_inference_ms=median(log.first for log in logs) / 1e3,
        warmup_ms=tuple(log.warmup["avg"] / 1e3 for log in logs if "avg" in log.warmup),
        latency_ms=tuple(value / 1e3 for value in values),
        peak_memory_bytes=None,  # its footprint is a growth, and a peak would disturb the times
        # The last of the warm-up is all that can be compared.
        converged=all(abs(last - value) < 0.1 * value for last, value in zip(lasts, values, strict=True)),
        conditions={key: text for key, text in described.items() if text},
        void=void,
    )


def share_of(plan: Plan, turns: int) -> Plan:
    """What each of so many launches does, so that all do what the plan says; each must warm up by itself."""
    return replace(
        plan,
        warmup_s=plan.warmup_s / turns,
        min_runs=math.ceil(plan.min_runs / turns),
        min_s=plan.min_s / turns,
        max_s=plan.max_s / turns,
    )


# A command that fails ends the script, with its exit code and its log. Who ends the script finds in ``pid`` what runs.
RUN = """run() { log=$1; shift; "$@" >"$log" 2>&1 & echo $$ $! >pid; wait $! || fail $? "$log"; }
fail() { cat "$2" >&2; exit "$1"; }
"""


def launches(commands: Sequence[Sequence[str]]) -> str:
    """A script that runs these commands one after the other, and then prints the log of each: see ``logs_of``."""
    lines = [f"run log-{index}.txt {shlex.join(command)}" for index, command in enumerate(commands)]
    lines += [f"echo {MARK}; cat log-{index}.txt" for index in range(len(commands))]
    return RUN + "\n".join([*lines, "rm -f log-*.txt", ""])


def logs_of(printed: str) -> list[Log]:
    """What the commands of ``launches`` printed, in their order."""
    return [parse_log(text) for text in printed.split(f"{MARK}\n")[1:]]


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
