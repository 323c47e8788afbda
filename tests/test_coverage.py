"""What the coverage run rests on, and what it found wrong, each in a few operators."""

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.benchmarks.coverage_page import PRECISIONS, RESULTS, TARGETS, Cell, page, read_cells, write_cells
from edgekd.benchmarks.isolation import isolated, one_line
from edgekd.compression.compress import compress
from edgekd.errors import ExportError
from edgekd.exporting.export import Proof, export_student
from edgekd.plugins import load_exporter, missing
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import export_program
from edgekd.types import Artifact, Card, Student


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def proven(module: nn.Module, samples: list[Tensor], target: str, precision: str, folder: Path) -> Artifact:
    """The file of a module, which passed its proof."""
    exporter = load_exporter(target)
    if missing(exporter.requires):
        pytest.skip(f"{target} is not installed")
    program = export_program(module.eval(), [x[:1] for x in samples])
    specs = input_specs(program)
    arrays = {spec.name: x.numpy() for spec, x in zip(specs, samples, strict=True)}
    student = Student(program, Card("found", specs, output_specs(program)))
    student = compress(student, exporter.precisions[precision].source, arrays)
    return export_student(student, {}, target, precision, folder / "artifact", Proof(arrays))


@pytest.mark.parametrize("rank", [1, 2])
def test_core_ml_pools_with_a_stride_that_is_left_to_be_the_kernels_size(rank: int, tmp_path: Path) -> None:
    pool = {1: F.max_pool1d, 2: F.max_pool2d}[rank]
    module = Function(lambda x: pool(x, 2))
    proven(module, [torch.randn(2, 3, *[6] * rank)], "coreml", "fp32", tmp_path)


def test_core_ml_takes_an_alias_for_a_copy(tmp_path: Path) -> None:
    module = Function(lambda x: torch.ops.aten.alias(x + 1) * 2)
    proven(module, [torch.randn(2, 3)], "coreml", "fp32", tmp_path)


@pytest.mark.parametrize(("target", "mask"), [("onnx", "chosen"), ("coreml", "chosen"), ("coreml", "added")])
def test_a_row_of_masked_scores_is_even_in_half_precision_too(target: str, mask: str, tmp_path: Path) -> None:
    lowest = torch.finfo(torch.float32).min

    def attend(scores: Tensor, present: Tensor) -> Tensor:
        if mask == "chosen":
            return scores.masked_fill(present == 0, lowest).softmax(-1)
        return (scores + (1.0 - present) * lowest).softmax(-1)

    present = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    proven(Function(attend), [3 * torch.randn(2, 4), present], target, "fp16", tmp_path)


def test_onnx_keeps_large_constants_in_half_precision(tmp_path: Path) -> None:
    proven(Function(lambda x: x * 32768.0), [torch.rand(2, 3)], "onnx", "fp16", tmp_path)


def test_onnx_enlarges_pictures_in_half_precision(tmp_path: Path) -> None:
    module = Function(lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear") + x.mean())
    proven(module, [torch.randn(1, 3, 6, 6)], "onnx", "fp16", tmp_path)


def test_a_crash_a_hang_and_a_refusal_are_results() -> None:
    def crash() -> dict[str, Any]:
        faulthandler.disable()  # pytest's would write the child's stacks into this test's output
        os.abort()

    def hang() -> dict[str, Any]:
        while True:
            time.sleep(1)

    def refuse() -> dict[str, Any]:
        raise ExportError("no such operator")

    def stumble() -> dict[str, Any]:
        return {"x": [][1]}

    assert isolated(lambda: {"status": "passed"})["status"] == "passed"
    assert "died with -6" in isolated(crash)["reason"]
    assert isolated(hang, patience_s=1.0)["reason"] == "takes longer than 1 s"
    assert isolated(refuse)["reason"] == "no such operator"
    assert isolated(stumble)["reason"].startswith("crash, IndexError: list index out of range (test_coverage.py:")


def test_reasons_are_one_line_without_paths_of_the_run() -> None:
    reason = "tflite fp16 failed its proof and is kept in /tmp/x/y.failed: output 'a':\n  max error 3"
    assert one_line(reason) == "tflite fp16 parity: output 'a': max error 3"
    assert one_line("/tmp/x/y.part/model.onnx is no model") == "model.onnx is no model"


def test_cells_come_back_as_they_were_kept(tmp_path: Path) -> None:
    cells = [
        Cell("net", "onnx", "int8", "passed", written="w8a8", seconds=1.5, cosine=0.999),
        Cell("net", "tflite", "fp32", "failed", "operator `x|y` is missing"),
    ]
    path = tmp_path / "coverage.json"
    head = {"versions": {"torch": "2"}, "machine": "a machine", "families": {"net": "timm"}}
    gone = Cell("gone", "onnx", "fp32", "passed")
    write_cells({cell.key: cell for cell in (*cells, gone)}, head, path)

    assert list(read_cells(path).values()) == cells
    text = page(path)
    assert "| net | timm | not run | not run | w8a8 1.5 s | " in text
    assert "- net, tflite fp32: operator \\`x\\|y\\` is missing" in text
    assert "| all | 0 of 1 (0.0%) | not run | 1 of 1 (100.0%) |" in text


@pytest.mark.skipif(not RESULTS.is_file(), reason="only in a checkout")
def test_every_cell_that_did_not_pass_has_a_reason() -> None:
    cells = read_cells()
    assert len(cells) >= 90
    assert all(cell.reason for cell in cells.values() if cell.status != "passed")
    assert {cell.target for cell in cells.values()} == set(TARGETS)
    assert {cell.precision for cell in cells.values()} == set(PRECISIONS)
