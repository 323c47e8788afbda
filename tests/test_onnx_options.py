"""What ONNX alone can be told: open axes, fused operators. Files in ONNX Runtime against their programs."""

import json
from collections import Counter
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
from edgekd.exporting.parity import compare, run_file
from edgekd.programs.models import input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Precision, Student

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from edgekd.exporters._onnx_options import OnnxOptions  # noqa: E402
from edgekd.exporters.onnx import EXPORTER  # noqa: E402

PRECISIONS = ("fp32", "fp16", "w8", "w8d8", "w8a8", "w4")


class Encoder(nn.Module):
    """A layer of a text encoder for up to 16 tokens; a vector for each text, and one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.norms[0](self.words(ids) + self.places.weight[: ids.shape[1]])
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        seen = mask[:, None, None, :].to(torch.bool)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = self.norms[1](x + self.out(attended))
        x = self.norms[2](x + self.down(F.gelu(self.up(x))))
        weight = mask[..., None].to(x.dtype)
        return {"logits": self.head((x * weight).sum(1) / weight.sum(1)), "tokens": x}


@pytest.fixture(scope="module")
def encoder() -> Student:
    """Open in batch and length."""
    torch.manual_seed(5)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=16)}
    ids = torch.zeros(2, 6, dtype=torch.int32)
    program = torch.export.export(
        Encoder().eval(), (ids, torch.ones_like(ids)), dynamic_shapes=(axes, axes), strict=False
    )
    return Student(program, Card("encoder", input_specs(program), output_specs(program)))


def texts(count: int, length: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(count * 100 + length)
    mask = np.arange(length) < generator.integers(1, length + 1, (count, 1))
    return {"ids": generator.integers(0, 50, (count, length)).astype(np.int32), "mask": mask.astype(np.int32)}


def check(student: Student, precision: Precision, runner: Any, samples: dict[str, np.ndarray]) -> None:
    """All samples in one call."""
    program = list(run_program(student.program, samples).values())
    found = list(runner(samples).values())
    parity = compare(student.card.outputs, program, found, EXPORTER.precisions[precision].tolerance, "")
    assert parity.status == "passed", (len(samples["ids"]), samples["ids"].shape, parity.reason)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_file_takes_several_batches_and_lengths(precision: Precision, encoder: Student, tmp_path: Path) -> None:
    student = compress(encoder, EXPORTER.precisions[precision].source, texts(32, 12))
    artifact = export_student(
        student,
        {},
        "onnx",
        precision,
        tmp_path / "a",
        Proof(texts(13, 9)),
        options=OnnxOptions(batch="1..8", length="2..16"),
    )
    assert artifact.parity.status == "passed"
    assert [spec.shape for spec in artifact.inputs] == [(-1, -1), (-1, -1)]
    runner = EXPORTER.load(tmp_path / "a" / artifact.path)
    for count, length in ((1, 16), (3, 2), (8, 7), (20, 11)):
        check(student, precision, runner, texts(count, length))
    model = onnx.load(tmp_path / "a" / artifact.path)
    onnx.checker.check_model(model, full_check=True)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert shapes["ids"] == ["batch", "length"]
    assert shapes[student.card.outputs[1].name] == ["batch", "length", 32]


@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_an_open_batch_runs_in_the_same_operators(
    precision: Precision, convnet_student: Student, tmp_path: Path
) -> None:
    images = {"input": np.random.default_rng(0).standard_normal((24, 1, 12, 12), dtype=np.float32)}
    student = compress(convnet_student, precision, images)
    found = {}
    for batch in ("1", "1,3,8"):
        EXPORTER.write(student, tmp_path / batch, precision, OnnxOptions(batch=batch))
        # A fixed shape is a constant, an open one is computed; all else is the same.
        facts = EXPORTER.contents(tmp_path / batch).operators
        found[batch] = Counter(fact.type for fact in facts if fact.type not in ("Shape", "Concat", "Gather", "Squeeze"))
    assert found["1"] == found["1,3,8"]
    runner = EXPORTER.load(tmp_path / "1,3,8")
    assert runner.batch_sizes == (1, 3, 8)
    (one,) = run_file(EXPORTER.load(tmp_path / "1"), images)
    (many,) = runner(images).values()
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


def test_one_size_makes_a_file_of_that_size(encoder: Student, tmp_path: Path) -> None:
    EXPORTER.write(encoder, tmp_path / "a.onnx", "fp32", OnnxOptions(batch="4", length="6"))
    runner = EXPORTER.load(tmp_path / "a.onnx")
    assert [spec.shape for spec in runner.inputs] == [(4, 6), (4, 6)]
    check(encoder, "fp32", runner, texts(4, 6))
    EXPORTER.write(encoder, tmp_path / "b.onnx", "fp32", OnnxOptions(length="4,6"))
    assert [spec.shape for spec in EXPORTER.load(tmp_path / "b.onnx").inputs] == [(1, -1), (1, -1)]


def test_sizes_that_the_program_does_not_take_are_refused(
    encoder: Student, convnet_student: Student, tmp_path: Path
) -> None:
    for student, options, message in (
        (encoder, OnnxOptions(), r"axis 1 of input 'ids' \(-1, -1\) is open; set length, as 16,32 or 1..128"),
        (encoder, OnnxOptions(length="2..32"), r"length=2..32, but axis 1 of input 'ids' has 1 to 16"),
        (encoder, OnnxOptions(length="many"), "onnx length='many' is no size"),
        (convnet_student, OnnxOptions(length="8"), "onnx length=8 takes a program with an open axis"),
    ):
        with pytest.raises(UsageError, match=message):
            EXPORTER.write(student, tmp_path / "a.onnx", "fp32", options)
    assert not list(tmp_path.iterdir())


class Patches(nn.Module):
    """A vision transformer's first block, with its queries, keys and values cut from one tensor as timm does."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.norms = nn.Conv2d(3, 32, 4, stride=4), nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.cut(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x).mean(1))


