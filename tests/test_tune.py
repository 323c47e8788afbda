"""int8 chosen by measurement, and files that are worse than the one they should improve on."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.compression.compress import compress
from edgekd.console import LineProgress
from edgekd.errors import ExportError, UsageError
from edgekd.exporting.export import Proof, Request, requests_of, write_request
from edgekd.exporting.regressions import note_regressions, regressions
from edgekd.exporting.tune import CANDIDATES, Candidate, choose, settle, tune
from edgekd.measurement import Block, Measurement, Plan
from edgekd.plugins import load_exporter, missing
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import export_program
from edgekd.store import load_artifact, write_json
from edgekd.types import Artifact, Card, Student


def test_the_fastest_form_without_a_fault_is_taken() -> None:
    precision, why = choose(
        [Candidate("w8a8", 0.4, "loses 3.00 points of accuracy"), Candidate("w8d8", 0.7), Candidate("w8", 1.1)]
    )

    assert precision == "w8d8"
    assert why == (
        "int8 is w8d8 here: measured against fp32 on this machine: "
        "w8a8 0.40× (loses 3.00 points of accuracy), w8d8 0.70×, w8 1.10×"
    )


def test_no_form_that_is_good_enough_is_an_error_with_all_that_was_found() -> None:
    with pytest.raises(UsageError, match=r"no int8 form can be taken: w8 0.90× \(too far .*\); keep fp32 or fp16"):
        choose([Candidate("w8", 0.9, "too far from fp32: cosine 0.400")])


def test_int8_becomes_every_form_of_the_target_beside_fp32(convnet_student: Student) -> None:
    found = requests_of({"onnx": ("int8", "w8")}, convnet_student, CANDIDATES)

    assert found == [
        Request("onnx", "fp32", is_asked=False),
        Request("onnx", "w8a8", is_asked=False, is_candidate=True),
        Request("onnx", "w8d8", is_asked=False, is_candidate=True),
        Request("onnx", "w8", is_asked=True, is_candidate=True),
    ]


def test_without_measuring_a_rule_decides_and_says_why(convnet_student: Student) -> None:
    found = requests_of({"onnx": ("int8", "w8a8")}, convnet_student)

    assert [(request.precision, request.is_asked) for request in found] == [("w8a8", True)]
    assert "a convnet" in found[0].note


def test_forms_are_timed_side_by_side_and_the_best_manifest_says_so(tmp_path: Path) -> None:
    if missing(load_exporter("onnx").requires):
        pytest.skip("onnx is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
    program = export_program(net, [torch.zeros(1, 256)])
    student = Student(program, Card("net", input_specs(program), output_specs(program)))
    samples = {student.card.inputs[0].name: np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)}
    proof, folders = Proof(samples), []
    for precision in ("fp32", "w8d8"):
        folders.append(tmp_path / precision)
        assert write_request(
            Request("onnx", precision), student, {}, folders[-1], proof, None, LineProgress(io.StringIO())
        )

    chosen, why = tune(
        folders, student, proof, LineProgress(io.StringIO()), Plan(blocks=1, warmup_s=0.05, min_runs=20, min_s=0.05)
    )

    assert chosen == folders[1]
    assert why.startswith("int8 is w8d8 here: measured against fp32 on this machine: w8d8 ")
    assert load_artifact(chosen).notes[0] == why


def test_a_candidate_that_the_target_refuses_is_said_and_left_out(convnet_student: Student, tmp_path: Path) -> None:
    if missing(load_exporter("onnx").requires):
        pytest.skip("onnx is not installed")

    said = io.StringIO()
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval()  # nothing that w8d8 quantizes
    program = export_program(net, [torch.zeros(1, 1, 8, 8)])
    student = Student(program, Card("net", input_specs(program), output_specs(program)))
    samples = {student.card.inputs[0].name: np.zeros((2, 1, 8, 8), np.float32)}
    request = Request("onnx", "w8d8", is_asked=False, is_candidate=True)

    assert not write_request(request, student, {}, tmp_path / "w8d8", Proof(samples), None, LineProgress(said))
    assert "onnx w8d8 is no candidate for int8" in said.getvalue()
    assert not (tmp_path / "w8d8").exists()


def _measured(artifact: Artifact, latencies: list[float]) -> Measurement:
    blocks = tuple(Block(1.0, 1.0, 1.0, (), (latency,) * 9, None, True) for latency in latencies)
    return Measurement(artifact.sha256, artifact.target, artifact.precision, "host (x)", "measured", blocks=blocks)


def test_slower_is_said_only_where_the_whole_interval_is(onnx_file: tuple[Artifact, Path]) -> None:
    parent, _ = onnx_file
    child = Artifact.from_json({**parent.to_json(), "precision": "w8", "sha256": "1" * 64, "size_bytes": 1})
    base = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]
    slower = _measured(child, [1.3 * latency for latency in base])
    noisy = _measured(child, [1.3, 0.8, 1.2, 0.9, 1.4, 0.7])

    assert regressions(child, parent, [_measured(parent, base), noisy]) == ()
    assert regressions(child, parent, [slower]) == ()  # nothing to hold it against
    assert regressions(child, parent, [_measured(parent, base), slower]) == (
        "latency: 1.30× its fp32 file on host (x) (95% interval 1.30 to 1.30)",
    )


def test_a_larger_file_says_so_in_its_manifest(onnx_file: tuple[Artifact, Path], tmp_path: Path) -> None:
    parent, _ = onnx_file
    for name, changes in {
        "onnx-fp32": {},
        "onnx-w8": {"precision": "w8", "size_bytes": parent.size_bytes * 2, "sha256": "2" * 64},
    }.items():
        write_json(tmp_path / name / "manifest.json", {**parent.to_json(), **changes})
    changed = note_regressions([tmp_path / "onnx-fp32", tmp_path / "onnx-w8"])

    assert [artifact.precision for artifact in changed] == ["w8"]
    manifest = json.loads((tmp_path / "onnx-w8" / "manifest.json").read_text())
    assert manifest["regressions"] == ["size: 2.00× its fp32 file"]
    assert note_regressions([tmp_path / "onnx-fp32", tmp_path / "onnx-w8"]) == []


def _written(folder: Path, precision: str, convnet_student: Student) -> tuple[Request, Path]:
    request = Request("coreml", precision, is_asked=False, is_candidate=precision != "fp32")
    samples = {convnet_student.card.inputs[0].name: np.zeros((2, 1, 12, 12), np.float32)}
    path, progress = folder / precision, LineProgress(io.StringIO())
    assert write_request(request, compress(convnet_student, precision), {}, path, Proof(samples), None, progress)
    return request, path


def test_a_target_that_is_not_measured_here_gets_the_best_form_by_rule_of_those_that_were_written(
    convnet_student: Student, tmp_path: Path
) -> None:
    """Without calibration there is no w8a8, which the rule would take first."""
    if missing(load_exporter("coreml").requires):
        pytest.skip("coreml is not installed")
    written = dict(_written(tmp_path, precision, convnet_student) for precision in ("fp32", "w8"))
    progress = LineProgress(io.StringIO())

    assert settle(list(written), written, convnet_student, Proof({}), progress) == [tmp_path / "w8"]
    assert "int8 is w8 here, by rule" in load_artifact(tmp_path / "w8").notes[0]
    with pytest.raises(UsageError, match="none of its forms could be written for coreml"):
        settle(list(written), {}, convnet_student, Proof({}), progress)


def test_the_file_that_candidates_are_measured_against_must_be_written(tmp_path: Path) -> None:
    if missing(load_exporter("onnx").requires):
        pytest.skip("onnx is not installed")

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x)

    program = export_program(Odd(), [torch.ones(1, 3, 3)])
    student = Student(program, Card("odd", input_specs(program), output_specs(program)))
    samples = {student.card.inputs[0].name: np.ones((2, 3, 3), np.float32)}
    request, progress = Request("onnx", "fp32", is_asked=False), LineProgress(io.StringIO())

    with pytest.raises(ExportError, match="does not translate"):
        write_request(request, student, {}, tmp_path / "fp32", Proof(samples), None, progress)
