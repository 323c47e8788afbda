"""What a file holds in float and what its converter added, in real files of every target."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.compression.compress import compress
from edgekd.contents import Contents
from edgekd.exporting.lint import claimed_bits, lint
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Finding, Precision, Student

Compressed = Callable[..., Student]

TARGETS = ("coreml", "onnx", "tflite")


class Leftovers(nn.Module):
    """A sine between quantized layers, and a batch norm that follows no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 80)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.sin(torch.relu(self.first(x))))
        return self.head(self.norm(torch.sin(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    program = export_program(Leftovers(), [torch.zeros(1, 3, 12, 12)])
    return Student(program, Card("leftovers", input_specs(program), output_specs(program)))


@pytest.fixture(scope="module")
def compressed(student: Student, convnet_student: Student) -> Compressed:
    """``compressed(net, precision)``: once for all targets."""
    nets = {"leftovers": student, "convnet": convnet_student}

    @functools.cache
    def compressed(net: str, precision: Precision) -> Student:
        (spec,) = nets[net].card.inputs
        noise = np.random.default_rng(0).normal(size=(16, *spec.shape[1:])).astype(np.float32)
        return compress(nets[net], precision, {spec.name: noise})

    return compressed


def contents_of(
    compressed: Compressed, target: str, precision: Precision, folder: Path, net: str = "leftovers"
) -> tuple[Contents, Student]:
    exporter = plugins.load_exporter(target)
    if plugins.missing(exporter.requires):
        pytest.skip(f"{target} is not installed")
    student = compressed(net, exporter.precisions[precision].source)
    path = folder / f"model{exporter.suffix}"
    exporter.write(student, path, precision, exporter.options())
    return exporter.contents(path), student


def by_kind(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.kind: finding for finding in findings}


@pytest.mark.parametrize("target", TARGETS)
def test_an_fp32_file_that_claims_int8_has_every_weight_named(
    target: str, compressed: Compressed, tmp_path: Path
) -> None:
    contents, _ = contents_of(compressed, target, "fp32", tmp_path)
    found = by_kind(lint(contents, "w8"))["float_weight"]

    sizes = [16 * 16 * 9, 16 * 80]  # the first convolution has 432 numbers: too few to speak of
    assert found.count == len(found.names) == 2
    assert found.cost_bytes == 3 * sum(sizes)
    assert "2 weights left in float: 10.8 kB" in found.message


@pytest.mark.parametrize("target", TARGETS)
def test_a_w8_file_has_no_weight_left_in_float(target: str, compressed: Compressed, tmp_path: Path) -> None:
    contents, source = contents_of(compressed, target, "w8", tmp_path)

    assert "float_weight" not in by_kind(lint(contents, "w8", source.program))
    assert sorted(w.size_bytes for w in contents.weights if w.dtype == "int8" and w.elements > 400) == [432, 1280, 2304]


@pytest.mark.parametrize("target", TARGETS)
def test_what_stays_float_between_integer_layers_is_named_with_what_it_moves(
    target: str, compressed: Compressed, tmp_path: Path
) -> None:
    contents, source = contents_of(compressed, target, "w8a8", tmp_path)
    found = by_kind(lint(contents, "w8a8", source.program))["quantization"]

    assert found.count >= 2
    assert found.cost_bytes >= 2 * 16 * 10 * 10  # into the first sine, at one byte a number


@pytest.mark.parametrize("target", TARGETS)
def test_a_fully_quantized_file_has_nothing_to_say_of_quantization(
    target: str, compressed: Compressed, tmp_path: Path
) -> None:
    contents, source = contents_of(compressed, target, "w8a8", tmp_path, "convnet")

    assert set(by_kind(lint(contents, "w8a8", source.program))) <= {"transpose"}


def test_the_word_for_a_precision_says_how_many_bits_a_weight_has() -> None:
    assert [claimed_bits(word) for word in ("fp32", "fp16", "w8a8", "w4", "p6", "auto")] == [32, 16, 8, 4, 6, 32]
