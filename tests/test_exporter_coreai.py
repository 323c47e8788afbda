"""Target coreai: every precision against its program, by Core AI's own runtime."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("coreai_torch", reason="coreai-torch is not installed; pip install 'edgekd[coreai]'")
pytest.importorskip("coreai.runtime", reason="coreai-core has no runtime for this machine")

from edgekd.compression.compress import compress
from edgekd.errors import DataError, ExportError, ModelFileError, UsageError
from edgekd.exporters.coreai import EXPORTER
from edgekd.exporting.export import Proof, export_student
from edgekd.exporting.parity import compare, run_file
from edgekd.profiles import load_device
from edgekd.programs.models import input_specs, output_specs, program_bytes, run_program
from edgekd.programs.tracing import export_program
from edgekd.store import hash_path, size_of
from edgekd.types import Card, Student

Inputs = Callable[[Student, int], dict[str, np.ndarray]]
Written = Callable[[str, str], tuple[Student, Path]]


@pytest.fixture(scope="module")
def written(convnet_student: Student, encoder_student: Student, writer: Callable[..., Written]) -> Written:
    """``written(net, precision)`` is the program and its file."""
    return writer(EXPORTER, {"convnet": convnet_student, "encoder": encoder_student})


def counted(path: Path) -> dict[str, int]:
    """Operators by name, as Core AI itself counts them."""
    from coreai.authoring import AIModelAsset

    summary = AIModelAsset.load(path).summary()
    assert summary is not None
    return dict(summary.operation_distribution)


@pytest.mark.parametrize("precision", EXPORTER.precisions)
@pytest.mark.parametrize("net", ["convnet", "encoder"])
def test_package_computes_what_its_program_computes(
    net: str, precision: str, written: Written, inputs_of: Inputs
) -> None:
    student, path = written(net, precision)
    samples, runner = inputs_of(student, 16), EXPORTER.load(path)
    for found, wanted in ((runner.inputs, student.card.inputs), (runner.outputs, student.card.outputs)):
        assert [(s.name, s.dtype) for s in found] == [(s.name, s.dtype) for s in wanted]
        assert [s.shape for s in found] == [(1, *s.shape[1:]) for s in wanted]
    program, file = list(run_program(student.program, samples).values()), run_file(runner, samples)
    parity = compare(student.card.outputs, program, file, EXPORTER.precisions[precision].tolerance, runner.runtime)

    assert parity.status == "passed", parity.reason
    assert runner.runtime.startswith("Core AI 1.")
    if precision == "fp16":
        assert not np.array_equal(program[0], file[0])
    else:
        np.testing.assert_allclose(file[0], program[0], atol=1e-5 if precision != "w8a8" else 1e-2)


def test_quantize_nodes_are_translated_one_for_one(written: Written) -> None:
    student, path = written("convnet", "w8a8")
    names = [str(node.target) for node in student.program.graph.nodes]
    found = counted(path)

    assert found["quantize"] == sum("quantize_per" in name and "dequantize" not in name for name in names) > 0
    assert found["dequantize"] == sum("dequantize_per" in name for name in names) > 0


def test_w8_is_smaller_than_fp32_and_fp16_half_of_it(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
    program = export_program(net, [torch.zeros(1, 256)])
    student = Student(program, Card("wide", input_specs(program), output_specs(program)))
    sizes = {}
    for precision in ("fp32", "fp16", "w8"):
        path = tmp_path / f"{precision}.aimodel"
        EXPORTER.write(compress(student, EXPORTER.precisions[precision].source), path, precision, EXPORTER.options())
        sizes[precision] = size_of(path)

    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    assert sizes["w8"] < 0.3 * sizes["fp32"]


def test_package_tells_an_app_what_it_needs_and_nothing_of_when_and_where_it_was_made(written: Written) -> None:
    _, path = written("encoder", "fp32")
    metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    facts = metadata["creatorDefinedMetadata"]["edgekd"]

    assert "creationDate" not in metadata
    assert facts["labels"] == ["ü", "b", "c"]
    assert (facts["name"], facts["precision"], facts["inputs"]) == ("encoder", "fp32", ["ids", "mask"])
    assert str(Path(torch.__file__).parent).encode() not in (path / "main.mlirb").read_bytes()


def test_the_same_program_gives_the_same_bytes_in_another_process(written: Written, tmp_path: Path) -> None:
    student, path = written("encoder", "w8a8")
    (tmp_path / "student.pt2").write_bytes(program_bytes(student.program))
    (tmp_path / "card.json").write_text(json.dumps(student.card.to_json()))
    code = """
