"""ONNX files in ONNX Runtime against the programs that they were written from."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.compression.compress import compress
from edgekd.errors import DataError, ExportError, ModelFileError, UsageError
from edgekd.exporting.parity import compare, run_file
from edgekd.programs.models import input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Precision, Student

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from edgekd.exporters import _onnx_activations as activations  # noqa: E402
from edgekd.exporters import _onnx_weights as weights  # noqa: E402
from edgekd.exporters.onnx import EXPORTER, session_options  # noqa: E402

Written = Callable[[str, str], tuple[Student, Path]]
PRECISIONS = ("fp32", "fp16", "w8", "w8d8", "w8a8", "w4")


class Residual(nn.Module):
    """What convnets are built of: residual, concatenation, pools, asymmetric padding, hard-swish, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(8, eps=1e-3), nn.ReLU6(inplace=True)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        stem = self.relu(self.norm(self.stem(nn.functional.pad(image, (0, 1, 0, 1)))))
        left = torch.relu(self.left(stem) + stem)
        both = self.pool(torch.cat([left, torch.relu(self.right(left))], dim=1))
        features = nn.functional.hardswish(self.last(both)).mean((2, 3))
        return {"logits": self.head(features), "features": features}


def student_of(module: nn.Module, *examples: Tensor) -> Student:
    program = export_program(module.eval(), list(examples))
    card = Card(
        "net",
        input_specs(program),
        output_specs(program),
        labels=("ü", "b"),
        preprocessing={"size": [8, 8], "mean": [0.5]},
    )
    return Student(program, card)


@pytest.fixture(scope="module")
def residual() -> Student:
    torch.manual_seed(1)
    net = Residual()
    for _ in range(3):
        net(torch.randn(16, 3, 16, 16))
    return student_of(net, torch.zeros(1, 3, 16, 16))


