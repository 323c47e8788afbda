"""The apple devices: what they say where there is no Mac. On a Mac or with an iPhone: pytest -m device."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.benchmarks.session import measure
from edgekd.errors import DeviceError
from edgekd.measurement import Plan
from edgekd.profiles import load_device
from edgekd.types import Artifact

QUICK = Plan(blocks=2, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=0.0, max_s=2.0)
off_apple = pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")

File = tuple[Artifact, Path]


@pytest.fixture(scope="module")
def coreml_file(small_convnet: object, onnx_file: File, tmp_path_factory: pytest.TempPathFactory) -> File:
    """The convnet as a Core ML package, by coremltools and not by ours."""
    coremltools = pytest.importorskip("coremltools")
    import torch

    folder = tmp_path_factory.mktemp("coreml")
    traced = torch.jit.trace(small_convnet, torch.zeros(1, 1, 12, 12))
    inputs = [coremltools.TensorType("image", (1, 1, 12, 12))]
    outputs = [coremltools.TensorType("logits")]
    coremltools.convert(traced, inputs=inputs, outputs=outputs, convert_to="mlprogram").save(folder / "m.mlpackage")
    return replace(onnx_file[0], target="coreml", precision="fp16", path="m.mlpackage"), folder


@off_apple
@pytest.mark.parametrize(("name", "what"), [("mac", "this is no Mac"), ("iphone", "an iPhone is measured from a Mac")])
def test_elsewhere_it_is_not_run_and_says_why(name: str, what: str, onnx_file: File) -> None:
    device = load_device(name)
    status = device.probe()
    assert not status.reachable
    assert status.reason.startswith(what)
    assert status.reason.endswith("bring results from there with: edgekd bench import")
    artifact = replace(onnx_file[0], target="coreml")
    inputs = {"image": np.zeros((1, 1, 12, 12), np.float32)}
    with pytest.raises(DeviceError, match=what):
        device.run(artifact, onnx_file[1], inputs, QUICK)
    with pytest.raises(DeviceError, match=f"{name}: {what}"):
        measure(artifact, onnx_file[1], name, device, inputs, None, None, QUICK)


@off_apple
def test_the_agent_reads_a_package_and_never_invents_a_time(coreml_file: File, tmp_path: Path) -> None:
    artifact, folder = coreml_file
    np.savez(tmp_path / "sample.npz", image=np.zeros((1, 1, 12, 12), np.float32))
    job = {
        "target": "coreml",
        "model": str(folder / artifact.path),
        "input_names": ["image"],
        "output_names": ["logits"],
        "sample": "sample.npz",
        "inputs": None,
        "outputs": None,
        "result": "block.json",
        "compute_units": "CPU_ONLY",
        "plan": {"threads": 1, "warmup_runs": 1, "warmup_s": 0, "min_runs": 1, "min_s": 0, "max_s": 1},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-P", "-m", "edgekd.devices.agent", "job.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "(CPU_ONLY) cannot run" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "block.json").exists()


@pytest.mark.device
def test_core_ml_is_measured_on_this_mac(coreml_file: File) -> None:
    assert sys.platform == "darwin", "needs a Mac"
    images = np.random.default_rng(0).standard_normal((4, 1, 12, 12)).astype(np.float32)
    found = measure(*coreml_file, "mac", load_device("mac"), {"image": images}, None, None, QUICK)
    assert [len(block.latency_ms) for block in found.blocks] == [10, 10]


@pytest.mark.device
def test_core_ml_is_measured_on_a_connected_iphone(coreml_file: File) -> None:
    toml = os.environ.get("EDGEKD_IPHONE")
    assert toml, "set EDGEKD_IPHONE to the path of a TOML that extends iphone"
    images = np.random.default_rng(0).standard_normal((4, 1, 12, 12)).astype(np.float32)
    found = measure(*coreml_file, "iphone", load_device(toml), {"image": images}, None, None, QUICK)
    assert len(found.blocks) == 2
