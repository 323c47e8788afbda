"""Measure one model file in this process: ``python agent.py job.json``. One block is one run of this file.

With several jobs (``python agent.py --seed 0 a/job.json b/job.json``) each has a process of its own, and these take
turns of a few inferences: one works while the others wait, so that whatever slows the machine slows all alike. Paths
in a job are then relative to its own folder.

It stands alone (standard library, NumPy and the runtime of the job's target), so that it can be copied to a board and
run there. What is timed and why: docs/measuring.md.

The job is a JSON object, the result another; ``KEYS`` names the job's fields (and ``cores``, a list of processors to
run on, may stand beside them). Paths are relative to the working
directory. Exit code 0 when the result was written; 1 with one line on stderr when it failed; 2 when the job is wrong.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

KEYS = {
    "target": "onnx, ort, tflite, executorch or coreml",
    "model": "the model file",
    "input_names": "names of the file's inputs",
    "output_names": "names of the file's outputs",
    "sample": ".npz with the input that is timed, by the file's names",
    "inputs": ".npz with all inputs whose outputs are wanted, samples on the first axis; null for none",
    "outputs": ".npz to write these outputs to; null for none",
    "result": "JSON file to write the block to",
    "plan": "threads, warmup_runs, warmup_s, min_runs, min_s, max_s: see edgekd.measurement.Plan",
}

WINDOW = 10  # inferences in each of the two windows whose medians are compared
SETTLED = 0.02  # their largest relative difference
SETTLING_RUNS = 200  # caps of the settling, counted after the minimum warm-up
SETTLING_S = 5.0
TURN_S = 0.01  # a turn lasts at least this long …
TURN_RUNS = 5  # … and this many samples: the first of a turn finds the caches full of the other file
# As in exporters/onnx.py: without it, int8 products saturate on x86 processors that lack VNNI. A job may say otherwise.
SESSION_CONFIG = {"session.x64quantprecision": "1"}
PROFILED_RUNS = 30
TIMER_SHARE = 0.02  # largest share of one sample that the step of the clock may be


class AgentError(Exception):
    """Told to the caller as one line."""


class Runtime(Protocol):
    """A loaded model. A call hands the arrays over and gives the outputs back as arrays of its own."""

    name: str
    batch: int

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arrays in the dtypes of the file."""

    def __call__(self, arrays: dict[str, Any]) -> list[Any]: ...

    def delegation(self) -> str:
        """Nodes by the unit that runs them, the fallback last: ``XNNPACK=41 CPU=3``; empty where it cannot be told."""


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        options = module.SessionOptions()
        options.intra_op_num_threads = job["plan"]["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile := job.get("profile_to"):
            options.enable_profiling, options.profile_file_prefix = True, profile
        for key, value in job.get("session_config", SESSION_CONFIG).items():
            options.add_session_config_entry(key, value)
        self.name = f"onnxruntime {module.__version__}"
        self._session = module.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
        self._outputs = job["output_names"]
        inputs = {value.name: value for value in self._session.get_inputs()}
        _check_names("input", job["input_names"], list(inputs))
        _check_names("output", job["output_names"], [value.name for value in self._session.get_outputs()])
        first = inputs[job["input_names"][0]].shape
        self.batch = first[0] if first and isinstance(first[0], int) else 1
        self._types = {name: _onnx_dtype(value.type) for name, value in inputs.items()}

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        outputs: list[Any] = self._session.run(self._outputs, arrays)
        return outputs

    def delegation(self) -> str:
        return ""  # told by the profile alone

    def end_profile(self) -> list[dict[str, Any]]:
        """Operators since the session was made, each with its times, in the order they first ran."""
        path = Path(self._session.end_profiling())
        times: dict[str, dict[str, Any]] = {}
        for event in json.loads(path.read_text()):
            name, _, what = event["name"].rpartition("_")
            if event.get("cat") == "Node" and what == "time" and name.endswith("_kernel"):
                facts = event["args"]
                key = f"{facts.get('node_index', '')} {name}"
                node = {"name": name.removesuffix("_kernel"), "type": facts["op_name"], "unit": facts["provider"]}
                times.setdefault(key, node | {"times": []})["times"].append(event["dur"] / 1e3)
        path.unlink()
        return [
            {k: v for k, v in n.items() if k != "times"} | {"ms": statistics.median(n["times"])} for n in times.values()
        ]


class LiteRt:
    """LiteRT's interpreter on the CPU (with XNNPACK, its default)."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        self.name = f"ai-edge-litert {_version('ai-edge-litert')}"
        self._interpreter = module.Interpreter(model_path=job["model"], num_threads=job["plan"]["threads"])
        inputs, outputs = self._tensors(job)
        self._inputs = {name: inputs[name]["index"] for name in job["input_names"]}
        self._outputs = [outputs[name]["index"] for name in job["output_names"]]
        self._types = {name: inputs[name]["dtype"] for name in self._inputs}
        self.batch = int(inputs[job["input_names"][0]]["shape"][0])
        self._interpreter.allocate_tensors()

    def _tensors(self, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors by the names of a signature where the job uses these, else by the tensors' own names."""
        for key in self._interpreter.get_signature_list():
            signature = self._interpreter.get_signature_runner(key)
            inputs, outputs = signature.get_input_details(), signature.get_output_details()
            if set(job["input_names"]) == set(inputs) and set(job["output_names"]) <= set(outputs):
                return inputs, outputs
        inputs = {tensor["name"]: tensor for tensor in self._interpreter.get_input_details()}
        outputs = {tensor["name"]: tensor for tensor in self._interpreter.get_output_details()}
        _check_names("input", job["input_names"], list(inputs))
        _check_names("output", job["output_names"], list(outputs))
        return inputs, outputs

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        for name, index in self._inputs.items():
            self._interpreter.set_tensor(index, arrays[name])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]

    def delegation(self) -> str:
        """A delegate's nodes are those between its inputs and its outputs; the interpreter lists them all."""
        nodes = self._interpreter._get_ops_details()
        delegates = [node for node in nodes if node["op_name"] == "DELEGATE"]
        plain = [node for node in nodes if node["op_name"] != "DELEGATE"]
        makers = {int(tensor): index for index, node in enumerate(plain) for tensor in node["outputs"]}
        taken: set[int] = set()
        for delegate in delegates:
            ends = {int(tensor) for tensor in delegate["inputs"]}
            open_tensors = [int(tensor) for tensor in delegate["outputs"]]
            while open_tensors:
                tensor = open_tensors.pop()
                index = makers.get(tensor)
                if tensor not in ends and index is not None and index not in taken:
                    taken.add(index)
                    open_tensors += [int(needed) for needed in plain[index]["inputs"]]
        return f"XNNPACK={len(taken)} CPU={len(plain) - len(taken)}"


