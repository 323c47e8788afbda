"""Target tflite: every precision against its program, by LiteRT itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("ai_edge_quantizer")

from edgekd.compression.compress import compress
from edgekd.errors import DataError, ExportError, ModelFileError
from edgekd.exporters.tflite import EXPORTER, read_metadata
from edgekd.exporting.lint import lint
from edgekd.plugins import load_exporter
from edgekd.programs.models import input_specs, output_specs, program_bytes, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Precision, Student

Write = Callable[[str, Precision], tuple[Student, Path]]


class ResidualNet(nn.Module):
    """What a converter has to keep apart: padding on one side, a residual sum, a concatenation, both kinds of pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.wide = nn.Conv2d(8, 8, 3)
        self.deep = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu6(self.stem(F.pad(image, (0, 1, 0, 1))))
        y = F.relu(x + self.wide(F.pad(x, (1, 1, 1, 1))))
        z = torch.cat([y, F.relu(self.norm(self.deep(self.point(y))))], 1)
        z = F.avg_pool2d(F.max_pool2d(z, 2), 2)
        return self.head(z.mean((2, 3)))


class Encoder(nn.Module):
    """One layer of a text encoder with a padding mask and mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.norms[0](self.words(token_ids) + self.places.weight)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        seen = attention_mask[:, None, None, :].to(torch.bool)
        x = self.norms[1](
            x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        )
        x = self.norms[2](x + self.down(F.gelu(self.up(x))))
        weight = attention_mask[..., None].to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))


class TwoByTwo(nn.Module):
    """Two inputs and two outputs whose names are not in alphabetical order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 256), nn.Linear(32, 256)

    def forward(self, zebra: Tensor, ant: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.first(zebra)) - torch.relu(self.second(ant))
        return {"score": torch.sigmoid(hidden), "bare": hidden @ self.first.weight}


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 8)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(ids).mean(1)
        return x, x.argmax(1)


def _student(module: nn.Module, *inputs: Tensor, name: str = "net") -> Student:
    program = export_program(module.eval(), list(inputs))
    return Student(program, Card(name, input_specs(program), output_specs(program)))


def _samples(student: Student, count: int = 24, seed: int = 1) -> dict[str, np.ndarray]:
    """Noise for float inputs; token ids and padding masks for integer ones."""
    generator = np.random.default_rng(seed)
    samples: dict[str, np.ndarray] = {}
    for spec in input_specs(student.program):
        shape = (count, *spec.shape[1:])
        if spec.dtype == "float32":
            samples[spec.name] = generator.standard_normal(shape, dtype=np.float32)
        elif "mask" in spec.name:
            lengths = generator.integers(1, shape[1] + 1, (count, 1))
            samples[spec.name] = (np.arange(shape[1]) < lengths).astype(spec.dtype)
        else:
            samples[spec.name] = generator.integers(0, 40, shape).astype(spec.dtype)
    return samples


def _run(path: Path, samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    runner = EXPORTER.load(path)
    count = len(next(iter(samples.values())))
    outputs = [runner({name: array[i : i + 1] for name, array in samples.items()}) for i in range(count)]
    return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}


def _differences(student: Student, path: Path) -> dict[str, tuple[float, float]]:
    """Of each output: the largest difference as a share of the largest value, and the cosine over all samples."""
    samples = _samples(student)
    wanted, got = run_program(student.program, samples), _run(path, samples)
    assert list(wanted) == list(got)
    differences = {}
    for name, want in wanted.items():
        have = got[name]
        assert have.shape == want.shape
        cosine = float((want * have).sum() / np.sqrt((want * want).sum() * (have * have).sum()))
        differences[name] = float(np.abs(want - have).max() / np.abs(want).max()), cosine
    return differences


def _interpreter(path: Path) -> Any:
    """The plain kernels: they keep every tensor, which XNNPACK does not."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES, num_threads=1
    )
    interpreter.allocate_tensors()
    return interpreter


def _operators(path: Path) -> Counter[tuple[str, str]]:
    """How often each operator, with the type of what it writes."""
    interpreter = _interpreter(path)
    types = {detail["index"]: np.dtype(detail["dtype"]).name for detail in interpreter.get_tensor_details()}
    return Counter((op["op_name"], types[op["outputs"][0]]) for op in interpreter._get_ops_details())


def _int8_tensors(path: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Values, scales and zero points of every int8 tensor that is in the file, after one run."""
    interpreter = _interpreter(path)
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    interpreter.invoke()
    found = []
    for detail in interpreter.get_tensor_details():
        if detail["dtype"] == np.int8:
            parameters = detail["quantization_parameters"]
            values = interpreter.get_tensor(detail["index"])
            found.append((values, parameters["scales"], parameters["zero_points"]))
    return found