import json, sys
from pathlib import Path
from edgekd.exporters.coreai import EXPORTER
from edgekd.programs.models import load_program
from edgekd.types import Card, Student
folder = Path(sys.argv[1])
card = Card.from_json(json.loads((folder / "card.json").read_text()))
EXPORTER.write(Student(load_program(folder / "student.pt2"), card), folder / "m.aimodel", "w8a8", EXPORTER.options())
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=environment, capture_output=True)

    assert hash_path(tmp_path / "m.aimodel") == hash_path(path)


def test_a_damaged_or_foreign_package_is_refused(written: Written, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(ModelFileError, match="no model package"):
        EXPORTER.load(tmp_path / "missing.aimodel")
    (tmp_path / "empty.aimodel").mkdir()
    with pytest.raises(ModelFileError, match="empty"):
        EXPORTER.load(tmp_path / "empty.aimodel")
    shutil.copytree(written("convnet", "fp32")[1], tmp_path / "short.aimodel")
    program = tmp_path / "short.aimodel" / "main.mlirb"
    program.write_bytes(program.read_bytes()[:-200])
    with pytest.raises(ModelFileError, match=r"short.*sha256"):
        EXPORTER.load(tmp_path / "short.aimodel")


def test_inputs_that_do_not_fit_are_refused(written: Written) -> None:
    runner = EXPORTER.load(written("encoder", "fp32")[1])
    good = {"ids": np.zeros((1, 6), np.int32), "mask": np.ones((1, 6), np.int32)}
    with pytest.raises(DataError, match="takes ids, mask; there is no 'mask'"):
        runner({"ids": good["ids"]})
    with pytest.raises(DataError, match=r"'ids' takes \(1, 6\)"):
        runner({**good, "ids": np.zeros((1, 7), np.int32)})


def test_a_program_in_another_precision_is_refused(convnet_student: Student, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="coreai w8 is written from a program in w8; this is fp32"):
        EXPORTER.write(convnet_student, tmp_path / "model.aimodel", "w8", EXPORTER.options())


def test_an_operator_that_the_converter_lacks_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x)

    program = export_program(Odd(), [torch.zeros(1, 3, 3)])
    student = Student(program, Card("odd", input_specs(program), output_specs(program)))
    with pytest.raises(ExportError, match=r"linalg"):
        EXPORTER.write(student, tmp_path / "model.aimodel", "fp32", EXPORTER.options())


def test_a_notebook_may_load_it_while_its_own_loop_runs(written: Written, inputs_of: Inputs) -> None:
    student, path = written("convnet", "fp32")

    async def cell() -> list[np.ndarray]:
        return run_file(EXPORTER.load(path), inputs_of(student, 2))

    assert asyncio.run(cell())[0].shape == (2, 5)


def test_the_core_proves_the_package_and_the_host_says_why_it_measures_none(
    convnet_student: Student, inputs_of: Inputs, tmp_path: Path
) -> None:
    samples = inputs_of(convnet_student, 12)
    artifact = export_student(convnet_student, {}, "coreai", "fp32", tmp_path / "out", Proof(samples))

    assert artifact.parity.status == "passed"
    assert artifact.toolchain["coreai-core"] == "1.0.0b3"
    assert "its times mean nothing" in load_device("host").probe().not_run["coreai"]
