"""What TFLite alone can be told, and int16 activations: files in LiteRT against their programs."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.compression.compress import compress
from edgekd.errors import ExportError, UsageError
from edgekd.exporting.export import Proof, export_student
from edgekd.exporting.parity import run_file
from edgekd.programs.models import input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Precision, Student

pytest.importorskip("litert_torch")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("ai_edge_quantizer")

from edgekd.exporters._tflite_options import TFLiteOptions
from edgekd.exporters.tflite import EXPORTER, LiteRTRunner, _interpreter


class Net(nn.Module):
    """Residual sum, concatenation, depthwise convolution, pools, and gelu, which has no int16 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.deep, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.hidden, self.head = nn.Linear(16, 24), nn.Linear(24, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu6(self.stem(image))
        y = F.relu(x + self.wide(x))
        z = torch.cat([y, F.relu(self.deep(self.point(y)))], 1)
        z = F.avg_pool2d(F.max_pool2d(z, 2), 2).mean((2, 3))
        return self.head(F.gelu(self.hidden(z)))


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(3)
    program = export_program(Net().eval(), [torch.zeros(1, 3, 16, 16)])
    return Student(program, Card("net", input_specs(program), output_specs(program)))


IMAGES = {"image": np.random.default_rng(0).standard_normal((24, 3, 16, 16), dtype=np.float32)}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.fixture(scope="module")
def compressed(student: Student) -> Callable[[Precision], Student]:
    """The program of a precision, made once."""
    return functools.cache(lambda precision: compress(student, EXPORTER.precisions[precision].source, IMAGES))


@pytest.fixture(scope="module")
def exported(
    compressed: Callable[[Precision], Student], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``exported(precision, **options)`` is a proven file; it is written once for all who ask for the same."""

    @functools.cache
    def exported(precision: Precision, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("a") / precision
        proof, told = Proof(IMAGES), TFLiteOptions(**options)
        artifact = export_student(compressed(precision), {}, "tflite", precision, folder, proof, options=told)
        assert artifact.parity.status == "passed"
        return folder / artifact.path

    return exported


def test_int16_activations_lose_less_than_int8_ones(
    student: Student, compressed: Callable[[Precision], Student], exported: Callable[..., Path]
) -> None:
    (wanted,) = run_program(student.program, IMAGES).values()
    errors = {}
    for precision in ("w8a8", "w8a16"):
        (found,) = run_file(EXPORTER.load(exported(precision)), IMAGES)
        errors[precision] = np.abs(found - wanted).max() / np.abs(wanted).max()
        (own,) = run_program(compressed(precision).program, IMAGES).values()
        assert cosine(found, own) > (0.999999 if precision == "w8a16" else 0.999)
    assert errors["w8a16"] < errors["w8a8"] / 2
    operators = EXPORTER.contents(exported("w8a16")).operators
    assert {fact.type for fact in operators if fact.type in ("CONV_2D", "GELU")} == {"CONV_2D", "GELU"}


def test_int16_programs_and_files_are_not_taken_for_int8_ones(
    compressed: Callable[[Precision], Student], tmp_path: Path
) -> None:
    for has, asked in (("w8a8", "w8a16"), ("w8a16", "w8a8")):
        with pytest.raises(ExportError, match=f"'net' is {has}"):
            EXPORTER.write(compressed(has), tmp_path / "a.tflite", asked)


@pytest.mark.parametrize(("precision", "kind"), [("w8a8", "int8"), ("w8a16", "int16")])
def test_integer_inputs_and_outputs_are_those_of_the_float_file(
    precision: Precision, kind: str, exported: Callable[..., Path]
) -> None:
    floats = EXPORTER.load(exported(precision))
    path = exported(precision, inference_input_type=kind, inference_output_type=kind)
    integers = EXPORTER.load(path)
    assert [spec.dtype for spec in (*integers.inputs, *integers.outputs)] == [kind, kind]
    assert not {"QUANTIZE"} & {fact.type for fact in EXPORTER.contents(path).operators[:1]}
    details = integers._interpreter.get_input_details()[0], integers._interpreter.get_output_details()[0]
    (scale, zero), (step, origin) = (detail["quantization"] for detail in details)
    limits = np.iinfo(kind)
    for image in IMAGES["image"][:8]:
        quantized = np.clip(np.rint(image[None] / np.float32(scale)) + zero, limits.min, limits.max).astype(kind)
        (found,) = integers({"image": quantized}).values()
        (wanted,) = floats({"image": image[None]}).values()
        np.testing.assert_allclose((found.astype(np.float32) - origin) * step, wanted, atol=1.01 * step)


def test_edges_that_are_not_quantized_so_are_refused(exported: Callable[..., Path]) -> None:
    for precision, options, message in (
        ("fp32", {"inference_input_type": "int8"}, "input 'image' is not only quantized"),
        ("w8a8", {"inference_input_type": "int16"}, "input 'image' is quantized to int8"),
        ("fp32", {"inference_output_type": "int8"}, "output '.*' is computed in float"),
    ):
        with pytest.raises(UsageError, match=message):
            exported(precision, **options)


def test_an_app_calls_the_signature_by_its_name(student: Student, exported: Callable[..., Path]) -> None:
    from ai_edge_litert.interpreter import Interpreter

    path = exported("fp32", signature="classify")
    interpreter = Interpreter(str(path), num_threads=1)
    assert list(interpreter.get_signature_list()) == ["classify"]
    found = interpreter.get_signature_runner("classify")(image=IMAGES["image"][:1])
    (wanted,) = run_program(student.program, {"image": IMAGES["image"][:1]}).values()
    (name,) = (spec.name for spec in student.card.outputs)
    np.testing.assert_allclose(found[name], wanted, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w8d8", "w8a8", "w8a16"])
def test_one_file_takes_several_batches(precision: Precision, exported: Callable[..., Path]) -> None:
    one, many = EXPORTER.load(exported(precision)), EXPORTER.load(exported(precision, batch="1..8"))
    assert [spec.shape[0] for spec in (*many.inputs, *many.outputs)] == [-1, -1]
    assert many.batch_sizes == (1, 5, 8)
    (wanted,) = run_file(one, IMAGES)
    for count in (8, 3, 1, 20):
        (found,) = many({"image": IMAGES["image"][:count]}).values()
        np.testing.assert_allclose(found, wanted[:count], atol=np.abs(wanted).max() * 0.02)


class Text(nn.Module):
    """A layer of a text encoder: attention that the converter reshapes to (batch · heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        seen = mask[:, None, None, :].to(torch.bool)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return self.head(self.norm(x).mean(1))


def test_texts_go_in_batches_too(tmp_path: Path) -> None:
    torch.manual_seed(1)
    ids = torch.zeros(1, 12, dtype=torch.int32)
    program = export_program(Text().eval(), [ids, torch.ones_like(ids)])
    student = Student(program, Card("text", input_specs(program), output_specs(program)))
    generator = np.random.default_rng(0)
    mask = np.arange(12) < generator.integers(1, 13, (20, 1))
    texts = {"ids": generator.integers(0, 50, (20, 12)).astype(np.int32), "mask": mask.astype(np.int32)}
    for precision in ("fp32", "w8d8"):
        options = TFLiteOptions(batch="2,5")
        artifact = export_student(student, {}, "tflite", precision, tmp_path / precision, Proof(texts), options=options)
        assert artifact.parity.status == "passed"
    EXPORTER.write(student, tmp_path / "four.tflite", "fp32", TFLiteOptions(batch="4"))
    (found,) = run_file(EXPORTER.load(tmp_path / "four.tflite"), texts)
    (wanted,) = run_program(program, texts).values()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_batch_that_the_model_computes_with_is_refused(tmp_path: Path) -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.shape[0]

    program = export_program(Counted().eval(), [torch.zeros(1, 4)])
    student = Student(program, Card("counted", input_specs(program), output_specs(program)))
    with pytest.raises(ExportError, match=r"tflite batch: .*; export with one size"):
        EXPORTER.write(student, tmp_path / "a.tflite", "fp32", TFLiteOptions(batch="1..4"))


def test_w4a8_holds_its_weights_in_4_bits_where_that_costs_no_time(exported: Callable[..., Path]) -> None:
    found = {}
    for convolutions in (False, True):
        path = exported("w4a8", int4_convolutions=convolutions)
        weights = EXPORTER.contents(path).weights
        kinds = {weight.reader: weight.dtype for weight in weights if weight.dtype in ("int4", "int8")}
        convolved = "int4" if convolutions else "int8"
        assert kinds == {"CONV_2D": convolved, "DEPTHWISE_CONV_2D": convolved, "FULLY_CONNECTED": "int4"}, weights
        runner = LiteRTRunner(_interpreter(plain=True, model_path=str(path)))  # XNNPACK rounds ties otherwise
        (found[convolutions],) = run_file(runner, IMAGES)
    np.testing.assert_array_equal(found[True], found[False])


def test_metadata_is_what_tensorflow_lite_tools_read(student: Student, tmp_path: Path) -> None:
    """By the places of the fields in metadata_schema.fbs; tflite-support 0.4.4 reads the same."""
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import number_types as types
    from flatbuffers.table import Table

    def child(table: Table, place: int, index: int | None = None) -> Table:
        start = table.Offset(4 + 2 * place)
        at = table.Indirect(start + table.Pos) if index is None else table.Indirect(table.Vector(start) + 4 * index)
        return Table(table.Bytes, at)

    def text(table: Table, place: int) -> str:
        return table.String(table.Pos + table.Offset(4 + 2 * place)).decode()

    labels = tuple("abcdefü")
    outputs = tuple(replace(spec, meaning="logits") for spec in student.card.outputs)
    labelled = replace(student, card=replace(student.card, labels=labels, outputs=outputs))
    EXPORTER.write(labelled, tmp_path / "a.tflite", "fp32")
    content = (tmp_path / "a.tflite").read_bytes()
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    (entry,) = (entry for entry in model.metadata if entry.name in (b"TFLITE_METADATA", "TFLITE_METADATA"))
    told = bytes(model.buffers[entry.buffer].data)
    assert told[4:8] == b"M001"
    root = Table(told, types.UOffsetTFlags.py_type(int.from_bytes(told[:4], "little")))
    assert (text(root, 0), text(root, 7)) == ("net", "1.0.0")
    graph = child(root, 3, 0)
    assert text(child(graph, 2, 0), 0) == "image"
    output = child(graph, 3, 0)
    assert (text(output, 0), text(output, 1)) == (outputs[0].name, "logits")
    label_file = child(output, 6, 0)
    assert text(label_file, 0) == "labels.txt"
    assert label_file.Get(types.Int8Flags, label_file.Pos + label_file.Offset(8)) == 2  # TENSOR_AXIS_LABELS
    packed = schema.Model.GetRootAsModel(content, 0)
    starts = [packed.Buffers(index)._tab for index in range(packed.BuffersLength())]
    offsets = [tab.Vector(tab.Offset(4)) for tab in starts if tab.Offset(4)]
    assert offsets
    assert all(offset % 16 == 0 for offset in offsets)