def _int8_constants(student: Student) -> list[tuple[np.ndarray, np.ndarray]]:
    """Integers and scales of every weight of a program, in the order of the file's axes too."""
    tensors = {**student.program.state_dict, **student.program.constants}
    module = student.program.module(check_guards=False)
    found = []
    for node in module.graph.nodes:
        if "dequantize_per_channel" in str(node.target):
            weight, scale = (tensors[argument.target].numpy() for argument in node.args[:2])
            found.append((weight, scale))
    return found


@pytest.fixture(scope="module")
def students(convnet_student: Student) -> dict[str, Student]:
    torch.manual_seed(3)
    residual = ResidualNet()
    for _ in range(3):
        residual(torch.randn(16, 3, 16, 16))
    ids, mask = torch.zeros(1, 12, dtype=torch.int32), torch.ones(1, 12, dtype=torch.int32)
    return {
        "convnet": convnet_student,
        "residual": _student(residual, torch.zeros(1, 3, 16, 16)),
        "encoder": _student(Encoder(), ids, mask),
        "two": _student(TwoByTwo(), torch.zeros(1, 48), torch.zeros(1, 32)),
        "lookup": _student(Lookup(), torch.zeros(1, 5, dtype=torch.int64)),
    }


@pytest.fixture(scope="module")
def write(students: dict[str, Student], tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Each model and precision is compressed and converted once: a conversion takes seconds."""
    folder = tmp_path_factory.mktemp("tflite")
    done: dict[tuple[str, Precision], tuple[Student, Path]] = {}

    def once(name: str, precision: Precision) -> tuple[Student, Path]:
        if (name, precision) not in done:
            student = students[name]
            if precision in ("w8", "w8a8"):
                student = compress(student, precision, _samples(student, 64, seed=2))
            path = folder / f"{name}_{precision}.tflite"
            EXPORTER.write(student, path, precision)
            done[name, precision] = student, path
        return done[name, precision]

    return once


def test_target_is_found_by_its_name() -> None:
    assert load_exporter("tflite") is EXPORTER


@pytest.mark.parametrize("name", ["convnet", "residual", "encoder", "two"])
def test_fp32_computes_what_the_program_computes(write: Write, name: str) -> None:
    for share, cosine in _differences(*write(name, "fp32")).values():
        assert share < 1e-5
        assert cosine > 0.999999


@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_fp16_differs_by_the_rounding_of_its_weights(write: Write, name: str) -> None:
    for share, cosine in _differences(*write(name, "fp16")).values():
        assert 0 < share < 5e-3
        assert cosine > 0.99999


@pytest.mark.parametrize("name", ["convnet", "encoder", "two"])
def test_w8_computes_what_the_compressed_program_computes(write: Write, name: str) -> None:
    for share, cosine in _differences(*write(name, "w8")).values():
        assert share < 1e-5
        assert cosine > 0.999999


@pytest.mark.parametrize("name", ["encoder", "two"])
def test_w8d8_is_near_the_program(write: Write, name: str) -> None:
    for share, cosine in _differences(*write(name, "w8d8")).values():
        assert 0 < share < 0.1
        assert cosine > 0.995


@pytest.mark.parametrize("name", ["convnet", "residual", "encoder"])
def test_w8a8_differs_from_the_compressed_program_by_rounding_ties(write: Write, name: str) -> None:
    for share, cosine in _differences(*write(name, "w8a8")).values():
        assert share < 0.03
        assert cosine > 0.9995


@pytest.mark.parametrize(
    ("name", "precision"), [("convnet", "w8"), ("convnet", "w8a8"), ("residual", "w8a8"), ("encoder", "w8")]
)
def test_file_holds_the_integers_and_scales_of_the_program(write: Write, name: str, precision: Precision) -> None:
    student, path = write(name, precision)
    constants, tensors = _int8_constants(student), _int8_tensors(path)
    assert len(constants) >= 3
    for weight, scale in constants:
        layouts = [weight]
        if weight.ndim == 4:  # the file's are (out, height, width, in), and (1, height, width, out) where depthwise
            layouts = [weight.transpose(0, 2, 3, 1), weight.transpose(1, 2, 3, 0)]
        assert any(
            np.array_equal(values, layout) and np.array_equal(scales, scale) and not points.any()
            for values, scales, points in tensors
            for layout in layouts
        )


@pytest.mark.parametrize("name", ["convnet", "residual"])
def test_w8a8_file_holds_the_activation_scales_of_the_program(write: Write, name: str) -> None:
    student, path = write(name, "w8a8")
    wanted = {
        (np.float32(node.args[1]), node.args[2])
        for node in student.program.graph.nodes
        if "quantize_per_tensor" in str(node.target)
    }
    found = {(scales[0], int(points[0])) for _, scales, points in _int8_tensors(path) if len(scales) == 1}
    assert len(wanted) >= 4
    assert found == wanted


@pytest.mark.parametrize("name", ["convnet", "residual"])
def test_w8a8_runs_integer_kernels_between_float_edges(write: Write, name: str) -> None:
    _, path = write(name, "w8a8")
    operators = _operators(path)
    assert {op for op, kind in operators if kind == "float32"} == {"DEQUANTIZE"}
    assert operators["DEQUANTIZE", "float32"] == 1
    assert operators["QUANTIZE", "int8"] == 1


def test_padding_and_means_cost_no_transposition(write: Write) -> None:
    _, path = write("residual", "w8a8")
    operators = _operators(path)
    assert operators["TRANSPOSE", "int8"] == 1  # the image, once
    assert operators["PAD", "int8"] == 0


@pytest.mark.parametrize(
    ("name", "precision"), [("convnet", "fp32"), ("convnet", "w8a8"), ("two", "w8d8"), ("encoder", "fp16")]
)
def test_names_shapes_and_types_are_those_of_the_program(write: Write, name: str, precision: Precision) -> None:
    student, path = write(name, precision)
    runner = EXPORTER.load(path)
    assert runner.runtime.startswith("LiteRT 2")
    for wanted, got in (
        (input_specs(student.program), runner.inputs),
        (output_specs(student.program), runner.outputs),
    ):
        assert [(s.name, (1, *s.shape[1:]), s.dtype) for s in wanted] == [(s.name, s.shape, s.dtype) for s in got]


def test_w8a8_is_legal_where_a_kernel_wants_a_scale_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    student = _student(net, torch.zeros(1, 8))
    student = compress(student, "w8a8", _samples(student, 64, seed=2))
    EXPORTER.write(student, tmp_path / "a.tflite", "w8a8")
    operators = _operators(tmp_path / "a.tflite")  # the plain kernels refuse an int8 sigmoid of another scale
    assert operators["FULLY_CONNECTED", "int8"] == 3
    assert operators["LOGISTIC", "float32"] == operators["TANH", "float32"] == 1
    for share, cosine in _differences(student, tmp_path / "a.tflite").values():
        assert share < 0.03
        assert cosine > 0.9995


def test_64_bit_integers_stay_64_bit(write: Write) -> None:
    student, path = write("lookup", "fp32")
    runner = EXPORTER.load(path)
    assert [spec.dtype for spec in (*runner.inputs, *runner.outputs)] == ["int64", "float32", "int64"]
    samples = _samples(student)
    wanted, got = run_program(student.program, samples), _run(path, samples)
    vector, index = wanted
    np.testing.assert_allclose(got[vector], wanted[vector], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[index], wanted[index])


def test_integers_of_another_width_are_cast(write: Write) -> None:
    student, path = write("encoder", "fp32")
    samples = {name: array[:1] for name, array in _samples(student).items()}
    runner = EXPORTER.load(path)
    wide = runner({name: array.astype(np.int64) for name, array in samples.items()})
    for name, array in runner(samples).items():
        np.testing.assert_array_equal(array, wide[name])


def test_smaller_precisions_make_smaller_files(write: Write) -> None:
    sizes = {}
    for precision in ("fp32", "fp16", "w8d8", "w8"):
        _, path = write("two", precision)
        sizes[precision] = path.stat().st_size
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["w8d8"] < 0.4 * sizes["fp32"]
    assert sizes["w8"] < 0.4 * sizes["fp32"]


_AGAIN = """
import sys
from pathlib import Path
from edgekd.exporters.tflite import EXPORTER
from edgekd.programs.models import input_specs, load_program, output_specs
from edgekd.types import Card, Student
for pt2, out, precision in zip(*[iter(sys.argv[1:])] * 3):
    program = load_program(Path(pt2))
    student = Student(program, Card("net", input_specs(program), output_specs(program)))
    EXPORTER.write(student, Path(out), precision)
    EXPORTER.load(Path(out))
"""


def test_same_bytes_in_another_process_without_a_word(write: Write, tmp_path: Path) -> None:
    arguments, pairs = [], []
    for name, precision in (("residual", "w8a8"), ("encoder", "w8d8")):
        student, first = write(name, precision)
        pt2, second = tmp_path / f"{name}.pt2", tmp_path / f"{name}.tflite"
        pt2.write_bytes(program_bytes(student.program))
        arguments += [str(pt2), str(second), precision]
        pairs.append((first, second))
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    done = subprocess.run(
        [sys.executable, "-c", _AGAIN, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for first, second in pairs:
        assert first.read_bytes() == second.read_bytes()


def test_writing_leaves_logging_and_the_program_as_they_were(
    convnet_student: Student, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    before, handlers = program_bytes(convnet_student.program), list(logging.root.handlers)
    EXPORTER.write(convnet_student, tmp_path / "a.tflite", "fp32")
    assert program_bytes(convnet_student.program) == before
    assert logging.root.handlers == handlers
    assert logging.root.manager.disable == logging.NOTSET
    assert capfd.readouterr() == ("", "")


def test_card_can_be_read_back(convnet_student: Student, write: Write) -> None:
    _, path = write("convnet", "w8a8")
    facts = read_metadata(path)
    assert facts["name"] == "convnet"
    assert facts["labels"] == ["a", "b", "c", "d", "e"]
    assert facts["precision"] == "w8a8"
    assert facts["inputs"] == [{"name": "input", "shape": [1, 1, 12, 12], "dtype": "float32", "meaning": ""}]
    with zipfile.ZipFile(path) as archive:  # what an app or `unzip` sees
        assert archive.read("labels.txt") == b"a\nb\nc\nd\ne\n"
        assert json.loads(archive.read("metadata.json")) == facts
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_file_of_another_maker_has_no_metadata_and_loads(write: Write, tmp_path: Path) -> None:
    student, path = write("convnet", "fp32")
    bare = tmp_path / "bare.tflite"
    bare.write_bytes(path.read_bytes()[: read_metadata(path)["model_bytes"]])
    assert read_metadata(bare) == {}
    samples = _samples(student, 2)
    for name, array in _run(path, samples).items():
        np.testing.assert_array_equal(array, _run(bare, samples)[name])


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _without_end(content: bytes) -> bytes:
    return content[:-9]


def _one_bit(content: bytes) -> bytes:
    """A weight's: LiteRT itself would not notice."""
    middle = content.index(b"TFL3") + 900
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [_half, _without_end, _one_bit, lambda _: b"", lambda _: b"PK\x03\x04 not this"])
def test_damaged_or_foreign_file_is_refused_in_one_line(
    write: Write, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    _, path = write("convnet", "fp32")
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelFileError, match=r"broken\.tflite") as caught:
        EXPORTER.load(broken)
    assert "\n" not in str(caught.value)