class Written(Encoder):
    """Attention written out, as models without PyTorch's own do."""

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.norms[0](self.words(ids) + self.places.weight[: ids.shape[1]])
        q, k, v = (layer(x).view(ids.shape[0], -1, 4, 8) for layer in (self.q, self.k, self.v))
        bias = (1 - mask[:, None, None, :].float()) * -1e4
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 8**0.5
        attended = torch.softmax(scores + bias, -1) @ v.transpose(1, 2)
        x = self.norms[1](x + self.out(attended.transpose(1, 2).flatten(2)))
        x = self.norms[2](x + self.down(F.gelu(self.up(x))))
        weight = mask[..., None].to(x.dtype)
        return {"logits": self.head((x * weight).sum(1) / weight.sum(1)), "tokens": x}


@pytest.fixture(scope="module")
def transformers() -> dict[str, Student]:
    torch.manual_seed(6)
    ids = torch.zeros(1, 12, dtype=torch.int32)
    nets: dict[str, tuple[nn.Module, list[Tensor]]] = {
        "patches": (Patches(), [torch.zeros(1, 3, 16, 16)]),
        "written": (Written(), [ids, torch.ones_like(ids)]),
    }
    found = {}
    for name, (net, inputs) in nets.items():
        program = export_program(net.eval(), inputs)
        found[name] = Student(program, Card(name, input_specs(program), output_specs(program)))
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w8d8", "w4"])
@pytest.mark.parametrize("name", ["patches", "written"])
def test_attention_is_one_operator_that_gives_the_same(
    name: str, precision: Precision, transformers: dict[str, Student], tmp_path: Path
) -> None:
    student = compress(transformers[name], EXPORTER.precisions[precision].source)
    samples = texts(24, 12)
    if name == "patches":
        samples = {"image": np.random.default_rng(3).standard_normal((24, 3, 16, 16), dtype=np.float32)}
    options = OnnxOptions(fuse=True, batch="1,4" if precision in ("fp32", "w8d8") else "1")
    artifact = export_student(student, {}, "onnx", precision, tmp_path / "a", Proof(samples), options=options)
    assert artifact.parity.status == "passed"
    model = onnx.load(tmp_path / "a" / artifact.path)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["MultiHeadAttention"] == 1
    assert not counts["Softmax"]
    told = json.loads({entry.key: entry.value for entry in model.metadata_props}["edgekd.fused"])
    assert told == {kind: counts[kind] for kind in told}
    assert set(told) >= {"MultiHeadAttention", "BiasGelu"}


def test_what_cannot_be_fused_is_refused(
    transformers: dict[str, Student], convnet_student: Student, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="finds no attention, gelu or residual sum to fuse"):
        EXPORTER.write(convnet_student, tmp_path / "a.onnx", "fp32", OnnxOptions(fuse=True))
    student = compress(transformers["written"], "w8a8", texts(24, 12))
    with pytest.raises(UsageError, match="fuse=true fuses float operators, which w8a8 has few of"):
        EXPORTER.write(student, tmp_path / "a.onnx", "w8a8", OnnxOptions(fuse=True))


def test_w4a8_holds_int4_weights_that_run_in_integers(convnet_student: Student, tmp_path: Path) -> None:
    images = {"input": np.random.default_rng(0).standard_normal((24, 1, 12, 12), dtype=np.float32)}
    student = compress(convnet_student, "w4a8", images)
    EXPORTER.write(student, tmp_path / "a.onnx", "w4a8")
    bytes_of_8 = replace(student, card=replace(student.card, precision="w8a8"))
    EXPORTER.write(bytes_of_8, tmp_path / "b.onnx", "w8a8")
    contents = {name: EXPORTER.contents(tmp_path / f"{name}.onnx") for name in "ab"}
    kinds = {name: {w.dtype for w in found.weights if len(w.shape) > 1} for name, found in contents.items()}
    assert kinds == {"a": {"int4"}, "b": {"int8"}}
    assert [fact.type for fact in contents["a"].operators] == [fact.type for fact in contents["b"].operators]
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"), full_check=True)
    four, eight = (run_file(EXPORTER.load(tmp_path / f"{name}.onnx"), images)[0] for name in "ab")
    np.testing.assert_array_equal(four, eight)
