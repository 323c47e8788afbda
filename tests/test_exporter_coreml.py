"""Core ML packages: written from programs, read back by the evaluator, and refused where they are damaged."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.compression.compress import compress
from edgekd.errors import DataError, ExportError, ModelFileError, ParityError, UsageError
from edgekd.exporters._mil_package import model_proto
from edgekd.exporters._mil_write import rename_features
from edgekd.exporters.coreml import EXPORTER, load
from edgekd.exporting.export import Proof, export_student
from edgekd.programs.models import input_specs, load_program, output_specs, program_bytes, run_program
from edgekd.programs.tracing import export_program
from edgekd.protocols import Exporter, Runner
from edgekd.types import Card, Precision, Student

# Not importorskip: importing coremltools takes seconds, which collecting the tests should not.
pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


class MobileBlocks(nn.Module):
    """What small convnets are made of: depthwise, squeeze-excite, hard-swish, residuals, uneven pools, concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), nn.BatchNorm2d(8))
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.average = nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)
        self.largest = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.hardswish(self.stem(image))
        y = F.relu6(self.depthwise(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + y * gate
        x = torch.cat([self.average(x), self.largest(x)], 1)
        return torch.softmax(self.head(torch.flatten(x.mean((2, 3)), 1)), 1)


class Norms(nn.Module):
    """Batch norm that no convolution can take in, and the other norms."""

    def __init__(self) -> None:
        super().__init__()
        self.batch, self.group = nn.BatchNorm2d(4, eps=0.1), nn.GroupNorm(2, 4, eps=0.1)
        self.instance = nn.InstanceNorm2d(4, eps=0.1, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch(F.gelu(x)) + self.group(x) - self.instance(F.silu(x)) + F.local_response_norm(x, 3)


class TextEncoder(nn.Module):
    """A transformer over token ids with a mask, and a mean over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(40, 16), nn.Embedding(9, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.first, self.second = nn.LayerNorm(16, eps=1e-12), nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.first(self.tokens(input_ids) + self.places(torch.arange(9)))
        q, k, v = (part.view(-1, 9, 2, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        x = self.second(x + self.out(mixed.transpose(1, 2).reshape(-1, 9, 16)))
        x = x + self.narrow(F.gelu(self.wide(x)))
        counts = attention_mask.unsqueeze(-1).to(x.dtype)
        pooled = (x * counts).sum(1) / counts.sum(1).clamp(min=1e-9)
        return {"features": pooled, "logits": self.head(torch.tanh(pooled))}


class TextConvnet(nn.Module):
    """Embeddings, convolutions of three widths, the largest value of each."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 12)
        self.convolutions = nn.ModuleList(nn.Conv1d(12, 6, width) for width in (2, 3, 4))
        self.head = nn.Linear(18, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids).transpose(1, 2)
        found = [F.relu(convolution(x)).amax(2) for convolution in self.convolutions]
        return self.head(torch.cat(found, 1))


class Mistranslated(nn.Module):
    """What coremltools 9.0 turns into something else without a word; see ``_mil_prepare.py``."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = torch.tanh(x) + F.gelu(x, approximate="tanh")
        b = torch.add(x, y, alpha=2) - torch.sub(x, y, alpha=0.5) + torch.rsub(x, y, alpha=3)
        c = 1 / (y * y + 0.1) + F.rms_norm(x, (8,), eps=0.1)
        d = torch.var_mean(x, -1, correction=0, keepdim=True)[0] + torch.floor(y)
        e = torch.where((x > 0) | (y > 0), torch.div(x, 0.3, rounding_mode="floor"), y)
        return a + b + c + d + e


def student_of(module: nn.Module, *inputs: Tensor, dynamic_batch: bool = True) -> Student:
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    program = export_program(module, inputs, dynamic_batch=dynamic_batch)
    return Student(program, Card(type(module).__name__, input_specs(program), output_specs(program)))


def samples_of(student: Student, count: int = 4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    arrays: dict[str, np.ndarray] = {}
    for spec in student.card.inputs:
        shape = (count, *spec.shape[1:])
        if spec.name == "attention_mask":
            arrays[spec.name] = (np.arange(shape[1]) < random.integers(2, shape[1] + 1, (count, 1))).astype(np.int64)
        elif spec.dtype == "int64":
            arrays[spec.name] = random.integers(0, 40, shape)
        else:
            arrays[spec.name] = random.standard_normal(shape).astype(np.float32)
    return arrays


def run_all(runner: Runner, samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = len(next(iter(samples.values())))
    parts = [runner({name: array[i : i + 1] for name, array in samples.items()}) for i in range(count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def written(student: Student, path: Path, precision: Precision) -> tuple[Runner, Student, dict[str, np.ndarray]]:
    """Write and load; ``w8`` and ``w8a8`` are compressed first, as the core does."""
    samples = samples_of(student)
    if precision in ("w8", "w8a8"):
        student = compress(student, precision, samples)
    EXPORTER.write(student, path, precision)
    return EXPORTER.load(path), student, samples


MODELS: dict[str, Callable[[], Student]] = {
    "mobile": lambda: student_of(MobileBlocks(), torch.zeros(1, 3, 18, 18)),
    "encoder": lambda: student_of(
        TextEncoder(), torch.zeros(1, 9, dtype=torch.int64), torch.ones(1, 9, dtype=torch.int64)
    ),
    "text convnet": lambda: student_of(TextConvnet(), torch.zeros(1, 9, dtype=torch.int64)),
    "norms": lambda: student_of(Norms(), torch.zeros(1, 4, 5, 6)),
    "mistranslated": lambda: student_of(Mistranslated(), torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)),
}


@functools.cache
def traced(model: str) -> Student:
    return MODELS[model]()


TOLERANCES: dict[Precision, float] = {"fp32": 1e-5, "fp16": 1e-2, "w8": 1e-5, "w8a8": 1e-5}
WHOLE = [(model, precision) for model in ("mobile", "encoder") for precision in TOLERANCES]


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        *WHOLE,
        ("text convnet", "fp32"),
        ("text convnet", "w8"),
        ("norms", "fp32"),
        ("mistranslated", "fp32"),
    ],
)
def test_a_package_computes_what_its_program_computes(model: str, precision: Precision, tmp_path: Path) -> None:
    runner, student, samples = written(traced(model), tmp_path / "model.mlpackage", precision)
    outputs, expected = run_all(runner, samples), run_program(student.program, samples)
    assert list(outputs) == [spec.name for spec in student.card.outputs]
    for name, wanted in expected.items():
        assert outputs[name].dtype == np.float32
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(outputs[name], wanted, rtol=0, atol=TOLERANCES[precision] * scale)
    assert [spec.name for spec in runner.inputs] == [spec.name for spec in student.card.inputs]
    assert {spec.dtype for spec in runner.inputs} <= {"float32", "int32"}
    assert all(spec.shape[0] == 1 for spec in (*runner.inputs, *runner.outputs))
    assert runner.runtime.endswith("(fp16)" if precision == "fp16" else "(fp32)")


def test_static_int8_agrees_to_the_last_step_and_its_weights_are_bytes(
    convnet_student: Student, tmp_path: Path
) -> None:
    runner, student, samples = written(convnet_student, tmp_path / "model.mlpackage", "w8a8")
    expected = run_program(student.program, samples)
    for name, array in run_all(runner, samples).items():
        np.testing.assert_array_equal(array, expected[name])
    program = runner.program  # type: ignore[attr-defined]
    kinds = [step.operator.name for step in program.steps]
    assert {"quantize", "dequantize", "conv", "linear"} <= set(kinds)
    values = program.run({"input": samples["input"][:1]})
    quantized = [s.outputs[0][0] for s in program.steps if s.operator.name == "quantize"]
    assert quantized
    # coremltools writes int8 with the zero point -128 as uint8 without one: the same numbers.
    assert {values[name].dtype for name in quantized} == {torch.int8, torch.uint8}


def test_weights_of_w8_are_a_quarter(tmp_path: Path) -> None:
    student = student_of(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)), torch.zeros(1, 256))
    sizes = {}
    for precision in TOLERANCES:
        path = tmp_path / f"{precision}.mlpackage"
        written(student, path, precision)
        sizes[precision] = (path / WEIGHTS).stat().st_size
    numbers = 256 * 256 + 256 * 128
    assert sizes["fp32"] >= 4 * numbers
    assert 2 * numbers <= sizes["fp16"] < 2.1 * numbers
    assert numbers <= sizes["w8"] < 1.1 * numbers
    assert numbers <= sizes["w8a8"] < 1.1 * numbers


def test_the_same_program_gives_the_same_bytes_in_another_process(convnet_student: Student, tmp_path: Path) -> None:
    samples = samples_of(convnet_student)
    # The two that differ most from a plain translation; fp32 and w8 take the same way.
    programs: dict[Precision, Student] = {
        "fp16": convnet_student,
        "w8a8": compress(convnet_student, "w8a8", samples),
    }
    for precision, student in programs.items():
        (tmp_path / f"{precision}.pt2").write_bytes(program_bytes(student.program))
    script = (
        "import sys, pathlib, json\n"
        "from edgekd.exporters.coreml import EXPORTER\n"
        "from edgekd.programs.models import load_program\n"
        "from edgekd.types import Card, Student\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "card = Card.from_json(json.loads((folder / 'card.json').read_text()))\n"
        "for precision in ('fp16', 'w8a8'):\n"
        "    student = Student(load_program(folder / f'{precision}.pt2'), card)\n"
        "    EXPORTER.write(student, folder / 'there' / f'{precision}.mlpackage', precision)\n"
    )
    card = Card("convnet", convnet_student.card.inputs, convnet_student.card.outputs, ("a", "b", "c", "d", "e"))
    (tmp_path / "card.json").write_text(json.dumps(card.to_json()))
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert (other.returncode, other.stderr, other.stdout) == (0, "", "")  # and coremltools says nothing
    for precision in programs:
        here, there = (tmp_path / where / f"{precision}.mlpackage" for where in ("here", "there"))
        EXPORTER.write(Student(load_program(tmp_path / f"{precision}.pt2"), card), here, precision)
        files = sorted(p.relative_to(here) for p in here.rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(there) for p in there.rglob("*") if p.is_file())
        assert len(files) == 3
        for file in files:
            assert (here / file).read_bytes() == (there / file).read_bytes(), f"{precision}: {file}"
            assert str(Path(__file__).parent).encode() not in (here / file).read_bytes()


def test_an_app_finds_labels_and_preprocessing_in_the_package(convnet_student: Student, tmp_path: Path) -> None:
    card = Card(
        "digits",
        tuple(type(s)(s.name, s.shape, s.dtype, "image") for s in convnet_student.card.inputs),
        convnet_student.card.outputs,
        labels=("zero", "één"),
        preprocessing={"image": {"scale": 0.5}},
    )
    EXPORTER.write(Student(convnet_student.program, card), tmp_path / "model.mlpackage", "fp32")
    program = load(tmp_path / "model.mlpackage")
    assert json.loads(program.metadata["edgekd.labels"]) == ["zero", "één"]
    assert json.loads(program.metadata["edgekd.preprocessing"]) == {"image": {"scale": 0.5}}
    assert program.metadata["edgekd.name"] == "digits"
    assert program.metadata["edgekd.precision"] == "fp32"
    assert not any("date" in key for key in program.metadata)
    assert program.inputs[0].meaning == "image"


def test_coremltools_can_read_the_package(convnet_student: Student, tmp_path: Path) -> None:
    import coremltools as ct

    EXPORTER.write(convnet_student, tmp_path / "model.mlpackage", "fp32")
    model = ct.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True)
    assert [feature.name for feature in model.get_spec().description.input] == ["input"]
    assert model.user_defined_metadata["edgekd.name"] == "convnet"


def test_the_exporter_fulfils_the_seam() -> None:
    exporter: Exporter = EXPORTER
    assert (exporter.suffix, exporter.requires, exporter.extra) == (".mlpackage", ("coremltools",), "coreml")


class UnevenlyPadded(nn.Module):
    """As TensorFlow pads, more at the end; one pad is no zero, one has two readers, one goes to no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.third, self.fourth = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.pad(x, (0, 1, 0, 1)))
        x = self.second(F.pad(F.relu(x), (2, 0, 1, 0)))
        shared = F.pad(F.hardswish(x), (1, 0, 0, 2))
        x = self.third(shared) + self.fourth(shared)
        x = self.third(F.pad(x, (1, 1, 1, 1), value=0.5))
        return x + F.pad(x, (0, 1, 0, 0))[..., 1:]


def test_zero_padding_goes_into_the_convolution_and_hard_swish_into_two_operators(tmp_path: Path) -> None:
    runner, student, samples = written(
        student_of(UnevenlyPadded(), torch.zeros(1, 3, 15, 15)), tmp_path / "model.mlpackage", "fp32"
    )
    outputs, expected = run_all(runner, samples), run_program(student.program, samples)
    np.testing.assert_allclose(next(iter(outputs.values())), next(iter(expected.values())), atol=1e-5)
    names = [step.operator.name for step in load(tmp_path / "model.mlpackage").steps]
    assert names.count("pad") == 2  # the one that is no zero, and the one that no convolution reads
    assert names.count("sigmoid_hard") == 1
    assert "thresholded_relu" not in names


def test_no_padding_and_no_second_scale_stand_before_a_convolution_of_w8a8(tmp_path: Path) -> None:
    runner, student, samples = written(
        student_of(UnevenlyPadded(), torch.zeros(1, 3, 15, 15)), tmp_path / "model.mlpackage", "w8a8"
    )
    outputs, expected = run_all(runner, samples), run_program(student.program, samples)
    np.testing.assert_allclose(next(iter(outputs.values())), next(iter(expected.values())), atol=1e-6)
    steps = load(tmp_path / "model.mlpackage").steps
    makers = {name: step.operator.name for step in steps for name, _ in step.outputs}
    reads = [(step.operator.name, makers.get(dict(step.reads).get("x"))) for step in steps]
    assert [maker for name, maker in reads if name == "conv"] == ["dequantize"] * 5
    assert [maker for name, maker in reads if name == "pad"] == ["dequantize"] * 2  # as above
    assert not {("quantize", "dequantize"), ("quantize", "pad")} & set(reads)


class Recurrent(nn.Module):
    """Every step and the last states of an LSTM that starts from states of its own."""

    def __init__(self, layers: int, bidirectional: bool, batch_first: bool, bias: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        self.start = nn.Parameter(torch.randn(2, layers * (2 if bidirectional else 1), 1, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, c = self.start.expand(-1, -1, x.shape[0], -1)
        y, (h, c) = self.lstm(x if self.lstm.batch_first else x.transpose(0, 1), (h.contiguous(), c.contiguous()))
        return y if self.lstm.batch_first else y.transpose(0, 1), h.transpose(0, 1), c.transpose(0, 1)


@functools.cache
def recurrent(*how: Any) -> Student:
    return student_of(Recurrent(*how), torch.zeros(1, 10, 12))


@pytest.mark.parametrize("system", ["iOS15", "iOS17"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first", "bias"),
    [(1, False, True, True), (2, True, False, True), (2, True, True, False)],
)
def test_a_layer_of_an_lstm_is_one_operator(
    layers: int, bidirectional: bool, batch_first: bool, bias: bool, precision: Precision, system: str, tmp_path: Path
) -> None:
    student = recurrent(layers, bidirectional, batch_first, bias)
    samples = samples_of(student)
    path = tmp_path / "model.mlpackage"
    EXPORTER.write(student, path, precision, EXPORTER.options(minimum_deployment_target=system))
    outputs, expected = run_all(EXPORTER.load(path), samples), run_program(student.program, samples)
    for name, wanted in expected.items():
        np.testing.assert_allclose(outputs[name], wanted, atol=TOLERANCES[precision])
    names = [step.operator.name for step in load(path).steps]
    assert names.count("lstm") == layers
    assert len(names) < 40  # unrolled it has hundreds


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 16, proj_size=4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def test_an_lstm_with_projections_which_core_ml_lacks_goes_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    runner, student, samples = written(student_of(Projected(), torch.zeros(1, 5, 12)), path, "fp32")
    outputs, expected = run_all(runner, samples), run_program(student.program, samples)
    np.testing.assert_allclose(next(iter(outputs.values())), next(iter(expected.values())), atol=1e-5)
    assert "lstm" not in [step.operator.name for step in load(path).steps]


class Overflowing(nn.Module):
    """Finite in single precision, beyond 65504 in the middle, and small again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        large = torch.relu(self.first(x)) * 3000
        return self.second(large * large / 1e8)


def test_a_student_that_overflows_in_half_precision_fails_its_proof_with_the_operator(tmp_path: Path) -> None:
    student = student_of(Overflowing(), torch.zeros(1, 8))
    proof = Proof(samples_of(student, 8))
    assert export_student(student, {}, "coreml", "fp32", tmp_path / "fp32", proof).parity.status == "passed"
    with pytest.raises(ParityError) as raised:
        export_student(student, {}, "coreml", "fp16", tmp_path / "fp16", proof)
    reason = str(raised.value)
    assert re.search(r"; first overflow: operator 'mul' \(output '\w+'\) reaches \S+; float16 ends at 65504$", reason)
    assert "\n" not in reason
    manifest = json.loads((tmp_path / "fp16.failed" / "manifest.json").read_text())
    assert manifest["parity"]["reason"] in reason


# Programs that are refused ------------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def refused(function: Callable[..., Any], tmp_path: Path, *inputs: Tensor) -> str:
    student = student_of(Function(function), *(inputs or (torch.zeros(1, 4, 4),)))
    with pytest.raises(ExportError) as raised:
        EXPORTER.write(student, tmp_path / "model.mlpackage", "fp32")
    assert not (tmp_path / "model.mlpackage").exists()
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    message = refused(torch.special.bessel_j0, tmp_path)
    assert message == (
        "Core ML's converter has no translation for aten.special_bessel_j0.default (output 'special_bessel_j0')"
    )


def test_what_the_converter_refuses_is_told_with_its_operator(tmp_path: Path) -> None:
    message = refused(lambda x: F.avg_pool2d(x, 2, divisor_override=3), tmp_path)
    assert "while converting 'avg_pool2d' op: divisor_override is not supported" in message


def test_bool_inputs_are_refused(tmp_path: Path) -> None:
    message = refused(lambda x: x.float(), tmp_path, torch.zeros(1, 4, dtype=torch.bool))
    assert message == "input 'x' is bool; Core ML takes float32 and int32 inputs"


def test_int8_precisions_take_int8_programs(convnet_student: Student, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="coreml w8a8 takes a program with int8 weights"):
        EXPORTER.write(convnet_student, tmp_path / "model.mlpackage", "w8a8")


def fake_quantized(low: int) -> Callable[[Tensor], Tensor]:
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

    operators = torch.ops.quantized_decomposed

    def function(x: Tensor) -> Tensor:
        steps = operators.quantize_per_tensor(x, 0.1, 0, low, 127, torch.int8)
        return operators.dequantize_per_tensor(steps, 0.1, 0, low, 127, torch.int8)

    return function


def test_a_narrow_range_of_activations_is_refused(tmp_path: Path) -> None:
    message = refused(fake_quantized(-127), tmp_path)
    assert message.endswith("quantizes to -127..127; Core ML quantizes to the whole range of torch.int8, -128..127")


def test_int32_biases_become_floats(tmp_path: Path) -> None:
    operators = torch.ops.quantized_decomposed
    whole = fake_quantized(-128)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.tensor([100, -200, 300], dtype=torch.int32))
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            bias = operators.dequantize_per_tensor(self.bias, 0.01, 0, -(2**31), 2**31 - 1, torch.int32)
            return F.linear(whole(x), self.weight, bias)

    student = student_of(Layer(), torch.zeros(1, 4))
    EXPORTER.write(student, tmp_path / "model.mlpackage", "w8a8")
    samples = samples_of(student)
    outputs = run_all(EXPORTER.load(tmp_path / "model.mlpackage"), samples)
    np.testing.assert_allclose(outputs["linear"], run_program(student.program, samples)["linear"], atol=1e-6)


# Packages that are damaged ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    student = student_of(nn.Sequential(nn.Linear(32, 16), nn.ReLU()), torch.zeros(1, 32))
    path = tmp_path_factory.mktemp("whole") / "model.mlpackage"
    EXPORTER.write(student, path, "fp32")
    return path


@pytest.fixture
def package(whole_package: Path, tmp_path: Path) -> Path:
    """A fresh copy that a test may damage."""
    return Path(shutil.copytree(whole_package, tmp_path / "model.mlpackage"))


def complaint(package: Path, error: type[Exception] = ModelFileError) -> str:
    with pytest.raises(error) as raised:
        EXPORTER.load(package)
    message = str(raised.value)
    assert "\n" not in message
    return message


def rewritten(package: Path, change: Callable[[Any, Any], None]) -> Path:
    """Change the program of a package: the function gets the block and the whole model."""
    model = model_proto().Model.FromString((package / MODEL).read_bytes())
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset], model)
    (package / MODEL).write_bytes(model.SerializeToString())
    return package


def operation(block: Any, kind: str) -> Any:
    return next(op for op in block.operations if op.type == kind)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_weights_are_refused(package: Path, share: float) -> None:
    data = (package / WEIGHTS).read_bytes()
    (package / WEIGHTS).write_bytes(data[: int(len(data) * share)])
    assert "truncated" in complaint(package)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_program_is_refused(package: Path, share: float) -> None:
    data = (package / MODEL).read_bytes()
    (package / MODEL).write_bytes(data[: int(len(data) * share)])
    assert "is truncated or not a Core ML model" in complaint(package)


def test_overwritten_weights_are_refused(package: Path) -> None:
    data = bytearray((package / WEIGHTS).read_bytes())
    data[64:68] = b"\0\0\0\0"
    (package / WEIGHTS).write_bytes(bytes(data))
    assert "is damaged: no blob record at 64" in complaint(package)


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"{tmp_path} is not a Core ML package: it has no Manifest.json"
    assert complaint(tmp_path / "none.mlpackage") == f"no Core ML package at {tmp_path / 'none.mlpackage'}"


def test_a_damaged_manifest_is_refused(package: Path) -> None:
    (package / "Manifest.json").write_text("{")
    assert "Manifest.json is damaged: JSONDecodeError" in complaint(package)
    (package / "Manifest.json").write_text("[]")
    assert "Manifest.json is damaged: TypeError" in complaint(package)


def test_missing_parts_are_named(package: Path) -> None:
    (package / WEIGHTS).unlink()
    assert "no weight file 'weight.bin'" in complaint(package)
    (package / MODEL).unlink()
    assert "its manifest names com.apple.CoreML/model.mlmodel, which is not there" in complaint(package)


def test_a_package_cannot_name_files_outside_itself(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../../secret"
    (package / "Manifest.json").write_text(json.dumps(manifest))
    assert "names a file outside itself: ../../../secret" in complaint(package)


def test_another_kind_of_model_is_refused(package: Path) -> None:
    def change(block: Any, model: Any) -> None:
        model.neuralNetwork.SetInParent()

    assert "holds a neuralNetwork; the evaluator runs ML Programs" in complaint(rewritten(package, change))


def test_an_unknown_operator_is_named_with_its_output(package: Path) -> None:
    def change(block: Any, model: Any) -> None:
        operation(block, "relu").type = "relu_of_tomorrow"

    message = complaint(rewritten(package, change), ExportError)
    assert message == "the evaluator does not know the Core ML operator 'relu_of_tomorrow' (output 'relu')"


def test_an_unknown_argument_is_named(package: Path) -> None:
    def change(block: Any, model: Any) -> None:
        operation(block, "relu").inputs["slope"].CopyFrom(operation(block, "relu").inputs["x"])

    assert "'relu' (output 'relu') has an argument 'slope'" in complaint(rewritten(package, change), ExportError)


def test_a_missing_argument_is_named(package: Path) -> None:
    def change(block: Any, model: Any) -> None:
        del operation(block, "linear").inputs["weight"]

    assert "lacks its argument 'weight'" in complaint(rewritten(package, change))


def test_a_result_of_another_shape_than_declared_is_refused(package: Path) -> None:
    def change(block: Any, model: Any) -> None:
        operation(block, "relu").outputs[0].type.tensorType.dimensions[1].constant.size = 17

    runner = EXPORTER.load(rewritten(package, change))
    with pytest.raises(ModelFileError, match=r"'relu' comes out as \(1, 16\); the file declares \(1, 17\)"):
        runner({"input": np.zeros((1, 32), np.float32)})


def test_a_weight_of_another_size_than_declared_is_refused(package: Path) -> None:
    def change(block: Any, model: Any) -> None:
        for op in block.operations:
            if op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
                op.attributes["val"].type.tensorType.dimensions[0].constant.size += 1

    assert "the program declares" in complaint(rewritten(package, change))


def test_inputs_that_do_not_fit_are_refused(whole_package: Path) -> None:
    runner = EXPORTER.load(whole_package)
    with pytest.raises(DataError, match="takes input; 'input' was not given"):
        runner({"image": np.zeros((1, 32), np.float32)})
    with pytest.raises(DataError, match=r"takes \(1, 32\); the data is \(2, 32\)"):
        runner({"input": np.zeros((2, 32), np.float32)})
    with pytest.raises(DataError, match="takes float32; the data is int64"):
        runner({"input": np.zeros((1, 32), np.int64)})


def test_an_inner_value_gives_way_to_the_name_of_an_output(whole_package: Path) -> None:
    model = model_proto().Model.FromString((whole_package / MODEL).read_bytes())
    function = model.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    inner = operation(block, "linear").outputs[0].name
    rename_features(model, ["image"], [inner])
    assert list(block.outputs) == [inner]
    assert operation(block, "linear").outputs[0].name == f"{inner}_inner"
    assert operation(block, "relu").inputs["x"].arguments[0].name == f"{inner}_inner"
    assert operation(block, "linear").inputs["x"].arguments[0].name == "image"
    assert [feature.name for feature in model.description.input] == ["image"]
    assert [feature.name for feature in model.description.output] == [inner]
    with pytest.raises(ExportError, match="the program has the outputs a, b"):
        rename_features(model, ["image"], ["a", "b"])
