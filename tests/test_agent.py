"""The agent, run as its users run it: as a process, on real files, in the real runtimes."""

import ast
import gc
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.devices._agents import packed_agent
from edgekd.devices.agent import block
from edgekd.devices.agent.cores import draw_cores
from edgekd.devices.agent.errors import AgentError
from edgekd.devices.agent.job import read_job
from edgekd.devices.agent.machine import describe_machine
from edgekd.devices.agent.operators import operator_times
from edgekd.devices.agent.runtimes import RUNTIMES, OnnxRuntime, session_config
from edgekd.measurement import Block
from edgekd.types import Artifact

QUICK = {"threads": 1, "warmup_runs": 3, "warmup_s": 0.0, "min_runs": 20, "min_s": 0.0, "max_s": 2.0}

File = tuple[Artifact, Path]


def write_job(work: Path, file: File, images: np.ndarray, **changes: Any) -> Path:
    artifact, folder = file
    name = artifact.inputs[0].name
    np.savez(work / "sample.npz", **{name: images[:1]})  # type: ignore[arg-type]
    np.savez(work / "inputs.npz", **{name: images})  # type: ignore[arg-type]
    job = {
        "target": artifact.target,
        "model": str(folder / artifact.path),
        "input_names": [name],
        "output_names": [artifact.outputs[0].name],
        "sample": "sample.npz",
        "inputs": "inputs.npz",
        "outputs": "outputs.npz",
        "result": "block.json",
        "plan": QUICK,
    }
    (work / "job.json").write_text(json.dumps(job | changes))
    return work / "job.json"


def run_agent(work: Path) -> subprocess.CompletedProcess[str]:
    (work / "agent.pyz").write_bytes(packed_agent())
    return subprocess.run(
        [sys.executable, "agent.pyz", "job.json"], cwd=work, capture_output=True, text=True, timeout=120
    )


def in_process(file: File, images: np.ndarray) -> np.ndarray:
    """The same file in the same runtime, called the way its own documentation does."""
    artifact, folder = file
    if artifact.target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / artifact.path, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])
    from ai_edge_litert.interpreter import Interpreter

    signature = Interpreter(model_path=str(folder / artifact.path), num_threads=1).get_signature_runner()
    return np.concatenate([signature(args_0=image[None])["output_0"] for image in images])


def test_a_block_holds_raw_samples_and_conditions(file: File, images: np.ndarray, tmp_path: Path) -> None:
    write_job(tmp_path, file, images)
    done = run_agent(tmp_path)
    assert done.returncode == 0, done.stderr
    found = Block.from_json(json.loads((tmp_path / "block.json").read_text()))
    assert len(found.latency_ms) == 20
    assert len(found.warmup_ms) >= 20, "two windows of ten are needed to settle"
    assert min(*found.latency_ms, found.first_inference_ms, found.model_load_ms, found.runtime_load_ms) > 0
    assert found.peak_memory_bytes is not None
    assert found.peak_memory_bytes > 10_000_000
    assert found.conditions["runtime"].startswith(("onnxruntime", "ai-edge-litert"))
    assert found.conditions["threads"] == "1"
    assert {"processor", "system", "python", "numpy", "timer_step_ns"} <= set(found.conditions)
    assert all(isinstance(value, str) and value for value in found.conditions.values())


def test_outputs_are_those_of_the_runtime_in_this_process(file: File, images: np.ndarray, tmp_path: Path) -> None:
    write_job(tmp_path, file, images)
    assert run_agent(tmp_path).returncode == 0
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert outputs.files == [file[0].outputs[0].name]
        np.testing.assert_array_equal(outputs[outputs.files[0]], in_process(file, images))


def test_without_wanted_outputs_none_are_written(file: File, images: np.ndarray, tmp_path: Path) -> None:
    write_job(tmp_path, file, images, inputs=None, outputs=None)
    assert run_agent(tmp_path).returncode == 0
    assert not (tmp_path / "outputs.npz").exists()