@pytest.fixture(scope="module")
def written(
    convnet_student: Student, residual: Student, encoder_student: Student, writer: Callable[..., Written]
) -> Written:
    """``written(net, precision)`` is the program and its file."""
    return writer(EXPORTER, {"convnet": convnet_student, "residual": residual, "encoder": encoder_student})


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def fused_operators(path: Path, tmp_path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file when it loads it."""
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return operators(tmp_path / "fused.onnx")


# The precisions (w4a8 and auto are forms of w8a8: test_static_words.py)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", ["convnet", "residual", "encoder"])
def test_file_computes_what_its_program_computes(
    net: str, precision: Precision, written: Written, inputs_of: Callable[[Student, int], dict[str, np.ndarray]]
) -> None:
    student, path = written(net, precision)
    samples = inputs_of(student, 40)
    runner = EXPORTER.load(path)
    assert runner.runtime == f"ONNX Runtime {onnxruntime.__version__}"
    for found, wanted in ((runner.inputs, student.card.inputs), (runner.outputs, student.card.outputs)):
        assert [(spec.name, spec.dtype) for spec in found] == [(spec.name, spec.dtype) for spec in wanted]
        assert [spec.shape for spec in found] == [(1, *spec.shape[1:]) for spec in wanted]
    program = list(run_program(student.program, samples).values())
    file = run_file(runner, samples)
    parity = compare(student.card.outputs, program, file, EXPORTER.precisions[precision].tolerance, runner.runtime)
    assert parity.status == "passed", parity.reason
    for a, b in zip(program, file, strict=True):
        largest = np.abs(a).max()
        if precision in ("fp32", "w8"):
            np.testing.assert_allclose(b, a, atol=1e-5 * largest)
        elif precision == "w8a8":  # the same integers, but for a rounding tie here and there
            assert (np.abs(b - a) < largest / 500).mean() > 0.98
        else:
            assert 0 < np.abs(b - a).max() < (0.3 if precision == "w4" else 0.05) * largest


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", ["convnet", "residual", "encoder"])
def test_file_follows_the_standard(net: str, precision: Precision, written: Written) -> None:
    onnx.checker.check_model(onnx.load(written(net, precision)[1]), full_check=True)


def test_file_tells_an_app_what_it_needs_and_nothing_of_where_it_was_made(written: Written) -> None:
    _, path = written("residual", "w8a8")
    model = onnx.load(path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["edgekd.name"] == "net"
    assert facts["edgekd.precision"] == "w8a8"
    assert json.loads(facts["edgekd.labels"]) == ["ü", "b"]
    assert json.loads(facts["edgekd.preprocessing"]) == {"size": [8, 8], "mean": [0.5]}
    assert json.loads(facts["edgekd.session_config_without_vnni"]) == {"session.x64quantprecision": "1"}
    assert not [node for node in model.graph.node if node.metadata_props or node.doc_string]
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


def test_fp16_holds_its_weights_in_half_and_speaks_float(written: Written) -> None:
    _, path = written("encoder", "fp16")
    kinds = {t.data_type for t in onnx.load(path).graph.initializer if len(t.dims) == 2}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_w8_computes_in_float_from_int8_weights(written: Written, tmp_path: Path) -> None:
    for net, count in (("residual", 5), ("encoder", 6)):
        _, path = written(net, "w8")
        integers = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
        assert len(integers) == count
        fused = fused_operators(path, tmp_path)
        # Weights are made float once, when the file is loaded; nothing is quantized behind the user's back.
        assert not {"DequantizeLinear", "MatMulNBits", "DynamicQuantizeMatMul"} & set(fused)
        if net == "residual":
            assert not {"Cast", "Mul"} & set(fused)


def test_w8_gathers_rows_before_it_makes_them_float(written: Written) -> None:
    model = onnx.load(written("encoder", "w8")[1])
    tables = {t.name: t for t in model.graph.initializer}
    gathers = [node for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables]
    shapes = {tuple(tables[node.input[0]].dims): tables[node.input[0]].data_type for node in gathers}
    assert shapes[40, 16] == onnx.TensorProto.INT8
    assert shapes[40, 1] == onnx.TensorProto.FLOAT


def test_w8d8_quantizes_matrix_products_and_embeddings(written: Written) -> None:
    found = operators(written("encoder", "w8d8")[1])
    assert found["MatMulInteger"] == 5
    state = onnx.load(written("encoder", "w8d8")[1]).graph.initializer
    assert not [t for t in state if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2 and min(t.dims) > 1]


def test_w4_holds_matrix_products_and_embeddings_in_blocks_of_4_bits(written: Written) -> None:
    path = written("encoder", "w4")[1]
    found = operators(path)
    assert (found["MatMulNBits"], found["GatherBlockQuantized"]) == (5, 1)
    assert not found["Gemm"]  # the head, which MatMulNBits takes only as a MatMul
    weights = [w for w in EXPORTER.contents(path).weights if w.dtype == "uint4"]
    assert {w.reader for w in weights} == {"MatMulNBits", "GatherBlockQuantized"}


def test_w4_is_a_seventh_of_fp32(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)).eval()
    student = student_of(net, torch.zeros(1, 256))
    for precision in ("fp32", "w4"):
        EXPORTER.write(student, tmp_path / precision, precision)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    # 4 bits, and a float scale and half a byte of zero point for each 32 numbers
    assert sizes["w4"] < sizes["fp32"] * (4 / 32 + 4.5 / 32 / 4) * 1.05


def test_w4_of_a_model_without_matrix_products_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = student_of(net, torch.zeros(1, 1, 6, 6))
    with pytest.raises(ExportError, match="w4 quantizes matrix products and embeddings, and this model has none"):
        EXPORTER.write(student, tmp_path / "model.onnx", "w4")
    assert not list(tmp_path.iterdir())


def test_w8d8_of_a_model_without_matrix_products_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = student_of(net, torch.zeros(1, 1, 6, 6))
    with pytest.raises(ExportError, match="this model has none with constant weights; take w8a8"):
        EXPORTER.write(student, tmp_path / "model.onnx", "w8d8")
    assert not list(tmp_path.iterdir())


def test_w8a8_runs_in_integers_from_end_to_end(written: Written, tmp_path: Path) -> None:
    _, path = written("convnet", "w8a8")
    model = onnx.load(path)
    assert not {"Clip", "Relu"} & set(operators(path))
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            point = next(t for t in model.graph.initializer if t.name == node.input[2])
            assert point.data_type == onnx.TensorProto.UINT8
    fused = fused_operators(path, tmp_path)
    assert (fused["QLinearConv"], fused["QLinearGlobalAveragePool"], fused["QGemm"]) == (2, 1, 1)
    assert (fused["QuantizeLinear"], fused["DequantizeLinear"]) == (1, 1)  # of the input and of the output
    assert not {"Conv", "Gemm", "MatMul"} & set(fused)


def test_w8a8_leaves_padding_to_the_convolution(written: Written, tmp_path: Path) -> None:
    _, path = written("residual", "w8a8")
    model = onnx.load(path)
    assert "Pad" not in operators(path)
    stem = next(node for node in model.graph.node if node.op_type == "Conv")
    pads = next(list(attribute.ints) for attribute in stem.attribute if attribute.name == "pads")
    assert pads == [0, 0, 1, 1]
    fused = fused_operators(path, tmp_path)
    assert (fused["QLinearConv"], fused["QLinearAdd"], fused["QLinearConcat"]) == (4, 1, 1)


# The rewrites, each on a graph of its own


def graph_of(text: str) -> Any:
    import onnx_ir

    return onnx_ir.from_onnx_text(text)


def run_model(model: Any, x: np.ndarray) -> np.ndarray:
    """Run an onnx_ir model without any optimization."""
    import onnx_ir

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


CLIP = """<ir_version: 10, opset_import: ["" : 20]>
g (float[1,1,1,400] x) => (float[1,1,1,400] y)
<float s = {%s}, int8 z = {%d}, float low = {%g}, float high = {%g}>
{ c = Clip(x, low, high)  q = QuantizeLinear(c, s, z)  y = DequantizeLinear(q, s, z) }"""


@pytest.mark.parametrize(
    ("scale", "zero", "low", "high", "drops"),
    [
        (6 / 255, -128, 0, 6, 1),  # the range of the integers is that of relu6
        (5.2 / 255, -128, 0, 6, 1),  # narrower above: what is clipped saturates anyway
        (7 / 255, -128, 0, 6, 0),  # wider above: 6.5 has an integer of its own
        (6 / 255, -120, 0, 6, 0),  # wider below
        (1.9 / 255, -1, -1, 1, 1),
    ],
)
def test_a_clip_is_dropped_only_where_quantization_clips_as_well(
    scale: float, zero: int, low: float, high: float, drops: int
) -> None:
    model = graph_of(CLIP % (repr(scale), zero, low, high))
    x = np.linspace(-9, 9, 400, dtype=np.float32).reshape(1, 1, 1, 400)
    before = run_model(model, x)
    assert activations.drop_saturated(model.graph) == drops
    assert activations.unsigned_activations(model.graph) == 1
    np.testing.assert_array_equal(run_model(model, x), before)


def test_a_relu_that_something_else_reads_stays() -> None:
    model = graph_of(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[1,1,1,400] x) => (float[1,1,1,400] y, float[1,1,1,400] c)
        <float s = {0.1}, int8 z = {-128}>
        { c = Relu(x)  q = QuantizeLinear(c, s, z)  y = DequantizeLinear(q, s, z) }"""
    )
    assert activations.drop_saturated(model.graph) == 0