class ExecuTorch:
    """ExecuTorch on the CPU, with XNNPACK for what the file delegates to it."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        import torch
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(job["plan"]["threads"])
        self.name = f"executorch {_version('executorch')} (XNNPACK)"
        self._from_numpy = torch.from_numpy
        program = module.Runtime.get().load_program(job["model"])
        self._method = program.load_method("forward")
        meta = self._method.metadata
        # The format numbers inputs and outputs; edgekd's files tell their names in a method of their own.
        names = json.loads(program.load_method("edgekd").execute([])[0]) if "edgekd" in program.method_names else {}
        inputs = names.get("inputs") or [f"input_{index}" for index in range(meta.num_inputs())]
        outputs = names.get("outputs") or [f"output_{index}" for index in range(meta.num_outputs())]
        _check_names("input", job["input_names"], inputs)
        _check_names("output", job["output_names"], outputs)
        infos = [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]
        self.batch = int(infos[inputs.index(job["input_names"][0])].sizes()[0])
        self._inputs = inputs
        self._outputs = [outputs.index(name) for name in job["output_names"]]
        self._types = {name: _EXECUTORCH_DTYPES[info.dtype()] for name, info in zip(inputs, infos, strict=True)}

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        outputs = self._method.execute([self._from_numpy(arrays[name]) for name in self._inputs])
        return [outputs[index].numpy() for index in self._outputs]

    def delegation(self) -> str:
        return ""  # the runtime does not tell; edgekd lint reads it from the file


class CoreMl:
    """Core ML by coremltools, on a Mac; ``compute_units`` of the job say where (``ALL``, ``CPU_ONLY`` …)."""

    def __init__(self, module: Any, job: dict[str, Any]) -> None:
        units = getattr(module.ComputeUnit, job.get("compute_units", "ALL"))
        self.name = f"Core ML of macOS {platform.mac_ver()[0]} by coremltools {module.__version__} ({units.name})"
        description = module.utils.load_spec(job["model"]).description
        inputs = {value.name: value.type for value in description.input}
        _check_names("input", job["input_names"], list(inputs))
        _check_names("output", job["output_names"], [value.name for value in description.output])
        pictures = [name for name, kind in inputs.items() if kind.WhichOneof("Type") != "multiArrayType"]
        if pictures:
            raise AgentError(f"input {pictures[0]!r} is no array; measure a file with pictures in Xcode")
        self._outputs = job["output_names"]
        self._types = {name: _COREML_DTYPES[kind.multiArrayType.dataType] for name, kind in inputs.items()}
        shape = inputs[job["input_names"][0]].multiArrayType.shape
        self.batch = int(shape[0]) if len(shape) else 1
        self._model = module.models.MLModel(job["model"], compute_units=units)

    def prepare(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return _cast(arrays, self._types)

    def __call__(self, arrays: dict[str, Any]) -> list[Any]:
        outputs = self._model.predict(arrays)
        return [outputs[name] for name in self._outputs]

    def delegation(self) -> str:
        return ""  # Core ML places its operators by itself; Xcode's report shows where


# By number, as mlmodel/format/FeatureTypes.proto of coremltools has it.
_COREML_DTYPES = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32"}

# By number, as executorch/runtime/core/portable_type/scalar_type.h has it.
_EXECUTORCH_DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool"}

RUNTIMES: dict[str, tuple[str, Callable[[Any, dict[str, Any]], Runtime]]] = {
    "onnx": ("onnxruntime", OnnxRuntime),
    "ort": ("onnxruntime", OnnxRuntime),
    "tflite": ("ai_edge_litert.interpreter", LiteRt),
    "executorch": ("executorch.runtime", ExecuTorch),
    "coreml": ("coremltools", CoreMl),
}


def measure(job: dict[str, Any], turns: Turns | None = None) -> dict[str, Any]:
    """One block: load, first inference, warm-up, timed inferences; then the outputs, if they are wanted.

    Args:
        turns: Of the timed inferences, with other processes; None when this one is alone.

    Returns:
        The fields of edgekd.measurement.Block.

    Raises:
        AgentError: The runtime is missing, or the file or the inputs do not fit it.
    """
    plan = job["plan"]
    pin_threads(plan["threads"])
    pinned = pin_cores(job.get("cores") or ())
    import numpy as np  # after the pinning: its thread pool is sized on import

    conditions = describe_machine() | {"pinned_to_cores": pinned}
    conditions |= {f"{key}_before": value for key, value in read_state().items()}
    module_name, start = RUNTIMES[job["target"]]
    began = time.perf_counter_ns()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise AgentError(f"target {job['target']!r} needs {module_name.partition('.')[0]}: {error}") from error
    imported = time.perf_counter_ns()
    if not Path(job["model"]).exists():  # a Core ML package is a folder
        raise AgentError(f"no model file at {job['model']}")
    resident = _status_field("VmRSS")
    loading = time.perf_counter_ns()
    try:
        runtime = start(module, job)
    except AgentError:
        raise
    except Exception as error:
        raise AgentError(f"{module_name} cannot load {job['model']}: {_first_line(error)}") from error
    loaded = time.perf_counter_ns()

    sample = runtime.prepare(_first(_load(job["sample"], job["input_names"]), runtime.batch))
    step_ns = timer_step_ns()
    try:
        first_ms = _time(runtime, sample, 1)
        warmup_ms, converged = warm_up(runtime, sample, plan)
        group = inferences_per_sample(step_ns, statistics.median(warmup_ms[-WINDOW:] or [first_ms]))
        switched = _status_field("nonvoluntary_ctxt_switches")
        cpu_ns = time.process_time_ns()
        latency_ms = time_inferences(runtime, sample, plan, group, turns)
        cpu_ns = time.process_time_ns() - cpu_ns
    except Exception as error:
        raise AgentError(f"{runtime.name} cannot run {job['model']}: {_first_line(error)}") from error
    peak = peak_memory_bytes()  # before the inputs of the outputs are loaded: they are not the model's
    conditions |= {f"{key}_after": value for key, value in read_state().items()}
    conditions |= {
        "runtime": runtime.name,
        "numpy": np.__version__,
        "threads": str(plan["threads"]),
        "threads_alive": _status_field("Threads"),
        "timer_step_ns": str(step_ns),
        "inferences_per_sample": str(group),
        "resident_before_model": resident,
        "involuntary_switches": str(int(_status_field("nonvoluntary_ctxt_switches")) - int(switched))
        if switched
        else "",
        "cpu_share": f"{cpu_ns / (sum(latency_ms) * group * 1e6):.2f}",
        "turns": str(turns.taken) if turns else "",
        "delegation": runtime.delegation(),
    }
    if job["outputs"] is not None:
        write_outputs(runtime, job)
    again = time.perf_counter_ns()
    start(module, job)
    warm_ms = (time.perf_counter_ns() - again) / 1e6
    operators = profile(start, module, job, sample) if plan.get("profile") else []
    return {
        "runtime_load_ms": (imported - began) / 1e6,
        "model_load_ms": (loaded - loading) / 1e6,
        "first_inference_ms": first_ms,
        "warmup_ms": warmup_ms,
        "latency_ms": latency_ms,
        "peak_memory_bytes": peak,
        "converged": converged,
        "conditions": {key: value for key, value in conditions.items() if value},
        "warm_load_ms": warm_ms,
        "operators": operators,
        "void": throttled(conditions.get("throttle_before", ""), conditions.get("throttle_after", "")),
    }


def profile(
    start: Callable[[Any, dict[str, Any]], Runtime], module: Any, job: dict[str, Any], sample: dict[str, Any]
) -> list[dict[str, Any]]:
    """The operators with their times, from a session of its own; nothing where the runtime has no profile in Python."""
    if start is not OnnxRuntime:
        return []
    runtime = OnnxRuntime(module, job | {"profile_to": f"{job['result']}.profile"})
    for _ in range(PROFILED_RUNS):
        runtime(sample)
    return runtime.end_profile()


def pin_threads(threads: int) -> None:
    """Size the pools that look at the environment; the runtimes are also told when they start.

    NumPy's own pools get one thread: they are no part of the model.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    for name in ("OPENBLAS_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):
        os.environ[f"{name}_THREADS"] = "1"


