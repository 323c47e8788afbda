"""Target executorch: every precision against its program, by ExecuTorch itself."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("executorch", reason="executorch is not installed; pip install 'edgekd[executorch]'")

from edgekd.compression.compress import choose_int8, compress
from edgekd.errors import DataError, ExportError, ModelFileError
from edgekd.exporters.executorch import EXPORTER
from edgekd.exporting.export import Proof, export_student
from edgekd.exporting.parity import compare, run_file
from edgekd.measurement import Plan
from edgekd.profiles import load_device
from edgekd.programs.models import input_specs, output_specs, program_bytes, run_program
from edgekd.programs.tracing import export_program
from edgekd.store import hash_path
from edgekd.types import Card, Student

Inputs = Callable[[Student, int], dict[str, np.ndarray]]
Written = Callable[[str, str], tuple[Student, Path]]


class Padded(nn.Module):
    """Padding on one side, a residual sum, a pool: where quantize and dequantize nodes come to lie between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(nn.functional.pad(image, (0, 1, 0, 1))))
        x = x + nn.functional.relu6(self.deep(nn.functional.pad(x, (1, 1, 1, 1))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def student_of(module: nn.Module, *examples: Tensor) -> Student:
    program = export_program(module.eval(), list(examples))
    return Student(program, Card("net", input_specs(program), output_specs(program)))


@pytest.fixture(scope="module")
def written(convnet_student: Student, encoder_student: Student, writer: Callable[..., Written]) -> Written:
    """``written(net, precision)`` is the program and its file."""
    torch.manual_seed(3)
    padded = student_of(Padded(), torch.zeros(1, 3, 12, 12))
    return writer(EXPORTER, {"convnet": convnet_student, "encoder": encoder_student, "padded": padded})


def operators(path: Path) -> Counter[str]:
    return Counter(fact.type for fact in EXPORTER.contents(path).operators)


@pytest.mark.parametrize("precision", EXPORTER.precisions)
@pytest.mark.parametrize("net", ["convnet", "padded", "encoder"])
def test_file_computes_what_its_program_computes(net: str, precision: str, written: Written, inputs_of: Inputs) -> None:
    student, path = written(net, precision)
    samples, runner = inputs_of(student, 16), EXPORTER.load(path)
    for found, wanted in ((runner.inputs, student.card.inputs), (runner.outputs, student.card.outputs)):
        assert [(s.name, s.dtype) for s in found] == [(s.name, s.dtype) for s in wanted]
        assert [s.shape for s in found] == [(1, *s.shape[1:]) for s in wanted]
    program, file = list(run_program(student.program, samples).values()), run_file(runner, samples)
    parity = compare(student.card.outputs, program, file, EXPORTER.precisions[precision].tolerance, runner.runtime)

    assert parity.status == "passed", parity.reason
    assert runner.runtime.startswith("ExecuTorch 1.")
    if EXPORTER.precisions[precision].source == precision:  # the same numbers, but for a rounding tie here and there
        assert parity.cosine is not None
        assert parity.cosine > 0.99999
    else:
        assert not np.array_equal(program[0], file[0])


@pytest.mark.parametrize("net", ["convnet", "padded"])
def test_w8a8_runs_in_integers_from_end_to_end_and_all_of_it_in_xnnpack(net: str, written: Written) -> None:
    contents = EXPORTER.contents(written(net, "w8a8")[1])
    kinds = Counter(fact.kind for fact in contents.operators)

    assert all(fact.type.startswith("xnnpack.") for fact in contents.operators)
    assert (kinds["quantize"], kinds["dequantize"]) == (1, 1)  # of the input and of the output
    assert {weight.dtype for weight in contents.weights} == {"int8", "int32"}


def test_padding_is_left_to_the_convolution_where_it_is_the_same_on_both_sides(written: Written) -> None:
    for precision in ("fp32", "w8a8"):
        assert operators(written("padded", precision)[1])["xnnpack.StaticConstantPad"] == 1


def test_w8d8_holds_linear_weights_and_embeddings_in_int8(written: Written) -> None:
    contents = EXPORTER.contents(written("encoder", "w8d8")[1])
    readers = Counter(weight.reader for weight in contents.weights if weight.dtype == "int8")

    assert readers == {"xnnpack.FullyConnected": 5, "aten::embedding": 1}
    assert operators(written("encoder", "w8d8")[1])["xnnpack.FullyConnected"] == 5


def test_w8d8_of_a_model_without_matrix_products_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    student = compress(student_of(net, torch.zeros(1, 1, 6, 6)), "w8")
    with pytest.raises(ExportError, match="this model has none; take w8a8"):
        EXPORTER.write(student, tmp_path / "model.pte", "w8d8", EXPORTER.options())
    assert not list(tmp_path.iterdir())


def test_int8_is_w8a8_for_a_convnet_and_w8d8_for_a_transformer(
    convnet_student: Student, encoder_student: Student
) -> None:
    assert choose_int8(convnet_student.program, EXPORTER.precisions)[0] == "w8a8"
    assert choose_int8(encoder_student.program, EXPORTER.precisions)[0] == "w8d8"


def half_layer_norm() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.LayerNorm(384).eval(), torch.randn(1, 4, 384)


def test_fp16_normalizes_wide_rows_right(tmp_path: Path) -> None:
    norm, x = half_layer_norm()
    student = student_of(norm, x)
    EXPORTER.write(student, tmp_path / "model.pte", "fp16", EXPORTER.options())
    runner = EXPORTER.load(tmp_path / "model.pte")
    (found,) = runner({runner.inputs[0].name: x.numpy()}).values()

    np.testing.assert_allclose(found, norm(x).detach().numpy(), atol=5e-3)


def test_the_kernel_that_fp16_avoids_is_still_wrong(tmp_path: Path) -> None:
    """When this fails, ExecuTorch was mended, and exporters/executorch.py may compute normalizations in half."""
    from executorch.exir import to_edge_transform_and_lower

    norm, x = half_layer_norm()
    program = torch.export.export(norm.half(), (x.half(),))
    (tmp_path / "model.pte").write_bytes(bytes(to_edge_transform_and_lower(program).to_executorch().buffer))
    runner = EXPORTER.load(tmp_path / "model.pte")
    (found,) = runner({"input_0": x.half().numpy()}).values()

    assert np.abs(found - norm(x.half()).detach().numpy()).max() > 0.1


def test_a_file_that_edgekd_did_not_make_numbers_its_inputs_and_outputs(tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(nn.Linear(3, 2), (torch.zeros(1, 3),))
    (tmp_path / "model.pte").write_bytes(bytes(to_edge_transform_and_lower(program).to_executorch().buffer))
    runner = EXPORTER.load(tmp_path / "model.pte")

    assert [(s.name, s.shape, s.dtype) for s in (*runner.inputs, *runner.outputs)] == [
        ("input_0", (1, 3), "float32"),
        ("output_0", (1, 2), "float32"),
    ]


def test_the_same_program_gives_the_same_bytes_in_another_process(written: Written, tmp_path: Path) -> None:
    student, path = written("convnet", "w8a8")
    (tmp_path / "student.pt2").write_bytes(program_bytes(student.program))
    code = """
import dataclasses, json, sys
from pathlib import Path
from edgekd.exporters.executorch import EXPORTER
from edgekd.programs.models import load_program
from edgekd.types import Card, Student
folder = Path(sys.argv[1])
card = Card.from_json(json.loads((folder / "card.json").read_text()))
EXPORTER.write(Student(load_program(folder / "student.pt2"), card), folder / "model.pte", "w8a8", EXPORTER.options())
"""
    import json

    (tmp_path / "card.json").write_text(json.dumps(student.card.to_json()))
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=environment, capture_output=True)

    assert hash_path(tmp_path / "model.pte") == hash_path(path)


def test_a_damaged_or_foreign_file_is_refused(written: Written, tmp_path: Path) -> None:
    content = written("convnet", "fp32")[1].read_bytes()
    for name, damaged in (("empty", b""), ("other", b"PK\x03\x04" * 40), ("short", content[: len(content) // 2])):
        path = tmp_path / f"{name}.pte"
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError, match=name):
            EXPORTER.load(path)
    with pytest.raises(ModelFileError, match="no model file"):
        EXPORTER.load(tmp_path / "missing.pte")


def test_inputs_that_do_not_fit_are_refused(written: Written) -> None:
    runner = EXPORTER.load(written("encoder", "fp32")[1])
    good = {"ids": np.zeros((1, 6), np.int32), "mask": np.ones((1, 6), np.int32)}
    with pytest.raises(DataError, match="takes ids, mask; there is no 'mask'"):
        runner({"ids": good["ids"]})
    with pytest.raises(DataError, match=r"'ids' takes \(1, 6\)"):
        runner({**good, "ids": np.zeros((1, 7), np.int32)})
    with pytest.raises(DataError, match="ExecuTorch cannot run these inputs"):
        runner({**good, "ids": np.full((1, 6), 40, np.int32)})  # beyond the table


def test_the_core_proves_the_file_and_the_host_measures_it(
    convnet_student: Student, inputs_of: Inputs, tmp_path: Path
) -> None:
    samples = inputs_of(convnet_student, 12)
    student = compress(convnet_student, "w8a8", samples)
    artifact = export_student(student, {}, "executorch", "w8a8", tmp_path / "out", Proof(samples))
    assert artifact.parity.status == "passed"
    assert artifact.toolchain["executorch"].startswith("1.")

    plan = dataclasses.replace(Plan(), blocks=1, warmup_runs=2, warmup_s=0.0, min_runs=5, min_s=0.0)
    device = load_device("host")
    assert "executorch" in device.probe().targets
    blocks, outputs = device.run(artifact, tmp_path / "out", samples, plan)
    program = run_program(student.program, samples)

    assert "XNNPACK" in blocks[0].conditions["runtime"]
    assert len(blocks[0].latency_ms) >= 5
    for name, wanted in program.items():
        np.testing.assert_allclose(outputs[name], wanted, atol=0.05)