def test_flatbuffer_that_is_no_model_is_refused_by_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "x.tflite").write_bytes(b"\x10\0\0\0TFL3" + bytes(range(200)))
    with pytest.raises(ModelFileError, match="cannot be loaded by LiteRT"):
        EXPORTER.load(tmp_path / "x.tflite")
    with pytest.raises(ModelFileError, match="no model file"):
        EXPORTER.load(tmp_path / "y.tflite")


def test_unsupported_operator_is_named(tmp_path: Path) -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x)

    with pytest.raises(ExportError, match=r"aten\.lgamma") as caught:
        EXPORTER.write(_student(Strange(), torch.ones(1, 4)), tmp_path / "a.tflite", "fp32")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("has", "asked"), [("fp32", "w8a8"), ("fp32", "w8"), ("w8a8", "fp32"), ("w8", "w8d8")])
def test_program_of_another_precision_is_refused(
    convnet_student: Student, tmp_path: Path, has: Precision, asked: Precision
) -> None:
    student = compress(convnet_student, has, _samples(convnet_student))
    with pytest.raises(ExportError, match=rf"'convnet' is {has}"):
        EXPORTER.write(student, tmp_path / "a.tflite", asked)


def test_wrong_inputs_are_refused(write: Write) -> None:
    student, path = write("encoder", "fp32")
    runner = EXPORTER.load(path)
    samples = {name: array[:1] for name, array in _samples(student).items()}
    with pytest.raises(DataError, match="'attention_mask'"):
        runner({"token_ids": samples["token_ids"]})
    with pytest.raises(DataError, match=r"\(1, 12\)"):
        runner({**samples, "token_ids": samples["token_ids"][:, :5]})
    with pytest.raises(DataError, match="out of bounds"):
        runner({**samples, "token_ids": samples["token_ids"] + 1000})