def pin_cores(cores: Sequence[int]) -> str:
    """Keep this process on these processors.

    Returns:
        Those that it now may use; empty when none were asked for.

    Raises:
        AgentError: There are no such processors, or this system cannot.
    """
    if not cores:
        return ""
    if not hasattr(os, "sched_setaffinity"):
        raise AgentError(f"cores {list(cores)} were asked for; only Linux keeps a process on cores")
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        there = sorted(os.sched_getaffinity(0))
        raise AgentError(f"cores {list(cores)} were asked for; this process may use {there} ({error})") from None
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def throttled(before: str, after: str) -> str:
    """Why a block says nothing, from ``throttle_flags`` before and after it; empty when the machine did not slow down.

    A counter (``x=3``) counts when it rose; any other flag counts when it stands.
    """
    words, earlier = after.split("; ") if after else [], before.split("; ") if before else []
    standing = [word for word in dict.fromkeys(earlier + words) if word and "=" not in word]
    risen = [word for word in words if "=" in word and word not in earlier and before]
    return f"throttled: {'; '.join(standing + risen)}" if standing or risen else ""


def warm_up(
    runtime: Runtime, sample: dict[str, Any], plan: dict[str, Any], time_ms: Callable[..., float] | None = None
) -> tuple[list[float], bool]:
    """The rule of edgekd.measurement.Plan: the minimum, then until two windows agree or a cap is met.

    Returns:
        Milliseconds per inference, in order, and whether the windows agreed.
    """
    time_ms = time_ms or _time
    latency_ms: list[float] = []
    spent_ms = 0.0
    while len(latency_ms) < plan["warmup_runs"] or spent_ms < plan["warmup_s"] * 1e3:
        latency_ms.append(time_ms(runtime, sample, 1))
        spent_ms += latency_ms[-1]
    least, least_ms = len(latency_ms), spent_ms
    while not settled(latency_ms):
        if len(latency_ms) - least >= SETTLING_RUNS or spent_ms - least_ms >= SETTLING_S * 1e3:
            return latency_ms, False
        latency_ms.append(time_ms(runtime, sample, 1))
        spent_ms += latency_ms[-1]
    return latency_ms, True


