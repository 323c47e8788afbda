"""One block: a fresh load, warm-up, timed inferences, the outputs. What is timed and why: docs/measuring.md."""

from __future__ import annotations

import gc
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .answers import Answers, checked_lengths
from .cores import pin_cores, pinned_cores
from .errors import AgentError, first_line
from .job import Replaced, read_arrays
from .machine import describe_machine, peak_memory_bytes, read_state, status_field, throttled
from .runtimes import DECODERS, RUNTIMES, OnnxRuntime, Runtime
from .turns import Turns

WINDOW = 10  # inferences in each of the two windows whose medians are compared
SETTLED = 0.02  # their largest relative difference
SETTLING_RUNS = 200  # caps of the settling, counted after the minimum warm-up
SETTLING_S = 5.0
TURN_S = 0.01  # a turn lasts at least this long …
TURN_RUNS = 5  # … and this many samples: the first of a turn finds the caches full of the other file
PROFILED_RUNS = 30
TIMER_SHARE = 0.02  # largest share of one sample that the step of the clock may be


def measure(job: dict[str, Any], turns: Turns | None = None) -> dict[str, Any]:
    """One block: load, first inference, warm-up, timed inferences; then the outputs, if they are wanted.

    Of a language model with caches (``decoder`` in the job) an inference is one token of an answer, the first is that
    of a prompt, and the outputs are answers.

    Args:
        turns: Of the timed inferences, with other processes; None when this one is alone.

    Returns:
        The fields of edgekd.measurement.Block.

    Raises:
        AgentError: The runtime is missing, or the file or the inputs do not fit it.
    """
    plan = job["plan"]
    pin_threads(plan["threads"])
    pin_cores(job.get("cores") or ())
    import numpy as np  # after the pinning: its thread pool is sized on import

    conditions = describe_machine() | {"pinned_to_cores": pinned_cores()}
    conditions |= {f"{key}_before": value for key, value in read_state().items()}
    module_name, start = (DECODERS if job.get("decoder") else RUNTIMES)[job["target"]]
    began = time.perf_counter_ns()
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise AgentError(f"target {job['target']!r} needs {module_name.partition('.')[0]}: {error}") from error
    imported = time.perf_counter_ns()
    if not Path(job["model"]).exists():  # a Core ML package is a folder
        raise AgentError(f"no model file at {job['model']}")
    resident = status_field("VmRSS")
    loading = time.perf_counter_ns()
    try:
        runtime = start(module, job)
    except AgentError:
        raise
    except Exception as error:
        raise AgentError(f"{module_name} cannot load {job['model']}: {first_line(error)}") from error
    loaded = time.perf_counter_ns()

    sample = runtime.prepare(_first(read_arrays(job["sample"], job["input_names"]), runtime.batch))
    answers = _answers(runtime, sample, job) if job.get("decoder") else None
    time_ms = answers.time_token if answers else _time
    step_ns = timer_step_ns()
    try:
        first_ms = answers.time_first() if answers else _time(runtime, sample, 1)
        warmup_ms, converged = warm_up(runtime, sample, plan, time_ms)
        group = inferences_per_sample(step_ns, statistics.median(warmup_ms[-WINDOW:] or [first_ms]))
        switched = status_field("nonvoluntary_ctxt_switches")
        cpu_ns = time.process_time_ns()
        if answers:
            answers.begin_again()
        latency_ms = time_inferences(runtime, sample, plan, group, turns, time_ms)
        first_token_ms = answers.enough() if answers else []
        cpu_ns = time.process_time_ns() - cpu_ns
    except Exception as error:
        raise AgentError(f"{runtime.name} cannot run {job['model']}: {first_line(error)}") from error
    peak = peak_memory_bytes()  # before the inputs of the outputs are loaded: they are not the model's
    conditions |= {f"{key}_after": value for key, value in read_state().items()}
    conditions |= {
        "runtime": runtime.name,
        "numpy": np.__version__,
        "threads": str(plan["threads"]),
        "threads_alive": status_field("Threads"),
        "timer_step_ns": str(step_ns),
        "inferences_per_sample": str(group),
        "resident_before_model": resident,
        "involuntary_switches": str(int(status_field("nonvoluntary_ctxt_switches")) - int(switched))
        if switched
        else "",
        "cpu_share": f"{cpu_ns / ((sum(latency_ms) * group + sum(first_token_ms)) * 1e6):.2f}",
        "turns": str(turns.taken) if turns else "",
        "delegation": runtime.delegation(),
    }
    if job["outputs"] is not None:
        (write_answers if answers else write_outputs)(runtime, job)
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
        "first_token_ms": first_token_ms,
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
    runtime: Runtime,
    sample: dict[str, Any],
    plan: dict[str, Any],
    group: int,
    turns: Turns | None = None,
    time_ms: Callable[..., float] | None = None,
) -> list[float]:
    """Timed samples with the garbage collector off; each is the mean of ``group`` inferences (1 on a fine clock)."""
    time_ms = time_ms or _time
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
            latency_ms.append(time_ms(runtime, sample, group))
            spent_ms += latency_ms[-1] * group
            turn_ms += latency_ms[-1] * group
            turn_runs += 1
    finally:
        gc.enable()
    return latency_ms


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

    arrays = runtime.prepare(read_arrays(job["inputs"], job["input_names"]))
    count, batch = len(arrays[job["input_names"][0]]), runtime.batch
    if count == 0 or count % batch:
        raise AgentError(f"{job['model']} takes {batch} samples at a time; {job['inputs']} has {count}")
    parts: list[list[Any]] = [[] for _ in job["output_names"]]
    for begin in range(0, count, batch):
        try:
            outputs = runtime({name: array[begin : begin + batch] for name, array in arrays.items()})
        except Exception as error:
            raise AgentError(f"{runtime.name} fails on sample {begin}: {first_line(error)}") from error
        for part, output in zip(parts, outputs, strict=True):
            part.append(output)
    with Replaced(Path(job["outputs"])) as path, path.open("wb") as file:
        np.savez(file, **{name: np.concatenate(part) for name, part in zip(job["output_names"], parts, strict=True)})


def _answers(runtime: Any, sample: dict[str, Any], job: dict[str, Any]) -> Answers:
    (prompt,) = sample[job["input_names"][0]].tolist()
    return Answers(runtime, prompt, checked_lengths(job, len(prompt)))


def write_answers(runtime: Any, job: dict[str, Any]) -> None:
    """Answers to all prompts: ``tokens``, int32 (prompts, new tokens)."""
    import numpy as np

    name = job["input_names"][0]
    prompts = read_arrays(job["inputs"], [name])[name].tolist()
    found = [Answers(runtime, prompt, checked_lengths(job, len(prompt))).whole() for prompt in prompts]
    with Replaced(Path(job["outputs"])) as path, path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.array(found, np.int32)})


def _first(arrays: dict[str, Any], batch: int) -> dict[str, Any]:
    for name, array in arrays.items():
        if len(array) < batch:
            raise AgentError(f"the file takes {batch} samples at a time; input {name!r} has {len(array)}")
    return {name: array[:batch] for name, array in arrays.items()}
