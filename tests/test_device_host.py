"""The host device: real processes on real files, and what happens when they end badly."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgekd.benchmarks.session import measure
from edgekd.benchmarks.sides import read_artifacts
from edgekd.devices._folders import made
from edgekd.devices.host import HostDevice
from edgekd.errors import DeviceError, StorageError, UsageError
from edgekd.measurement import Measurement, Plan
from edgekd.profiles import load_device
from edgekd.protocols import Side, TakingTurns
from edgekd.stages.watching import minutes_lines, operator_lines
from edgekd.types import Artifact

from elsewhere import ENDLESS, check_turns, meanwhile, measuring_elsewhere, running_below, still_runs, wait_for

QUICK = Plan(blocks=2, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=0.0, max_s=2.0)

File = tuple[Artifact, Path]


def children() -> list[psutil.Process]:
    return running_below("agent.pyz")


def test_the_probe_tells_what_runs_here_and_why_not_the_rest() -> None:
    status = load_device("host").probe()
    assert status.reachable
    assert {"onnx", "tflite"} <= set(status.targets) | set(status.not_run)
    assert not set(status.targets) & set(status.not_run)
    assert status.facts["cores"] == str(os.cpu_count())
    if sys.platform != "darwin":
        assert status.not_run["coreml"] == "Core ML runs on Apple devices only; use a Mac or an iPhone"


def test_a_missing_runtime_is_told_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.devices.host.missing", lambda modules: modules)
    status = load_device("host").probe()
    assert status.targets == ()
    assert status.not_run["onnx"] == "onnxruntime is not installed; pip install 'edgekd[onnx]'"


def test_each_block_is_measured_and_all_inputs_get_outputs(file: File, images: np.ndarray) -> None:
    artifact, folder = file
    blocks, outputs = load_device("host").run(artifact, folder, {artifact.inputs[0].name: images}, QUICK)
    assert len(blocks) == 2
    assert blocks[0].latency_ms != blocks[1].latency_ms
    assert all(len(block.latency_ms) == 10 for block in blocks)
    assert list(outputs) == [artifact.outputs[0].name]
    assert outputs[artifact.outputs[0].name].shape == (6, 5)


def test_both_runtimes_compute_what_the_program_computes(
    onnx_file: File, tflite_file: File, images: np.ndarray, small_convnet: object
) -> None:
    import torch

    with torch.no_grad():
        expected = small_convnet(torch.from_numpy(images)).numpy()  # type: ignore[operator]
    for artifact, folder in (onnx_file, tflite_file):
        _, outputs = load_device("host").run(
            artifact, folder, {artifact.inputs[0].name: images}, replace(QUICK, blocks=1)
        )
        np.testing.assert_allclose(outputs[artifact.outputs[0].name], expected, atol=1e-5)


def test_a_corrupt_model_is_a_device_error_of_one_line(onnx_file: File, images: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(DeviceError, match=r"model.onnx \(onnx fp32\) on host: onnxruntime cannot load") as caught:
        load_device("host").run(onnx_file[0], tmp_path, {"image": images}, QUICK)
    assert "\n" not in str(caught.value)


def test_a_killed_process_is_a_device_error_that_names_the_signal(onnx_file: File, images: np.ndarray) -> None:
    def kill() -> None:
        wait_for(children)
        for child in children():
            child.kill()

    with meanwhile(kill), pytest.raises(DeviceError, match="ended by SIGKILL, perhaps for lack of memory"):
        load_device("host").run(*onnx_file, {"image": images}, ENDLESS)
    assert not children()


def test_a_process_that_takes_too_long_is_stopped(onnx_file: File, images: np.ndarray) -> None:
    began = time.monotonic()
    with pytest.raises(DeviceError, match="no result after 1 s; the process was stopped"):
        HostDevice(timeout_s=1.0).run(*onnx_file, {"image": images}, ENDLESS)
    assert time.monotonic() - began < 30, "it was left to end by itself, which takes a minute"
    assert not children()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("how", "has_started"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGKILL, True)]
)
def test_no_process_and_no_folder_outlives_the_one_that_measures(
    onnx_file: File, tmp_path: Path, how: signal.Signals, has_started: bool
) -> None:
    """Whether the measuring process has got as far as its runtime, or has only just come to life."""
    if how != signal.SIGINT and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent ended")
    files = tmp_path / "files"
    files.mkdir()
    with measuring_elsewhere("host", onnx_file, tmp_path, {"TMPDIR": str(files)}) as measuring:
        measuring.wait_for(children)
        (child,) = children()
        if has_started:
            measuring.wait_for(lambda: "onnxruntime" in Path(f"/proc/{child.pid}/maps").read_text())
        assert list(files.glob("edgekd-host-*"))
        measuring.end(how)
        wait_for(lambda: not still_runs(child))
    if how != signal.SIGINT:  # the others leave no time to clean up: the next that measures does
        made("edgekd-host", files).rmdir()
    assert list(files.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is had from /dev/full")
def test_a_full_disk_is_told_in_one_line(
    onnx_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    save = np.savez

    def save_to_full_disk(path: Path, **arrays: np.ndarray) -> None:
        path.symlink_to("/dev/full")
        save(path, **arrays)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "savez", save_to_full_disk)
    with pytest.raises(StorageError, match=f"cannot measure in {tmp_path}: No space left on device"):
        load_device("host").run(*onnx_file, {"image": np.zeros((3000, 1, 12, 12), np.float32)}, QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_target_or_plan_it_cannot_run_is_wrong_use(onnx_file: File, images: np.ndarray) -> None:
    artifact, folder = onnx_file
    with pytest.raises(UsageError, match="host runs onnx, ort, tflite, executorch; not 'coreml'"):
        load_device("host").run(replace(artifact, target="coreml"), folder, {"image": images}, QUICK)
    with pytest.raises(UsageError, match="at least 1 block"):
        load_device("host").run(artifact, folder, {"image": images}, replace(QUICK, blocks=0))
    with pytest.raises(UsageError, match="takes input 'image'; given are photo"):
        load_device("host").run(artifact, folder, {"photo": images}, QUICK)


def sides(images: np.ndarray, *found: File) -> list[Side]:
    return [Side(artifact, folder, {artifact.inputs[0].name: images}) for artifact, folder in found]


def test_files_take_turns_in_processes_of_their_own(
    onnx_file: File, tflite_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    device = load_device("host")
    assert isinstance(device, TakingTurns)
    plan = replace(QUICK, min_runs=3000, min_s=0.1, max_s=600.0)  # so many do not fit into two turns
    began = time.monotonic()
    found = device.run_in_turns(sides(images, onnx_file, tflite_file), plan, seed=0)
    took_ms = (time.monotonic() - began) * 1e3
    assert [block.conditions["runtime"].split()[0] for block, _ in found] == ["onnxruntime", "ai-edge-litert"]
    assert check_turns([block for block, _ in found], plan) > 2
    cores = {block.conditions.get("pinned_to_cores", "") for block, _ in found}
    assert len(cores) == 1, "what slows one core slows both files"
    if sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1:
        assert cores.pop().isdecimal(), "one thread, one core"
    for (_, outputs), (artifact, folder) in zip(found, (onnx_file, tflite_file), strict=True):
        _, alone = device.run(artifact, folder, {artifact.inputs[0].name: images}, replace(QUICK, blocks=1))
        for name, output in alone.items():
            np.testing.assert_array_equal(outputs[name], output)
    assert took_ms > sum(sum(block.latency_ms) for block, _ in found), "only one works at a time"


def test_a_file_that_cannot_be_loaded_ends_the_turns_with_its_own_words(
    onnx_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    broken = replace(onnx_file[0], path="model.onnx"), tmp_path
    for order in ((onnx_file, broken), (broken, onnx_file)):
        with pytest.raises(DeviceError, match=f"onnxruntime cannot load {tmp_path}/model.onnx"):
            HostDevice().run_in_turns(sides(images, *order), QUICK, seed=0)
    assert not children()


def test_one_killed_in_its_turn_ends_the_other_too(onnx_file: File, images: np.ndarray) -> None:
    def kill() -> None:
        wait_for(lambda: len(children()) == 3)
        time.sleep(0.5)
        for child in children():
            if "--in-turns" in child.cmdline():
                child.kill()
                return

    with meanwhile(kill), pytest.raises(DeviceError, match="ended by SIGKILL, perhaps for lack of memory"):
        HostDevice().run_in_turns(sides(images, onnx_file, onnx_file), ENDLESS, seed=0)
    assert not children()


def test_turns_that_take_too_long_are_stopped_with_all_their_processes(onnx_file: File, images: np.ndarray) -> None:
    with pytest.raises(DeviceError, match="no result after 3 s; the process was stopped"):
        HostDevice(timeout_s=3.0).run_in_turns(sides(images, onnx_file, onnx_file), ENDLESS, seed=0)
    wait_for(lambda: not children())


def test_a_file_is_loaded_again_warm_and_tells_where_its_nodes_run(file: File, images: np.ndarray) -> None:
    artifact, folder = file
    (block,), _ = HostDevice().run(artifact, folder, {artifact.inputs[0].name: images}, replace(QUICK, blocks=1))
    assert block.warm_load_ms is not None
    assert block.warm_load_ms > 0
    units = dict(word.split("=") for word in block.conditions["delegation"].split())
    if artifact.target == "tflite":
        assert int(units["XNNPACK"]) > 0
        assert list(units) == ["XNNPACK", "CPU"]
    else:
        assert list(units) == ["CPUExecutionProvider"]
        assert int(units["CPUExecutionProvider"]) >= 4, "two convolutions, pooling and the last layer"


def test_a_node_that_the_delegate_does_not_take_is_counted_for_the_cpu(tmp_path: Path) -> None:
    litert_torch = pytest.importorskip("litert_torch")
    import torch

    class Summing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(torch.relu(x @ x.mT), 1) * 2

    litert_torch.convert(Summing().eval(), (torch.zeros(1, 4, 4),)).export(str(tmp_path / "model.tflite"))
    ((artifact, folder),) = read_artifacts(tmp_path / "model.tflite").values()
    inputs = {artifact.inputs[0].name: np.ones((1, 4, 4), np.float32)}
    (block,), _ = HostDevice().run(artifact, folder, inputs, replace(QUICK, blocks=1))
    units = {unit: int(count) for unit, count in (word.split("=") for word in block.conditions["delegation"].split())}
    assert units["CPU"] >= 1, "XNNPACK has no running sum"
    assert units["XNNPACK"] >= 1


def test_a_profile_times_every_operator_of_an_onnx_file(onnx_file: File, tflite_file: File, images: np.ndarray) -> None:
    plan = replace(QUICK, blocks=1, profile=True)
    found = {
        file[0].target: measure(*file, "host", HostDevice(), {"x": images}, None, None, plan)
        for file in (onnx_file, tflite_file)
    }
    operators = found["onnx"].blocks[0].operators
    assert {"Conv", "Gemm"} <= {operator.type for operator in operators} or "Conv" in {o.type for o in operators}
    assert {operator.unit for operator in operators} == {"CPUExecutionProvider"}
    assert all(operator.ms >= 0 for operator in operators)
    told = operator_lines(found["onnx"])
    assert told[0].startswith(f"onnx fp32: {len(operators)} operators, ")
    assert "CPUExecutionProvider=" in told[0]
    assert len(told) == 1 + min(10, len(operators))
    (line,) = operator_lines(found["tflite"])
    assert "gave no profile; nodes by unit: XNNPACK=" in line
    assert Measurement.from_json(found["onnx"].to_json()) == found["onnx"]


def test_a_sustained_run_lasts_as_long_as_it_was_told(onnx_file: File, images: np.ndarray) -> None:
    plan = replace(QUICK, blocks=1, min_s=1.5, max_s=1.5)
    found = measure(*onnx_file, "host", HostDevice(), {"image": images}, None, None, plan)
    latency_ms = found.blocks[0].latency_ms
    assert sum(latency_ms[:-1]) < 1500
    assert sum(latency_ms) > 1000, "what lies between the inferences is not theirs"
    (line,) = minutes_lines(found)
    assert "ms by minute: " in line
    assert "the last is 1.00× the first, host (" in line