def settled(latency_ms: list[float]) -> bool:
    """Whether the medians of the last two windows differ by less than 2 %."""
    if len(latency_ms) < 2 * WINDOW:
        return False
    before = statistics.median(latency_ms[-2 * WINDOW : -WINDOW])
    return abs(statistics.median(latency_ms[-WINDOW:]) - before) < SETTLED * before


def time_inferences(
    runtime: Runtime, sample: dict[str, Any], plan: dict[str, Any], group: int, turns: Turns | None = None
) -> list[float]:
    """Timed samples with the garbage collector off; each is the mean of ``group`` inferences (1 on a fine clock)."""
    latency_ms: list[float] = []
    spent_ms = turn_ms = 0.0
    turn_runs = 0
    gc.collect()
    gc.disable()
    try:
        while True:
            least = len(latency_ms) >= plan["min_runs"] and spent_ms >= plan["min_s"] * 1e3
            is_enough = least or (bool(latency_ms) and spent_ms >= plan["max_s"] * 1e3)
            if turns is None and is_enough:
                break
            if turns is not None and (not turns.taken or (turn_ms >= TURN_S * 1e3 and turn_runs >= TURN_RUNS)):
                if not turns.wait(is_enough):
                    break
                turn_ms, turn_runs = 0.0, 0
            latency_ms.append(_time(runtime, sample, group))
            spent_ms += latency_ms[-1] * group
            turn_ms += latency_ms[-1] * group
            turn_runs += 1
    finally:
        gc.enable()
    return latency_ms