class Bag(nn.Module):
    """A table and two layers whose inputs come in blocks of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(64, 64), nn.Linear(64, 256), nn.Linear(256, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.words(ids).mean(1))))


def test_w4d8_holds_linear_layers_and_embeddings_in_4_bits(tmp_path: Path) -> None:
    torch.manual_seed(4)
    student = _student(Bag(), torch.zeros(1, 6, dtype=torch.int32))
    EXPORTER.write(student, tmp_path / "model.tflite", "w4d8", EXPORTER.options())
    weights = EXPORTER.contents(tmp_path / "model.tflite").weights
    found = {(weight.reader, weight.shape) for weight in weights if weight.dtype == "int4"}
    ((_, cosine),) = _differences(student, tmp_path / "model.tflite").values()

    assert found == {("EMBEDDING_LOOKUP", (64, 64)), ("FULLY_CONNECTED", (256, 64)), ("FULLY_CONNECTED", (32, 256))}
    assert 0.97 < cosine < 0.99999


def test_w4d8_of_what_has_no_blocks_is_refused_in_one_line(tmp_path: Path) -> None:
    narrow = _student(nn.Linear(12, 40), torch.zeros(1, 12))
    with pytest.raises(ExportError, match="come in blocks of 32, and this model has none; take w8d8"):
        EXPORTER.write(narrow, tmp_path / "model.tflite", "w4d8", EXPORTER.options())
    convolution = _student(nn.Conv2d(3, 32, 3), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ExportError, match="this model has none; take w8d8, or w8a8"):
        EXPORTER.write(convolution, tmp_path / "model.tflite", "w4d8", EXPORTER.options())
    assert not list(tmp_path.iterdir())


def test_w4d8_keeps_8_bits_where_blocks_do_not_fit_and_lint_names_it(tmp_path: Path) -> None:
    torch.manual_seed(4)
    student = _student(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64)), torch.zeros(1, 64))
    EXPORTER.write(student, tmp_path / "model.tflite", "w4d8")
    contents = EXPORTER.contents(tmp_path / "model.tflite")
    found = {
        weight.shape: weight.dtype
        for weight in contents.weights
        if weight.dtype != "float16" and len(weight.shape) == 2
    }
    assert found == {(48, 64): "int4", (64, 48): "int8"}
    ((_, cosine),) = _differences(student, tmp_path / "model.tflite").values()
    assert cosine > 0.97
    (finding,) = (f for f in lint(contents, "w4d8", student.program) if f.kind == "wide_weight")
    (name,) = (weight.name for weight in contents.weights if weight.shape == (64, 48))
    assert finding.names == (name,)
    assert finding.cost_bytes == 64 * 48 // 2


@pytest.mark.parametrize(
    ("precision", "dtype", "size"), [("fp16", "float16", 2), ("w8d8", "int8", 1), ("w4d8", "int4", 0.5)]
)
def test_weights_that_the_quantizer_keeps_behind_the_flatbuffer_stay(
    precision: Precision, dtype: str, size: float, tmp_path: Path
) -> None:
    """From 256 KiB of them on; real models have more."""
    torch.manual_seed(0)
    student = _student(nn.Sequential(nn.Linear(512, 1280), nn.ReLU(), nn.Linear(1280, 8)), torch.zeros(1, 512))
    path = tmp_path / "model.tflite"
    EXPORTER.write(student, path, precision)
    inputs = _samples(student, 1)
    (expected,) = run_program(student.program, inputs).values()
    (found,) = EXPORTER.load(path)(inputs).values()
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > (0.95 if precision == "w4d8" else 0.999)
    largest = max(EXPORTER.contents(path).weights, key=lambda weight: weight.size_bytes)
    assert largest.dtype == dtype
    assert largest.size_bytes == 512 * 1280 * size
