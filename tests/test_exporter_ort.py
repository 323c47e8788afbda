"""Files in ONNX Runtime's own format against their programs, by ONNX Runtime."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.compression.compress import compress
from edgekd.errors import ModelFileError
from edgekd.exporting.parity import compare, run_file
from edgekd.programs.models import input_specs, output_specs, program_bytes, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Precision, Student

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from edgekd.exporters import onnx as onnx_exporter
from edgekd.exporters._onnx_options import OnnxOptions
from edgekd.exporters.ort import EXPORTER

Written = Callable[[str, Precision], tuple[Student, Path]]
InputsOf = Callable[[Student, int], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def written(writer: Callable[..., Written], convnet_student: Student, encoder_student: Student) -> Written:
    return writer(EXPORTER, {"convnet": convnet_student, "encoder": encoder_student})


@pytest.mark.parametrize(
    ("net", "precision"),
    [
        ("convnet", "fp32"),
        ("convnet", "w8a8"),
        ("encoder", "fp16"),
        ("encoder", "w8"),
        ("encoder", "w8d8"),
    ],
)
def test_file_computes_what_its_program_computes(
    net: str, precision: Precision, written: Written, inputs_of: InputsOf
) -> None:
    student, path = written(net, precision)
    runner, samples = EXPORTER.load(path), inputs_of(student, 24)
    assert path.read_bytes()[4:8] == b"ORTM"
    program = list(run_program(student.program, samples).values())
    tolerance = EXPORTER.precisions[precision].tolerance
    parity = compare(student.card.outputs, program, run_file(runner, samples), tolerance, runner.runtime)
    assert parity.status == "passed", parity.reason


def test_int8_weights_stay_bytes(tmp_path: Path) -> None:
    """ONNX Runtime would fold them back into floats when it saves the graph."""
    program = export_program(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 8)), [torch.zeros(1, 64)])
    student = Student(program, Card("net", input_specs(program), output_specs(program)))
    EXPORTER.write(compress(student, "w8"), tmp_path / "model.ort", "w8")
    assert (tmp_path / "model.ort").stat().st_size < (64 * 512 + 512 * 8) * 1.4


def test_file_and_its_onnx_file_give_the_same(convnet_student: Student, tmp_path: Path, inputs_of: InputsOf) -> None:
    student = compress(convnet_student, "w8a8", inputs_of(convnet_student, 24))
    options, samples = OnnxOptions(batch="1,4"), inputs_of(student, 9)
    EXPORTER.write(student, tmp_path / "a.ort", "w8a8", options)
    onnx_exporter.EXPORTER.write(student, tmp_path / "a.onnx", "w8a8", options)
    outputs = [
        run_file(exporter.load(tmp_path / f"a{exporter.suffix}"), samples)
        for exporter in (EXPORTER, onnx_exporter.EXPORTER)
    ]
    for ort, plain in zip(*outputs, strict=True):
        np.testing.assert_allclose(ort, plain, atol=1e-6)


def test_integer_products_of_large_numbers_do_not_saturate(tmp_path: Path) -> None:
    """255 · 127 + 255 · 127 is more than 16 bits hold, in which x86 processors without VNNI add with int8 weights."""
    layer = nn.Linear(64, 16, bias=False).eval()
    with torch.no_grad():
        layer.weight.fill_(0.5)
    program = export_program(layer, [torch.zeros(1, 64)])
    student = Student(program, Card("ones", input_specs(program), output_specs(program)))
    EXPORTER.write(student, tmp_path / "a.ort", "w8d8")
    (found,) = EXPORTER.load(tmp_path / "a.ort")({"input": np.ones((1, 64), np.float32)}).values()
    np.testing.assert_allclose(found, np.full((1, 16), 32), rtol=1e-3)


_AGAIN = """
import sys
from pathlib import Path
from edgekd.exporters.ort import EXPORTER
from edgekd.programs.models import input_specs, load_program, output_specs
from edgekd.types import Card, Student
program = load_program(Path(sys.argv[1]))
labels = ("a", "b", "c", "d", "e")
student = Student(program, Card("convnet", input_specs(program), output_specs(program), labels, precision="w8a8"))
for path in sys.argv[2:]:
    EXPORTER.write(student, Path(path), "w8a8")
"""


def test_same_bytes_in_another_process_and_again(convnet_student: Student, tmp_path: Path, inputs_of: InputsOf) -> None:
    """ONNX Runtime itself writes other bytes each time."""
    student = compress(convnet_student, "w8a8", inputs_of(convnet_student, 24))
    (tmp_path / "a.pt2").write_bytes(program_bytes(student.program))
    paths = [tmp_path / f"{index}.ort" for index in range(3)]
    EXPORTER.write(student, paths[0], "w8a8")
    done = subprocess.run(
        [sys.executable, "-c", _AGAIN, str(tmp_path / "a.pt2"), *map(str, paths[1:])],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len({path.read_bytes() for path in paths}) == 1


def test_contents_are_what_runs(written: Written) -> None:
    contents = EXPORTER.contents(written("convnet", "w8a8")[1])
    types = [fact.type for fact in contents.operators]
    assert types.count("QLinearConv") == 2
    assert types.count("QuantizeLinear") == types.count("DequantizeLinear") == 1
    found = {weight.shape: weight.dtype for weight in contents.weights if len(weight.shape) == 4}
    assert found == {(8, 1, 3, 3): "uint8"}
    sizes = [fact.size_bytes for fact in contents.operators]
    assert sizes[types.index("QLinearConv")] == 8 * 12 * 12


def test_damaged_and_foreign_files_are_refused(written: Written, tmp_path: Path) -> None:
    content = written("convnet", "fp32")[1].read_bytes()
    for damaged in (content[:900], content[: len(content) // 2], b"", b"\0\0\0\0ORTM" + bytes(100)):
        (tmp_path / "a.ort").write_bytes(damaged)
        with pytest.raises(ModelFileError, match="is not a model that ONNX Runtime reads"):
            EXPORTER.load(tmp_path / "a.ort")
    with pytest.raises(ModelFileError, match="it does not start like one"):
        EXPORTER.contents(tmp_path / "nothing.ort")
    (tmp_path / "a.ort").write_bytes(content[:60] + b"\xff" * 400)
    with pytest.raises(ModelFileError, match="is damaged"):
        EXPORTER.contents(tmp_path / "a.ort")