class Turns:
    """One process's end of the rope: it says whether it has enough samples, and waits until it may go on.

    Attributes:
        taken: How many turns it had.
    """

    def __init__(self) -> None:
        # What a runtime prints must not be taken for a word of ours.
        self._say = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.taken = 0

    def wait(self, is_enough: bool) -> bool:
        """Give the turn away; False when there will be no further one."""
        self._say.write("enough\n" if is_enough else "more\n")
        self._say.flush()
        answer = sys.stdin.readline().strip()
        if answer not in ("go", "stop"):
            raise AgentError("whoever gives the turns is gone")
        self.taken += answer == "go"
        return answer == "go"


class _EndedError(Exception):
    """A process that should take turns is gone; its exit code says why."""


def give_turns(jobs: list[str], seed: int) -> int:
    """A process for each job, each in the folder of its job; one works at a time, in an order drawn for each round.

    They start one after the other, so that no start is disturbed, and end one after the other.

    Returns:
        0 when all results were written; else the exit code of the one that failed, which has said why on stderr.
    """
    drawn = random.Random(seed)
    processes: list[subprocess.Popen[str]] = []
    try:
        for job in drawn.sample(jobs, len(jobs)):
            processes.append(_start_in_turns(Path(job).resolve()))
            _ask(processes[-1], "")
        while "more" in [_ask(process, "go\n") for process in drawn.sample(processes, len(processes))]:
            pass
        for process in processes:
            process.communicate("stop\n")
    except _EndedError as error:
        error.args[0].wait(10)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()  # nothing, when it has ended
            process.wait()
    failed = [code for code in codes if code]
    return (failed[0] if failed[0] > 0 else 128 - failed[0]) if failed else int(len(codes) < len(jobs) or None in codes)