PAD = """<ir_version: 10, opset_import: ["" : 20]>
g (float[1,1,4,4] x) => (float[1,1,N,M] y)
<float s = {0.05}, int8 z = {7}, int64[8] pads = {0,0,1,0,0,0,0,2}, float value = {%g}, float[1,1,2,2] w = {1,2,3,4}>
{ p = Pad(x, pads, value)  q = QuantizeLinear(p, s, z)  d = DequantizeLinear(q, s, z)
  y = Conv <pads = [0,1,0,0]> (d, w) }"""


@pytest.mark.parametrize(("value", "drops"), [(0, 1), (1, 0)])
def test_padding_moves_into_the_convolution_only_where_it_is_of_zeros(value: float, drops: int) -> None:
    model = graph_of(PAD % value)
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 4), dtype=np.float32)
    before = run_model(model, x)
    assert activations.pad_in_convolutions(model.graph) == drops
    np.testing.assert_array_equal(run_model(model, x), before)


def test_quantizing_again_is_dropped_only_with_the_same_scale() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[1,1,1,400] x) => (float[1,1,1,400] y)
    <float s = {0.03}, float t = {%s}, int8 z = {5}>
    { a = QuantizeLinear(x, s, z)  b = DequantizeLinear(a, s, z)
      c = QuantizeLinear(b, t, z)  y = DequantizeLinear(c, t, z) }"""
    x = np.linspace(-9, 9, 400, dtype=np.float32).reshape(1, 1, 1, 400)
    for scale, drops in (("0.03", 1), ("0.031", 0)):
        model = graph_of(text % scale)
        before = run_model(model, x)
        assert activations.drop_requantized(model.graph) == drops
        np.testing.assert_array_equal(run_model(model, x), before)


def test_weights_are_turned_and_multiplied_to_the_same_numbers() -> None:
    model = graph_of(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[1,3] x) => (float[1,2] y)
        <int8[2,3] w = {1,-2,3,-4,5,-127}, float[2] s = {0.1, 0.3}, int8[2] z = {0, 0}>
        { d = DequantizeLinear <axis = 0> (w, s, z)  t = Transpose <perm = [1,0]> (d)  y = MatMul(x, t) }"""
    )
    x = np.array([[1, 2, 3]], np.float32)
    expected = x @ (np.array([[1, -2, 3], [-4, 5, -127]], np.float32) * np.array([[0.1], [0.3]], np.float32)).T
    assert weights.transpose_weights(model.graph) == 1
    np.testing.assert_array_equal(run_model(model, x), expected)
    assert weights.multiply_weights(model.graph) == 1
    np.testing.assert_array_equal(run_model(model, x), expected)
    assert [node.op_type for node in model.graph] == ["Cast", "Mul", "MatMul"]


# Bytes


