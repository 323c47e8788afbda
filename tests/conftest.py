"""Shared fixtures: tiny real programs, no mocks."""

import functools
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see edgekd.cli.app.main

import atexit
import shutil
import subprocess
import tempfile

os.environ["EDGEKD_STATE"] = tempfile.mkdtemp(prefix="edgekd-tests-")  # no test writes into the user's history
atexit.register(shutil.rmtree, os.environ["EDGEKD_STATE"], ignore_errors=True)
os.environ.pop("EDGEKD_HISTORY", None)

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.compression.compress import compress
from edgekd.devices import _page
from edgekd.errors import DeviceError
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import export_program
from edgekd.protocols import Exporter
from edgekd.types import Artifact, Card, Parity, Student, TensorSpec


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow and device tests run when they are asked for with -m; else they are skipped aloud, and counted."""
    if config.option.markexpr:
        return
    for item in items:
        for marker in ("slow", "device"):
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: run with -m {marker}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What waits for something that never comes fails in the line where it waits, and again in what waits behind it."""
    if not hasattr(signal, "SIGALRM"):
        return (yield)
    limit_s = 3600 if item.get_closest_marker("slow") else 600

    def give_up(*_: object) -> None:
        pytest.fail(f"not done after {limit_s} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, limit_s, 60)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def small_convnet() -> nn.Module:
    """A convnet with everything that compression has to fold or fuse; (batch, 1, 12, 12) to (batch, 5)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, eps=1e-3),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for _ in range(3):  # running statistics that are not the defaults
        net(torch.randn(16, 1, 12, 12))
    return net.eval()


@pytest.fixture(scope="session")
def convnet_student(small_convnet: nn.Module) -> Student:
    program = export_program(small_convnet, [torch.zeros(1, 1, 12, 12)])
    card = Card("convnet", input_specs(program), output_specs(program), labels=("a", "b", "c", "d", "e"))
    return Student(program, card)


class TextEncoder(nn.Module):
    """One layer of a transformer encoder over token ids and a padding mask; (batch, 6) twice to (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.layer(self.tokens(ids), src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@pytest.fixture(scope="session")
def encoder_student() -> Student:
    torch.manual_seed(2)
    ids = torch.zeros(1, 6, dtype=torch.int32)
    program = export_program(TextEncoder().eval(), [ids, torch.ones_like(ids)])
    card = Card("encoder", input_specs(program), output_specs(program), labels=("ü", "b", "c"))
    return Student(program, card)


def student_inputs(student: Student, count: int) -> dict[str, np.ndarray]:
    """Noise for float inputs, token ids below 40 and padding masks for integer ones; the same in every call."""
    generator, samples = np.random.default_rng(1), {}
    for spec in student.card.inputs:
        shape = (count, *spec.shape[1:])
        if spec.dtype == "float32":
            samples[spec.name] = generator.standard_normal(shape, dtype=np.float32)
        elif spec.name == "mask":
            samples[spec.name] = (np.arange(shape[1]) < generator.integers(2, 7, (count, 1))).astype(spec.dtype)
        else:
            samples[spec.name] = generator.integers(0, 40, shape).astype(spec.dtype)
    return samples


@pytest.fixture(scope="session")
def inputs_of() -> Callable[[Student, int], dict[str, np.ndarray]]:
    """``inputs_of(student, count)``: see :func:`student_inputs`."""
    return student_inputs


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable[[str, str], tuple[Student, Path]]]:
    """``writer(exporter, nets)`` gives ``written(net, precision)``: the program and its file, each written once."""

    def writer(exporter: Exporter, nets: dict[str, Student]) -> Callable[[str, str], tuple[Student, Path]]:
        folder = tmp_path_factory.mktemp("written")

        @functools.cache
        def written(net: str, precision: str) -> tuple[Student, Path]:
            source = exporter.precisions[precision].source
            student = compress(nets[net], source, student_inputs(nets[net], 24))
            path = folder / f"{net}_{precision}{exporter.suffix}"
            exporter.write(student, path, precision, exporter.options())
            return student, path

        return written

    return writer


@pytest.fixture(scope="session")
def onnx_file(small_convnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    """The convnet as ONNX, made by PyTorch's exporter and not by ours: what measures needs no exporter."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx")
    torch.onnx.export(
        small_convnet,
        (torch.zeros(1, 1, 12, 12),),
        folder / "model.onnx",
        input_names=["image"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    return _artifact("onnx", folder / "model.onnx", "image", "logits"), folder


@pytest.fixture(scope="session")
def tflite_file(small_convnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    """The convnet as TFLite, made by litert-torch and not by ours."""
    litert_torch = pytest.importorskip("litert_torch")
    folder = tmp_path_factory.mktemp("tflite")
    litert_torch.convert(small_convnet, (torch.zeros(1, 1, 12, 12),)).export(str(folder / "model.tflite"))
    return _artifact("tflite", folder / "model.tflite", "args_0", "output_0"), folder


@pytest.fixture(params=["onnx_file", "tflite_file"])
def file(request: pytest.FixtureRequest) -> tuple[Artifact, Path]:
    """A test that asks for it runs with both."""
    found: tuple[Artifact, Path] = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def images() -> np.ndarray:
    """Inputs of these files, float32 (6, 1, 12, 12)."""
    return np.random.default_rng(0).standard_normal((6, 1, 12, 12)).astype(np.float32)


def _artifact(target: str, path: Path, input_name: str, output_name: str) -> Artifact:
    inputs = (TensorSpec(input_name, (1, 1, 12, 12), "float32"),)
    outputs = (TensorSpec(output_name, (1, 5), "float32", "logits"),)
    content = path.read_bytes()
    return Artifact(
        target=target,
        precision="fp32",
        path=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        card=Card("convnet", inputs, outputs),
        inputs=inputs,
        outputs=outputs,
        toolchain={},
        source="",
        parity=Parity("not_run", "a file for tests of measuring"),
    )


@pytest.fixture(scope="session")
def library() -> Path:
    """The page's runtimes; installed once for this machine, as a user does."""
    if _page.installed():
        return _page.library()
    if shutil.which("npm") is None:
        pytest.skip("needs npm, for: edgekd devices prepare browser")
    try:
        return _page.install()
    except (DeviceError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the page's runtimes cannot be installed here: {error}")