def _start_in_turns(job: Path) -> subprocess.Popen[str]:
    # As this process was started: without -P, files beside the agent would shadow others' modules.
    python = [sys.executable, "-P"] if sys.flags.safe_path else [sys.executable]
    command = [*python, str(Path(__file__).resolve()), "--in-turns", job.name]
    return subprocess.Popen(command, cwd=job.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: subprocess.Popen[str], words: str) -> str:
    """Say something to a process, and wait until it gives its turn away.

    Raises:
        _EndedError: It has ended instead.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(words)
        process.stdin.flush()
    except BrokenPipeError:
        raise _EndedError(process) from None
    answer = process.stdout.readline().strip()
    if answer not in ("more", "enough"):
        raise _EndedError(process)
    return answer


def _time(runtime: Runtime, sample: dict[str, Any], group: int) -> float:
    """Milliseconds of one inference: input handed over, computed, outputs back as arrays."""
    if group == 1:
        began = time.perf_counter_ns()
        runtime(sample)
        return (time.perf_counter_ns() - began) / 1e6
    began = time.perf_counter_ns()
    for _ in range(group):
        runtime(sample)
    return (time.perf_counter_ns() - began) / 1e6 / group


def timer_step_ns(looks: int = 2000) -> int:
    """Smallest step that the monotonic clock was seen to make: its resolution and the cost of reading it."""
    steps = []
    for _ in range(looks):
        before = time.perf_counter_ns()
        after = time.perf_counter_ns()
        if after > before:
            steps.append(after - before)
    return min(steps, default=math.ceil(time.get_clock_info("perf_counter").resolution * 1e9))


def inferences_per_sample(step_ns: int, median_ms: float) -> int:
    """How many inferences one sample must span so that a step of the clock is at most 2 % of it."""
    return max(1, math.ceil(step_ns / (TIMER_SHARE * median_ms * 1e6)))


def write_outputs(runtime: Runtime, job: dict[str, Any]) -> None:
    """Outputs of all inputs, by the file's names, samples on the first axis.

    Raises:
        AgentError: The inputs do not fit the file.
    """
    import numpy as np

    arrays = runtime.prepare(_load(job["inputs"], job["input_names"]))
    count, batch = len(arrays[job["input_names"][0]]), runtime.batch
    if count == 0 or count % batch:
        raise AgentError(f"{job['model']} takes {batch} samples at a time; {job['inputs']} has {count}")
    parts: list[list[Any]] = [[] for _ in job["output_names"]]
    for begin in range(0, count, batch):
        try:
            outputs = runtime({name: array[begin : begin + batch] for name, array in arrays.items()})
        except Exception as error:
            raise AgentError(f"{runtime.name} fails on sample {begin}: {_first_line(error)}") from error
        for part, output in zip(parts, outputs, strict=True):
            part.append(output)
    with _Replaced(Path(job["outputs"])) as path, path.open("wb") as file:
        np.savez(file, **{name: np.concatenate(part) for name, part in zip(job["output_names"], parts, strict=True)})


def _load(path: str, names: list[str]) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            _check_names("input", names, file.files)
            return {name: np.ascontiguousarray(file[name]) for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise AgentError(f"{path} cannot be read as .npz: {_first_line(error)}") from error


def _first(arrays: dict[str, Any], batch: int) -> dict[str, Any]:
    for name, array in arrays.items():
        if len(array) < batch:
            raise AgentError(f"the file takes {batch} samples at a time; input {name!r} has {len(array)}")
    return {name: array[:batch] for name, array in arrays.items()}


def _cast(arrays: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """Whole numbers to the file's whole numbers, floats to its floats; never one to the other."""
    import numpy as np

    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) != np.issubdtype(types[name], np.floating):
            raise AgentError(f"input {name!r} takes {np.dtype(types[name]).name}; it got {array.dtype}")
    return {name: np.ascontiguousarray(array, dtype=types[name]) for name, array in arrays.items()}


def _onnx_dtype(name: str) -> Any:
    import numpy as np

    inner = name.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))
    except TypeError:
        raise AgentError(f"NumPy has no type for an input of {name}") from None


def _check_names(what: str, wanted: list[str], found: list[str]) -> None:
    lacking = [name for name in wanted if name not in found]
    if lacking:
        raise AgentError(f"no {what} called {lacking[0]!r}; there are {', '.join(found) or 'none'}")


def describe_machine() -> dict[str, str]:
    """What does not change while a block runs: processor, cores, system, versions. Unreadable is left out."""
    info = _read("/proc/cpuinfo")
    return {
        "processor": processor_name(info),
        "cores": str(os.cpu_count() or ""),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "model": _device_tree_model(),
        "virtual_machine": "yes" if " hypervisor" in info else "",
        "emulated": emulated_by(),
    }


def emulated_by() -> str:
    """The emulator that runs this process, or this whole machine; empty on real hardware."""
    task = f"/proc/self/task/{threading.get_native_id()}/exe"  # qemu-user shows its guest's name in /proc/self/exe only
    try:
        if Path(task).readlink().name.startswith("qemu-"):
            return "qemu-user"
    except OSError:
        pass
    return "QEMU" if _device_tree_model() == "linux,dummy-virt" else ""