_HASHES = """
import hashlib, sys, pathlib, numpy as np, torch
from torch import nn
from edgekd.compression.compress import compress
from edgekd.exporters.onnx import EXPORTER
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Student
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
program = export_program(net, [torch.zeros(1, 1, 4, 4)])
student = Student(program, Card("net", input_specs(program), output_specs(program), preprocessing={"b": 1, "a": 2}))
x = {"x": np.random.default_rng(0).standard_normal((8, 1, 4, 4), dtype=np.float32)}
hashes = []
for precision in ("fp16", "w8d8", "w8a8"):  # fp32 and w8 are steps on the way to these
    path = pathlib.Path(folder) / f"{precision}.onnx"
    EXPORTER.write(compress(student, precision, x) if precision == "w8a8" else student, path, precision)
    hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_same_program_gives_the_same_bytes_in_another_process_and_nothing_is_said(tmp_path: Path) -> None:
    here: dict[str, Any] = {"folder": str(tmp_path)}
    exec(_HASHES, here)
    assert len(set(here["hashes"])) == 3
    there = subprocess.run(
        [sys.executable, "-c", f"folder = {str(tmp_path)!r}\n{_HASHES}\nprint(hashes)"],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert there.stdout.strip() == str(here["hashes"])
    assert there.stderr == ""


# Refusals


def test_a_program_of_another_precision_is_refused(written: Written, tmp_path: Path) -> None:
    student, _ = written("convnet", "w8")
    with pytest.raises(UsageError, match="onnx fp16 is written from a program in fp32; this is w8"):
        EXPORTER.write(student, tmp_path / "model.onnx", "fp16")


def test_an_operator_without_translation_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x)

    with pytest.raises(ExportError, match=r"does not translate aten\._linalg_eigh, which 'net' uses"):
        EXPORTER.write(student_of(Odd(), torch.ones(1, 3, 3)), tmp_path / "model.onnx", "fp32")


def test_more_than_a_file_can_hold_is_refused_at_once(
    convnet_student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.exporters.onnx._LARGEST", 100)
    with pytest.raises(ExportError, match="one ONNX file holds at most 2 GB"):
        EXPORTER.write(convnet_student, tmp_path / "model.onnx", "fp32")


def test_damaged_and_foreign_files_are_refused(written: Written, tmp_path: Path) -> None:
    content = written("convnet", "fp32")[1].read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a model"):
        (tmp_path / "model.onnx").write_bytes(damaged)
        with pytest.raises(ModelFileError, match="is not a model that ONNX Runtime reads"):
            EXPORTER.load(tmp_path / "model.onnx")
    with pytest.raises(ModelFileError, match="no model file at"):
        EXPORTER.load(tmp_path / "nothing.onnx")


def test_inputs_that_cannot_be_run_are_refused_in_one_line(written: Written) -> None:
    runner = EXPORTER.load(written("encoder", "fp32")[1])
    ids = np.full((1, 6), 4000, np.int32)
    with pytest.raises(DataError, match="ONNX Runtime cannot run these inputs") as caught:
        runner({"ids": ids, "mask": np.ones_like(ids)})
    assert "\n" not in str(caught.value)


def test_integers_are_cast_to_those_of_the_file(written: Written) -> None:
    runner = EXPORTER.load(written("encoder", "fp32")[1])
    ids = np.arange(6)[None]
    found = runner({"ids": ids.astype(np.int64), "mask": np.ones((1, 6), bool)})
    expected = runner({"ids": ids.astype(np.int32), "mask": np.ones((1, 6), np.int32)})
    np.testing.assert_array_equal(next(iter(found.values())), next(iter(expected.values())))


def test_a_card_without_labels_is_written_too(convnet_student: Student, tmp_path: Path) -> None:
    student = replace(convnet_student, card=replace(convnet_student.card, labels=()))
    EXPORTER.write(student, tmp_path / "model.onnx", "fp32")
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert facts["edgekd.labels"] == "[]"
    assert "edgekd.session_config_without_vnni" not in facts


@pytest.mark.parametrize("precision", ["w8a8", "w8d8"])
def test_integer_products_of_large_numbers_do_not_saturate(precision: Precision, tmp_path: Path) -> None:
    """255 · 127 + 255 · 127 is more than 16 bits hold, in which x86 processors without VNNI add."""
    layer = torch.nn.Linear(64, 16, bias=False).eval()
    with torch.no_grad():
        layer.weight.fill_(0.5)
    program = export_program(layer, [torch.zeros(1, 64)])
    student = Student(program, Card("ones", input_specs(program), output_specs(program)))
    ones = {"input": np.ones((8, 64), np.float32)}
    if precision == "w8a8":
        student = compress(student, "w8a8", ones)
    EXPORTER.write(student, tmp_path / "model.onnx", precision)
    (found,) = run_file(EXPORTER.load(tmp_path / "model.onnx"), ones)
    np.testing.assert_allclose(found, np.full((8, 16), 32), rtol=1e-2)