def test_it_stands_alone() -> None:
    with zipfile.ZipFile(io.BytesIO(packed_agent())) as archive:
        sources = {name: archive.read(name) for name in archive.namelist()}
    assert len(sources) == 14
    foreign, siblings = set(), {}
    for path, source in sources.items():
        nodes = list(ast.walk(ast.parse(source)))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in froms if not node.level}
        foreign |= {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
        siblings[Path(path).stem] = {node.module for node in froms if node.level}
    assert foreign == {"edgekd_agent", "numpy", "executorch", "torch"}  # ExecuTorch's own runtime takes torch's tensors
    assert siblings["block"]
    assert not siblings["machine"], "a board that is only looked at gets this file alone"


def test_it_is_packed_into_the_same_bytes_every_time() -> None:
    assert packed_agent.__wrapped__() == packed_agent()


def test_where_edgekd_is_installed_it_is_a_module(onnx_file: File, images: np.ndarray, tmp_path: Path) -> None:
    name = write_job(tmp_path, onnx_file, images).name
    command = [sys.executable, "-P", "-m", "edgekd.devices.agent"]
    assert subprocess.run([*command, name], cwd=tmp_path).returncode == 0
    outputs = (tmp_path / "outputs.npz").read_bytes()
    for path in ("outputs.npz", "block.json"):
        (tmp_path / path).unlink()
    done = subprocess.run(
        [*command, "--seed", "0", "--threads", "1", str(tmp_path / name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs.npz").read_bytes() == outputs
    assert "turns" in json.loads((tmp_path / "block.json").read_text())["conditions"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux keeps a process on cores")
def test_cores_are_drawn_from_the_fastest_that_a_process_may_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5})
    for core, capacity in enumerate((446, 446, 1024, 1024, 1024, 1024)):
        (tmp_path / f"cpu{core}").mkdir()
        (tmp_path / f"cpu{core}/cpu_capacity").write_text(f"{capacity}\n")
    drawn = [frozenset(draw_cores(2, random.Random(seed), tmp_path)) for seed in range(50)]
    assert set(drawn) == {frozenset(pair) for pair in ((2, 3), (2, 5), (3, 5))}
    assert draw_cores(4, random.Random(0), tmp_path) == [], "there are three"
    assert set(draw_cores(5, random.Random(0), tmp_path / "nothing told")) == {0, 1, 2, 3, 5}


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_runtime_has_as_many_threads_as_the_plan(file: File, images: np.ndarray, tmp_path: Path) -> None:
    alive = {}
    for threads in (1, 2, 3):
        write_job(tmp_path, file, images, plan=QUICK | {"threads": threads})
        assert run_agent(tmp_path).returncode == 0
        alive[threads] = int(json.loads((tmp_path / "block.json").read_text())["conditions"]["threads_alive"])
    assert alive[2] == alive[1] + 1
    assert alive[3] == alive[1] + 2


@pytest.mark.parametrize(
    ("machine", "flags", "saturate"),
    [
        ("x86_64", "fma avx2", True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("AMD64", "avx2 avx_vnni", False),
        ("x86_64", "avx2 avx512_vnni_of_nobody", True),
        ("x86_64", None, True),  # cannot be told: Windows, macOS
        ("aarch64", "asimd", False),
    ],
)
def test_products_of_bytes_may_saturate_on_x86_without_vnni_alone(
    machine: str, flags: str | None, saturate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = "" if flags is None else f"model name\t: some processor\nflags\t\t: {flags}\n"
    monkeypatch.setattr("edgekd.devices.agent.machine.platform.machine", lambda: machine)
    monkeypatch.setattr("edgekd.devices.agent.machine._read", lambda path: info if path == "/proc/cpuinfo" else "")
    assert session_config() == ({"session.x64quantprecision": "1"} if saturate else {})
    assert describe_machine().get("vnni") == (None if machine == "aarch64" else "no" if saturate else "yes")


def test_pools_of_libraries_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "9")
    block.pin_threads(2)
    assert [os.environ[name] for name in names] == ["2", "1", "1", "1", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="the trap is Linux's")
def test_peak_memory_is_not_that_of_the_process_that_started_it(
    onnx_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    write_job(tmp_path, onnx_file, images)
    ballast = np.ones(50_000_000)  # 400 MB, resident
    assert run_agent(tmp_path).returncode == 0
    peak = json.loads((tmp_path / "block.json").read_text())["peak_memory_bytes"]
    assert peak < ballast.nbytes / 2


def test_a_corrupt_model_gives_one_line_and_no_result(file: File, images: np.ndarray, tmp_path: Path) -> None:
    content = (file[1] / file[0].path).read_bytes()
    broken = tmp_path / f"broken{Path(file[0].path).suffix}"
    for damaged in (content[: len(content) // 3], b"not a model", b""):
        broken.write_bytes(damaged)
        write_job(tmp_path, file, images, model=str(broken))
        done = run_agent(tmp_path)
        assert done.returncode == 1
        assert str(broken) in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "block.json").exists()
        assert not (tmp_path / "outputs.npz").exists()


def test_a_killed_agent_leaves_nothing_behind(file: File, images: np.ndarray, tmp_path: Path) -> None:
    write_job(tmp_path, file, images, plan=QUICK | {"min_s": 60.0, "max_s": 60.0})
    (tmp_path / "agent.pyz").write_bytes(packed_agent())
    before = {path.name for path in tmp_path.iterdir()}
    process = subprocess.Popen([sys.executable, "agent.pyz", "job.json"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    time.sleep(1.5)  # into loading or measuring; either must leave nothing
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent ended")
def test_an_agent_whose_parent_ended_before_it_came_to_ask_measures_nothing(
    onnx_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    write_job(tmp_path, onnx_file, images)
    (tmp_path / "agent.pyz").write_bytes(packed_agent())
    told = {**os.environ, "EDGEKD_PARENT": str(os.getppid())}  # not this process, which is what it then has
    done = subprocess.run([sys.executable, "agent.pyz", "job.json"], cwd=tmp_path, env=told, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "block.json").exists()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"target": "tensorrt"}, 2, "no runtime for target 'tensorrt'; there are onnx, ort, tflite"),
        ({"plan": QUICK | {"threads": 0}}, 2, "a thread"),
        ({"inputs": None}, 2, "both"),
        ({"model": "missing.onnx"}, 1, "no model file at missing.onnx"),
        ({"output_names": ["classes"]}, 1, "no output called 'classes'; there are logits"),
        ({"input_names": ["photo"]}, 1, "no input called 'photo'; there are image"),
        ({"sample": "absent.npz"}, 1, "absent.npz cannot be read as .npz"),
    ],
)
def test_a_wrong_job_says_what_would_work(
    onnx_file: File, images: np.ndarray, tmp_path: Path, changes: dict[str, Any], code: int, words: str
) -> None:
    write_job(tmp_path, onnx_file, images, **changes)
    done = run_agent(tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr.splitlines()[-1]


def test_a_job_that_lacks_keys_names_them(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"target": "onnx"}')
    done = run_agent(tmp_path)
    assert done.returncode == 2
    assert "the model file" in done.stderr
    (tmp_path / "job.json").write_text("{")
    assert run_agent(tmp_path).returncode == 2


def test_whole_numbers_are_never_taken_for_floats(onnx_file: File, images: np.ndarray, tmp_path: Path) -> None:
    write_job(tmp_path, onnx_file, (images * 10).astype(np.int64))
    done = run_agent(tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "input 'image' takes float32; it got int64"


def test_doubles_are_cast_to_the_type_of_the_file(onnx_file: File, images: np.ndarray, tmp_path: Path) -> None:
    write_job(tmp_path, onnx_file, images.astype(np.float64))
    assert run_agent(tmp_path).returncode == 0


def test_a_runtime_that_is_not_installed_is_named(
    onnx_file: File, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RUNTIMES, "onnx", ("a_runtime_nobody_has", OnnxRuntime))
    job = read_job(write_job(tmp_path, onnx_file, images))
    with pytest.raises(AgentError, match="target 'onnx' needs a_runtime_nobody_has"):
        block.measure(job)


class Clock:
    """Plays given latencies in place of timed inferences: the rules below are about numbers, not about a runtime."""

    def __init__(self, latencies_ms: list[float], then_ms: float) -> None:
        self._latencies = iter(latencies_ms)
        self._then_ms = then_ms

    def __call__(self, *_: object) -> float:
        return next(self._latencies, self._then_ms)


ANY: Any = None


def test_warm_up_keeps_its_minimum_of_runs_and_seconds() -> None:
    plan = {"warmup_runs": 30, "warmup_s": 0.0}
    assert len(block.warm_up(ANY, ANY, plan, Clock([], 1.0))[0]) == 30
    plan = {"warmup_runs": 1, "warmup_s": 0.5}
    assert len(block.warm_up(ANY, ANY, plan, Clock([], 1.0))[0]) == 500


def test_warm_up_needs_two_windows_and_ends_when_they_agree() -> None:
    plan = {"warmup_runs": 1, "warmup_s": 0.0}
    latency_ms, converged = block.warm_up(ANY, ANY, plan, Clock([], 1.0))
    assert converged
    assert len(latency_ms) == 20
    falling = [5.0 - 0.1 * step for step in range(40)]
    latency_ms, converged = block.warm_up(ANY, ANY, plan, Clock(falling, 1.0))
    assert converged
    assert 40 < len(latency_ms) <= 60
    last, before = statistics.median(latency_ms[-10:]), statistics.median(latency_ms[-20:-10])
    assert abs(last - before) < 0.02 * before


def test_warm_up_that_never_settles_is_capped_and_says_so() -> None:
    plan = {"warmup_runs": 12, "warmup_s": 0.0}
    slower_and_slower = Clock([0.01 * 1.03**step for step in range(1000)], 1.0)
    latency_ms, converged = block.warm_up(ANY, ANY, plan, slower_and_slower)
    assert not converged
    assert len(latency_ms) == 12 + 200
    slower_still = Clock([100 * 1.03**step for step in range(1000)], 1.0)
    latency_ms, converged = block.warm_up(ANY, ANY, plan, slower_still)
    assert not converged
    assert sum(latency_ms[12:-1]) < 5000 <= sum(latency_ms[12:])


def test_timing_keeps_its_minimum_and_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"min_runs": 100, "min_s": 1.0, "max_s": 10.0}
    monkeypatch.setattr(block, "_time", Clock([], 1.0))
    assert len(block.time_inferences(ANY, ANY, plan, 1)) == 1000
    monkeypatch.setattr(block, "_time", Clock([], 50.0))
    assert len(block.time_inferences(ANY, ANY, plan, 1)) == 100
    monkeypatch.setattr(block, "_time", Clock([], 500.0))
    assert len(block.time_inferences(ANY, ANY, plan, 1)) == 20
    monkeypatch.setattr(block, "_time", Clock([], 1.0))
    assert len(block.time_inferences(ANY, ANY, plan, 10)) == 100, "a sample of ten inferences takes ten times as long"


def test_the_garbage_collector_is_off_while_timing_and_on_after_it() -> None:
    seen = []

    def watch(_: object) -> list[object]:
        seen.append(gc.isenabled())
        return []

    watched: Any = watch
    block.time_inferences(watched, {}, {"min_runs": 3, "min_s": 0.0, "max_s": 1.0}, 1)
    assert seen == [False] * 3
    assert gc.isenabled()


def test_a_coarse_clock_times_several_inferences_at_once() -> None:
    assert block.inferences_per_sample(60, 1.0) == 1
    assert block.inferences_per_sample(100_000, 1.0) == 5
    assert block.inferences_per_sample(1_000_000, 0.1) == 500
    assert 0 < block.timer_step_ns() < 1_000_000


def node_event(name: str, operator: str, unit: str, microseconds: int, index: int) -> dict[str, Any]:
    facts = {"op_name": operator, "provider": unit, "node_index": str(index)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": facts}


GPU = "WebGpuExecutionProvider"
ONE_INFERENCE = [  # as ONNX Runtime Web 1.30 told it; the pooling has two programs, the reshape none
    node_event("pool", "ReduceMean", GPU, 59, 2),
    node_event("view", "Reshape", GPU, 14, 3),
    node_event("det", "Det", "CPUExecutionProvider", 700, 4),
    {"cat": "Session", "name": "model_run", "dur": 3875, "args": {}},
]


def on_gpu(*microseconds: int) -> list[dict[str, Any]]:
    names = ("pool&ReduceMean&Transpose", "pool&ReduceMean&ReduceMean")
    return [{"cat": "Api", "name": n, "dur": t, "args": {}} for n, t in zip(names, microseconds, strict=True)]


def test_what_a_node_takes_on_the_gpu_is_told_by_the_gpu_and_summed_over_its_programs() -> None:
    events = ONE_INFERENCE * 3 + on_gpu(40, 400) + on_gpu(50, 450) + on_gpu(90, 3000)
    pool, view, det = operator_times(events)
    assert pool == {"name": "pool", "type": "ReduceMean", "unit": GPU, "ms": 0.5}
    assert (view["name"], view["ms"]) == ("view", 0.0)
    assert (det["unit"], det["ms"]) == ("CPUExecutionProvider", 0.7)


@pytest.mark.parametrize("told", [[], on_gpu(40, 400)[:1]], ids=["without timestamps", "with some lost"])
def test_the_handing_over_is_never_taken_for_the_time_on_a_gpu(told: list[dict[str, Any]]) -> None:
    (only,) = operator_times(ONE_INFERENCE * 2 + told)
    assert only["name"] == "det"


def test_a_profile_that_broke_off_before_an_inference_ended_tells_nothing_of_the_gpu() -> None:
    (only,) = operator_times(ONE_INFERENCE[:3] + on_gpu(40, 400))
    assert only["name"] == "det"