def _device_tree_model() -> str:
    """A board's name: ``Raspberry Pi 5 Model B Rev 1.0``; empty on a PC."""
    return _read("/proc/device-tree/model").rstrip("\0")


def processor_name(info: str) -> str:
    """Of x86 from /proc/cpuinfo, of a board from its device tree, else what Python knows."""
    for line in info.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _device_tree_model() or platform.processor() or platform.machine()


def read_state() -> dict[str, str]:
    """What changes while a block runs: clock, temperature, load. Unreadable is left out."""
    khz = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    hottest = max(
        (int(value) for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp") if (value := _read(str(zone)))),
        default=None,
    )
    return {
        "clock_mhz": str(int(khz) // 1000) if khz else "",
        "temperature_c": f"{hottest / 1000:.1f}" if hottest is not None else "",
        "load_average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "throttle": throttle_flags(Path("/sys")),
    }


# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled: what holds now; bits 16 to 19 are the past.
PI_FLAGS = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}


def throttle_flags(system: Path) -> str:
    """What the kernel says of a processor held below its speed, joined by ``; ``; unreadable is left out.

    A Raspberry Pi's firmware has flags; on Arm the thermal governor's coolers are at work when above 0; on Intel
    there is a count of throttlings per core.
    """
    found = []
    if bits := _read(str(system / "devices/platform/soc/soc:firmware/get_throttled")):
        found += [name for bit, name in PI_FLAGS.items() if int(bits, 16) >> bit & 1]
    for cooler in sorted(system.glob("class/thermal/cooling_device*")):
        kind, state = _read(str(cooler / "type")), _read(str(cooler / "cur_state"))
        if "cpufreq" in kind and state.isdigit() and int(state) > 0:
            found.append(f"{kind} cools at step {state}")
    counts = [_read(str(path)) for path in system.glob("devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")]
    if any(counts):
        found.append(f"thermal_throttle_count={sum(int(count) for count in counts if count.isdigit())}")
    return "; ".join(found)


def peak_memory_bytes() -> int | None:
    """Resident peak of this process.

    From /proc where there is one: on Linux ``ru_maxrss`` starts at the size of the process that started this one.
    """
    if high := _status_field("VmHWM"):
        return int(high.split()[0]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _status_field(name: str) -> str:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""


def _read(path: str) -> str:
    """A file of the kernel; empty where it is missing or not ours to read."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


class _Replaced:
    """A path to write to, which takes the place of the wanted one only when all was written."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)


def read_job(path: Path) -> dict[str, Any]:
    """The job, checked.

    Raises:
        ValueError: It is not JSON, lacks a key, or names an unknown target.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    lacking = [f"{key} ({meaning})" for key, meaning in KEYS.items() if key not in job]
    if lacking:
        raise ValueError(f"the job lacks {', '.join(lacking)}")
    if job["target"] not in RUNTIMES:
        raise ValueError(f"no runtime for target {job['target']!r}; there are {', '.join(RUNTIMES)}")
    if not job["input_names"] or job["plan"]["threads"] < 1 or job["plan"]["min_runs"] < 1:
        raise ValueError("a job needs an input, a thread and a timed run")
    if (job["inputs"] is None) != (job["outputs"] is None):
        raise ValueError("inputs and outputs are both paths or both null")
    return job


def _die_with_parent() -> None:
    """Linux: end when whoever started this ends, however it ends; nothing would read the result."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def main(arguments: list[str]) -> int:
    """Run one job, or several in turns; the exit code says how it went."""
    _die_with_parent()
    match arguments:
        case ["--seed", seed, *jobs] if jobs:
            return give_turns(jobs, int(seed))
        case ["--in-turns", job]:
            return _run(job, Turns())
        case [job]:
            return _run(job, None)
    sys.stderr.write("usage: python agent.py job.json, or python agent.py --seed 0 a/job.json b/job.json\n")
    return 2


def _run(name: str, turns: Turns | None) -> int:
    try:
        job = read_job(Path(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"{name}: {_first_line(error)}\n")
        return 2
    try:
        block = measure(job, turns)
        with _Replaced(Path(job["result"])) as path:
            path.write_text(json.dumps(block), encoding="utf-8")
    except (AgentError, OSError, MemoryError) as error:
        sys.stderr.write(f"{_first_line(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
