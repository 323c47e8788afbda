"""What Core ML alone can do: palettes, int4, sparse weights, systems, images, labels, open shapes, states."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.compression.compress import compress
from edgekd.errors import DataError, ExportError, UsageError
from edgekd.exporters._mil_compress import group_count, quantize_blocks
from edgekd.exporters._mil_options import CoreMLOptions, pixels
from edgekd.exporters._mil_palette import palettize
from edgekd.exporters.coreml import EXPORTER, load
from edgekd.exporting.export import Proof, export_student, verify_artifact
from edgekd.programs.models import input_specs, output_specs, program_bytes, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Student

pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, stride=2)
        self.head = nn.Linear(48, 64)
        self.classes = nn.Linear(64, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(image)))).mean((2, 3))
        return self.classes(F.relu(self.head(x)))


def student_of(module: nn.Module, *inputs: Tensor, **card: Any) -> Student:
    program = export_program(module, inputs)
    outputs = output_specs(program)
    if "labels" in card:
        outputs = tuple(type(s)(s.name, s.shape, s.dtype, "logits") for s in outputs)
    return Student(program, Card(type(module).__name__, input_specs(program), outputs, **card))


def net(zeros: float = 0.0) -> Net:
    """With smooth weights as training leaves them, and a share of them pruned by size."""
    torch.manual_seed(0)
    module = Net().eval()
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
            if zeros:
                limit = parameter.detach().abs().flatten().quantile(zeros)
                parameter.data[parameter.data.abs() < limit] = 0
    return module


SAMPLES = {"image": np.random.default_rng(0).standard_normal((6, 3, 12, 12)).astype(np.float32)}
LABELS = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture(scope="module")
def student() -> Student:
    return student_of(net(), torch.zeros(1, 3, 12, 12), labels=LABELS)


@pytest.fixture(scope="module")
def pruned() -> Student:
    return student_of(net(zeros=0.75), torch.zeros(1, 3, 12, 12))


def weights_of(path: Path) -> dict[str, np.ndarray]:
    """The large weights that the file's layers compute with, decompressed, by shape."""
    program = load(path)
    found = [step.constants.get("weight") for step in program.steps if step.operator.name in ("conv", "linear")]
    return {str(tuple(w.shape)): w.numpy() for w in found if w is not None}


def operators(path: Path) -> set[str]:
    from edgekd.exporters._mil_package import read_package

    package = read_package(path)
    main = package.model.mlProgram.functions["main"]
    return {op.type for op in main.block_specializations[main.opset].operations}


# Palettes and blocks, by themselves ----------------------------------------------------------------------------------


def best_error(values: np.ndarray, size: int) -> float:
    """Smallest sum of squares that any ``size`` numbers reach, by dynamic programming over the sorted values."""
    v = np.sort(values.astype(np.float64))
    n = len(v)
    s, q = np.r_[0, v.cumsum()], np.r_[0, (v * v).cumsum()]

    def cost(i: np.ndarray, j: int) -> np.ndarray:
        total = s[j] - s[i]
        result: np.ndarray = q[j] - q[i] - total * total / (j - i)
        return result

    errors = np.array([0.0, *[cost(np.array([0]), j)[0] for j in range(1, n + 1)]])
    for _ in range(size - 1):
        errors = np.array([0.0, *[min(errors[j], (errors[:j] + cost(np.arange(j), j)).min()) for j in range(1, n + 1)]])
    return float(errors[-1])


@pytest.mark.parametrize("bits", [2, 4])
def test_a_palette_is_nearly_as_good_as_the_best_there_is(bits: int) -> None:
    values = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) ** 3
    palettes, indices = palettize(values, 2**bits)
    found = palettes.gather(1, indices.long())
    for row, stored in zip(values.numpy(), found.numpy(), strict=True):
        assert ((row - stored) ** 2).sum() <= 1.1 * best_error(row, 2**bits)
        assert set(stored) <= set(palettes.numpy().reshape(-1))
    again = palettize(values, 2**bits)
    assert torch.equal(again[0], palettes)
    assert torch.equal(again[1], indices)


def test_a_palette_holds_few_different_numbers_exactly() -> None:
    values = torch.tensor([[0.5, -1.0, 0.5, 2.0, -1.0, 0.0] * 50])
    palettes, indices = palettize(values, 4)
    assert torch.equal(palettes.gather(1, indices.long()), values)


def test_int4_blocks_round_to_the_nearest_step_with_a_good_scale() -> None:
    weight = torch.randn(8, 64, 3, generator=torch.Generator().manual_seed(0))
    data, scales = quantize_blocks(weight, 32)
    assert (data.dtype, tuple(scales.shape)) == (torch.int8, (8, 2, 1))
    assert int(data.min()) >= -8
    assert int(data.max()) <= 7
    stored = data.float() * scales.repeat_interleave(32, 1)
    plain = weight.reshape(8, 2, -1).abs().amax(-1) / 7
    naive = (weight / plain.repeat_interleave(32, 1).unsqueeze(-1)).round() * plain.repeat_interleave(32, 1).unsqueeze(
        -1
    )
    assert (weight - stored).square().sum() < 0.9 * (weight - naive).square().sum()
    assert tuple(quantize_blocks(torch.randn(4, 30), 32)[1].shape) == (4, 1)
    assert tuple(quantize_blocks(torch.randn(4, 33), 32)[1].shape) == (4, 3)


# Compressed packages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["iOS16", "iOS17", "iOS18"])
@pytest.mark.parametrize("word", ["p2", "p4", "p6", "p8"])
def test_palettes_hold_the_nearest_of_a_few_numbers(word: str, system: str, student: Student, tmp_path: Path) -> None:
    options = CoreMLOptions(minimum_deployment_target=system)
    path = tmp_path / "model.mlpackage"
    EXPORTER.write(student, path, word, options)
    bits = int(word[1])
    stored = weights_of(path)
    assert "constexpr_lut_to_dense" in operators(path)
    wanted = {str(tuple(p.shape)): p.detach().numpy() for p in net().parameters() if p.numel() >= 2048}
    assert len(wanted) == 2
    for shape, weight in wanted.items():
        groups = group_count(torch.Size(weight.shape), bits, 16) if system == "iOS18" else 1
        assert (groups > 1) == (system == "iOS18" and not (word == "p8" and weight.ndim == 2))
        rows = stored[shape].reshape(groups, -1)
        assert all(len(np.unique(row)) <= 2**bits for row in rows)
        error = np.sqrt(((stored[shape] - weight) ** 2).mean() / (weight**2).mean())
        assert error < {2: 0.36, 4: 0.11, 6: 0.04, 8: 0.02}[bits]
    runner = EXPORTER.load(path)
    program = run_program(student.program, SAMPLES)["linear_1"]
    outputs = np.concatenate([runner({"image": SAMPLES["image"][i : i + 1]})["linear_1"] for i in range(6)])
    assert np.abs(outputs - program).max() < {2: 0.6, 4: 0.2, 6: 0.1, 8: 0.05}[bits]
    dense = sum(w.size for w in wanted.values())
    rest = sum(p.numel() for p in net().parameters() if p.numel() < 2048)
    assert (path / WEIGHTS).stat().st_size < dense * bits / 8 * 1.35 + rest * 4 + 4096


def test_int4_is_stored_in_half_a_byte_with_a_scale_for_each_block(student: Student, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    EXPORTER.write(student, path, "w4", CoreMLOptions(minimum_deployment_target="iOS18"))
    assert "constexpr_blockwise_shift_scale" in operators(path)
    for shape, stored in weights_of(path).items():
        weight = next(p.detach() for p in net().parameters() if str(tuple(p.shape)) == shape)
        if weight.numel() >= 2048:
            data, scales = quantize_blocks(weight, 32)
            spread = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
            np.testing.assert_array_equal(stored, (data.float() * spread).numpy())
    assert (path / WEIGHTS).stat().st_size < 48 * 32 * 9 // 2 + 48 * 64 // 2 + 10_000


@pytest.mark.parametrize(
    ("word", "system", "operator"),
    [
        ("fp32", "iOS16", "constexpr_sparse_to_dense"),
        ("fp16", "iOS17", "constexpr_sparse_to_dense"),
        ("fp32", "iOS18", "constexpr_sparse_to_dense"),
        ("p4", "iOS18", "constexpr_lut_to_sparse"),
        ("w4", "iOS18", "constexpr_sparse_blockwise_shift_scale"),
        ("w8", "iOS18", "constexpr_sparse_blockwise_shift_scale"),
    ],
)
def test_sparse_weights_are_the_same_numbers_in_less_room(
    word: str, system: str, operator: str, pruned: Student, tmp_path: Path
) -> None:
    source = compress(pruned, "w8", SAMPLES) if word == "w8" else pruned
    sizes, found = [], []
    for sparse in (False, True):
        path = tmp_path / f"{sparse}.mlpackage"
        options = CoreMLOptions(minimum_deployment_target=system, sparse=sparse)
        EXPORTER.write(source, path, word, options)
        sizes.append((path / WEIGHTS).stat().st_size)
        found.append(weights_of(path))
    assert operator in operators(path)
    assert sizes[1] < (0.55 if word in ("fp32", "fp16", "w8") else 0.75) * sizes[0]
    for shape, dense in found[0].items():
        if word in ("p4",):  # a palette without zero among its numbers is a better one
            weight = next(p.detach().numpy() for p in net(0.75).parameters() if str(tuple(p.shape)) == shape)
            assert ((found[1][shape] - weight) ** 2).sum() <= ((dense - weight) ** 2).sum() * 1.01
            assert ((weight == 0) <= (found[1][shape] == 0)).all()
        else:
            np.testing.assert_array_equal(found[1][shape], dense)


def test_sparse_needs_zeros(student: Student, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no weight of the program has enough zeros to leave out; prune it first"):
        EXPORTER.write(student, tmp_path / "model.mlpackage", "fp32", CoreMLOptions(sparse=True))
    assert not (tmp_path / "model.mlpackage").exists()


def test_the_weight_file_is_one_that_apple_reads(student: Student, tmp_path: Path) -> None:
    import coremltools as ct

    path = tmp_path / "model.mlpackage"
    EXPORTER.write(student, path, "p4", CoreMLOptions(minimum_deployment_target="iOS18"))
    model = ct.models.MLModel(str(path), skip_model_load=True)
    dense = ct.optimize.coreml.decompress_weights(model)  # reads it with Apple's library and its own definition
    dense.save(str(tmp_path / "dense.mlpackage"))
    ours, theirs = weights_of(path), weights_of(tmp_path / "dense.mlpackage")
    assert set(ours) == set(theirs)
    for shape, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[shape])


@pytest.mark.parametrize("system", ["iOS15", "iOS16", "iOS17", "iOS18"])
def test_every_system_gets_its_own_operator_set(system: str, student: Student, tmp_path: Path) -> None:
    words = ["fp32", "fp16", "w8", "w8a8", "p4", "w4"]
    since = dict(zip(words, [15, 15, 17, 17, 16, 18], strict=True))
    options = CoreMLOptions(minimum_deployment_target=system)
    for word in words:
        path = tmp_path / f"{word}.mlpackage"
        source = compress(student, word, SAMPLES) if word in ("w8", "w8a8") else student
        if since[word] > int(system[3:]):
            with pytest.raises(UsageError, match=f"coreml {word} needs iOS{since[word]}; .* is {system}"):
                EXPORTER.write(source, path, word, options)
            continue
        EXPORTER.write(source, path, word, options)
        program = load(path)  # which refuses operators of a later set
        assert program.opset == f"CoreML{int(system[3:]) - 10}"
        expected = run_program(source.program, SAMPLES)["linear_1"][:1]
        found = EXPORTER.load(path)({"image": SAMPLES["image"][:1]})["linear_1"]
        np.testing.assert_allclose(found, expected, atol=0.2 if word in ("p4", "w4") else 1e-2)


# Images, labels, shapes ----------------------------------------------------------------------------------------------

PREPARED = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "channels": "RGB"}


def test_an_image_is_prepared_in_the_package_exactly_by_channel(tmp_path: Path) -> None:
    import coremltools as ct

    student = student_of(net(), torch.zeros(1, 3, 12, 12), labels=LABELS, preprocessing=PREPARED)
    raw = np.random.default_rng(0).integers(0, 256, (4, 3, 12, 12)).astype(np.float64)
    mean, std = (np.array(PREPARED[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    samples = {"image": ((raw / 255 - mean) / std).astype(np.float32)}
    options = CoreMLOptions(image=True, classifier=True)
    np.testing.assert_allclose(pixels(student).of(samples["image"]), raw, atol=1e-4)
    artifact = export_student(student, {}, "coreml", "fp32", tmp_path / "artifact", Proof(samples), options=options)
    assert artifact.parity.status == "passed"
    assert artifact.parity.max_abs is not None
    assert artifact.parity.max_abs < 1e-5
    path = tmp_path / "artifact" / "model.mlpackage"
    description = ct.models.MLModel(str(path), skip_model_load=True).get_spec().description
    image = description.input[0].type.imageType
    assert (image.width, image.height, image.colorSpace) == (12, 12, 20)  # RGB
    outputs = load(path)({"image": raw[:1].astype(np.float32)})
    with torch.no_grad():
        wanted = torch.softmax(net()(torch.from_numpy(samples["image"][:1])), -1).numpy()
    np.testing.assert_allclose(outputs["classLabel_probs"], wanted[0], atol=1e-5)
    assert outputs["classLabel"].tolist() == [LABELS[int(wanted.argmax())]]
    assert verify_artifact(tmp_path / "artifact", student, Proof(samples)).parity.status == "passed"


def test_grey_images_and_hugging_face_names_are_known() -> None:
    grey = student_of(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8), preprocessing={"scale": 1, "mean": 2, "std": [4]})
    assert pixels(grey).layout == "GRAYSCALE"
    assert (pixels(grey).mean, pixels(grey).std) == ((2.0,), (4.0,))
    told = {"rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    assert pixels(student_of(nn.Conv2d(3, 2, 3), torch.zeros(1, 3, 8, 8), preprocessing=told)).mean == (0.5, 0.5, 0.5)


def test_what_an_image_or_a_classifier_lacks_is_named(student: Student, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    with pytest.raises(UsageError, match=r"takes scale, mean and std .* from the card's preprocessing; it has nothing"):
        EXPORTER.write(student, path, "fp32", CoreMLOptions(image=True))
    text = student_of(nn.Linear(4, 2), torch.zeros(1, 4))
    with pytest.raises(UsageError, match=r"takes one float32 input .*; there is input \(-1, 4\)"):
        EXPORTER.write(text, path, "fp32", CoreMLOptions(image=True))
    with pytest.raises(UsageError, match="takes the labels from the card; it has none"):
        EXPORTER.write(text, path, "fp32", CoreMLOptions(classifier=True))
    short = student_of(net(), torch.zeros(1, 3, 12, 12), labels=LABELS[:3])
    with pytest.raises(UsageError, match=r"takes one output \(batch, 3\) of logits"):
        EXPORTER.write(short, path, "fp32", CoreMLOptions(classifier=True))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.features(x))
        return {"features": features, "logits": self.classes(features)}


def test_a_classifier_keeps_the_other_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = student_of(TwoHeads(), torch.zeros(1, 6))
    outputs = tuple(
        type(s)(s.name, s.shape, s.dtype, "logits" if s.shape[1] == 3 else "features") for s in student.card.outputs
    )
    student = Student(student.program, Card("two", student.card.inputs, outputs, ("a", "b", "c")))
    samples = {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)}
    options = CoreMLOptions(classifier=True)
    artifact = export_student(student, {}, "coreml", "fp32", tmp_path / "artifact", Proof(samples), options=options)
    assert artifact.parity.status == "passed"
    assert [(s.name, s.shape) for s in artifact.outputs] == [(s.name, (1, *s.shape[1:])) for s in outputs]


@pytest.mark.parametrize(("batch", "taken", "refused"), [("1,4", (1, 4), 2), ("1..8", (1, 3, 8), 9), ("3", (3,), 1)])
def test_batches_of_several_sizes_are_taken(
    batch: str, taken: tuple[int, ...], refused: int, student: Student, tmp_path: Path
) -> None:
    options = CoreMLOptions(batch=batch)
    artifact = export_student(student, {}, "coreml", "fp32", tmp_path / "a", Proof(SAMPLES), options=options)
    assert artifact.parity.status == "passed"
    assert artifact.parity.samples == 6
    program = load(tmp_path / "a" / "model.mlpackage")
    data = np.concatenate([SAMPLES["image"]] * 2)
    wanted = run_program(student.program, {"image": data})["linear_1"]
    for size in taken:
        np.testing.assert_allclose(program({"image": data[:size]})["linear_1"], wanted[:size], atol=1e-5)
    with pytest.raises(DataError, match="the data is"):
        program({"image": data[:refused]})


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(256, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + F.scaled_dot_product_attention(x, self.mix(x), x)
        return self.head(x.mean(1))


def opened(module: nn.Module, *inputs: Tensor, axis: int, **card: Any) -> Student:
    """A student with an open batch and one more open axis; its output holds logits."""
    axes = {0: torch.export.Dim("batch", max=64), axis: torch.export.Dim("length", min=4, max=64)}
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=(axes,), strict=False)
    outputs = tuple(type(s)(s.name, s.shape, s.dtype, "logits") for s in output_specs(program))
    return Student(program, Card(type(module).__name__, input_specs(program), outputs, **card))


@pytest.fixture(scope="module")
def tokens() -> Student:
    torch.manual_seed(0)
    return opened(Tokens(), torch.zeros(2, 6, dtype=torch.int64), axis=1, labels=LABELS[:3])


@pytest.mark.parametrize(("length", "batch"), [("4,8,16", "1"), ("4..32", "1"), ("4..32", "1..4")])
def test_sequences_of_several_lengths_are_taken(length: str, batch: str, tokens: Student, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    EXPORTER.write(tokens, path, "fp32", CoreMLOptions(length=length, batch=batch))
    loaded = load(path)
    for size in (4, 8, 16):
        ids = np.random.default_rng(size).integers(0, 256, (3 if batch == "1..4" else 1, size))
        (wanted,) = run_program(tokens.program, {"ids": ids}).values()
        np.testing.assert_allclose(loaded({"ids": ids})[loaded.outputs[0].name], wanted, atol=1e-5)
    with pytest.raises(DataError, match="takes"):
        loaded({"ids": np.zeros((1, 64), np.int64)})
    with pytest.raises(UsageError, match=r"axis 1 of input 'ids' \(-1, -1\) is open; set length"):
        EXPORTER.write(tokens, path, "fp32", CoreMLOptions(batch="1,2"))


@pytest.mark.parametrize(
    ("word", "told", "nearness"),
    [
        ("fp16", {}, 2e-3),
        ("w8", {}, 1e-6),
        ("w8", {"half": True, "classifier": True}, 2e-3),
        ("w8a8", {"classifier": True}, 1e-6),
        ("p8", {"half": True}, 2e-2),
    ],
)
def test_every_precision_takes_several_lengths_and_gives_labels(
    word: str, told: dict[str, Any], nearness: float, tokens: Student, tmp_path: Path
) -> None:
    samples = {"ids": np.random.default_rng(0).integers(0, 256, (6, 8))}
    student = compress(tokens, word, samples) if word in ("w8", "w8a8") else tokens
    options = CoreMLOptions(length="4..32", **told)
    artifact = export_student(student, {}, "coreml", word, tmp_path / "a", Proof(samples), options=options)
    assert artifact.parity.status == "passed"
    program = load(tmp_path / "a" / "model.mlpackage")
    for size in (4, 9, 32):  # of which none is the length of the proof
        ids = np.random.default_rng(size).integers(0, 256, (1, size))
        (wanted,) = run_program(student.program, {"ids": ids}).values()
        found = program({"ids": ids})
        if "classLabel" in found:
            assert found.pop("classLabel").tolist() == [LABELS[int(wanted.argmax())]]
            wanted = torch.softmax(torch.from_numpy(wanted), -1).numpy()[0]
        np.testing.assert_allclose(next(iter(found.values())), wanted, atol=nearness)
    assert program.inputs[0].dtype == "int32"


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classes = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.classes(F.relu(self.convolution(image)).mean((2, 3)))


@pytest.mark.parametrize("word", ["fp16", "w8", "w8a8"])
@pytest.mark.parametrize("length", ["8,16", "8..32"])
def test_images_of_several_widths_are_taken_and_labelled(word: str, length: str, tmp_path: Path) -> None:
    import coremltools as ct

    torch.manual_seed(0)
    student = opened(Pictures(), torch.zeros(2, 3, 12, 14), axis=3, labels=LABELS, preprocessing=PREPARED)
    samples = {"image": np.random.default_rng(0).standard_normal((6, 3, 12, 16)).astype(np.float32)}
    if word != "fp16":
        student = compress(student, word, samples)
    options = CoreMLOptions(length=length, image=True, classifier=True)
    artifact = export_student(student, {}, "coreml", word, tmp_path / "a", Proof(samples), options=options)
    assert artifact.parity.status == "passed"
    path = tmp_path / "a" / "model.mlpackage"
    narrow = samples["image"][:1, :, :, :8]
    (logits,) = run_program(student.program, {"image": narrow}).values()
    found = load(path)({"image": pixels(student).of(narrow)})
    np.testing.assert_allclose(
        found["classLabel_probs"], torch.softmax(torch.from_numpy(logits), -1).numpy()[0], atol=2e-3
    )
    image = ct.models.MLModel(str(path), skip_model_load=True).get_spec().description.input[0].type.imageType
    widths = [size.width for size in image.enumeratedSizes.sizes] or [
        image.imageSizeRange.widthRange.lowerBound,
        image.imageSizeRange.widthRange.upperBound,
    ]
    assert widths == ([8, 16] if "," in length else [8, 32])


@pytest.mark.parametrize("told", [{"batch": "1,4"}, {"batch": "1..4"}])
def test_half_precision_takes_single_inputs_also_where_the_batch_is_open(
    told: dict[str, Any], student: Student, tmp_path: Path
) -> None:
    EXPORTER.write(student, tmp_path / "model.mlpackage", "fp16", CoreMLOptions(**told))
    program = load(tmp_path / "model.mlpackage")
    assert [spec.dtype for spec in (*program.inputs, *program.outputs)] == ["float32", "float32"]


def test_shapes_that_the_program_does_not_have_are_refused(tmp_path: Path) -> None:
    fixed = torch.export.export(net(), (torch.zeros(1, 3, 12, 12),), strict=False)
    student = Student(fixed, Card("net", input_specs(fixed), output_specs(fixed)))
    path = tmp_path / "model.mlpackage"
    for options, message in (
        (CoreMLOptions(batch="1,4"), "batch=1,4 takes a program with that axis open"),
        (CoreMLOptions(length="8,16"), "length=8,16 takes a program with an open axis"),
        (CoreMLOptions(batch="many"), "batch='many' is no size"),
        (CoreMLOptions(batch="4..1"), "batch='4..1' is no size"),
    ):
        with pytest.raises(UsageError, match=message):
            EXPORTER.write(student, path, "fp32", options)


# States --------------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """One token at a time over a cache of the last eight keys and values."""

    keys: Tensor
    values: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.head = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 8, 16))
        self.register_buffer("seen", torch.zeros(1, 1, 8))

    def forward(self, token: Tensor) -> Tensor:
        q, k, v = self.qkv(self.table(token)).chunk(3, -1)
        self.keys.copy_(torch.cat([self.keys[:, 1:], k], 1))
        self.values.copy_(torch.cat([self.values[:, 1:], v], 1))
        self.seen.copy_(torch.cat([self.seen[:, :, 1:], torch.ones(1, 1, 1)], 2))
        scores = (q @ self.keys.mT) / 4 - (1 - self.seen) * 1e4
        return self.head(torch.softmax(scores, -1) @ self.values)


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


@pytest.fixture(scope="module")
def stateful() -> Student:
    program = torch.export.export(decoder(), (torch.zeros(1, 1, dtype=torch.int64),), strict=False)
    return Student(program, Card("decoder", input_specs(program), output_specs(program)))


def test_a_cache_becomes_states_that_last_from_call_to_call(stateful: Student, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 20, (12, 1))  # more than the cache holds
    options = CoreMLOptions(minimum_deployment_target="iOS18")
    artifact = export_student(stateful, {}, "coreml", "fp16", tmp_path / "a", Proof({"token": tokens}), options=options)
    assert artifact.parity.status == "passed"
    assert artifact.parity.samples == 12
    program = load(tmp_path / "a" / "model.mlpackage")
    assert set(program.states) == {"keys", "values", "seen"}
    assert [spec.name for spec in program.inputs] == ["token"]
    reference, state = decoder(), program.make_state()
    name = program.outputs[0].name
    for token in tokens:
        found = program({"token": token[None]}, state)[name]
        np.testing.assert_allclose(found, reference(torch.from_numpy(token[None])).detach().numpy(), atol=5e-3)
    np.testing.assert_allclose(state["keys"].value.numpy(), reference.keys.detach().numpy(), atol=5e-3)
    forgetful = program({"token": tokens[-1:]})[name]
    assert np.abs(forgetful - found).max() > 0.05  # without the cache it is another answer


def test_states_that_core_ml_cannot_hold_are_refused(stateful: Student, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    with pytest.raises(UsageError, match=r"from call to call, which needs iOS18; .* is iOS17"):
        EXPORTER.write(stateful, path, "fp16")
    with pytest.raises(UsageError, match="in half precision; ask for fp16"):
        EXPORTER.write(stateful, path, "fp32", CoreMLOptions(minimum_deployment_target="iOS18"))
    started = decoder()
    started.keys.fill_(1.0)
    program = torch.export.export(started, (torch.zeros(1, 1, dtype=torch.int64),), strict=False)
    student = Student(program, Card("decoder", input_specs(program), output_specs(program)))
    with pytest.raises(UsageError, match="state 'keys' does not start at zero"):
        EXPORTER.write(student, path, "fp16", CoreMLOptions(minimum_deployment_target="iOS18"))


# The same bytes ------------------------------------------------------------------------------------------------------


def test_every_option_gives_the_same_bytes_in_another_process(
    student: Student, pruned: Student, stateful: Student, tmp_path: Path
) -> None:
    prepared = student_of(net(), torch.zeros(1, 3, 12, 12), labels=LABELS, preprocessing=PREPARED)
    cases: dict[str, tuple[Student, str, dict[str, Any]]] = {
        "palette": (student, "p4", {"minimum_deployment_target": "iOS18"}),
        "small palette": (student, "p2", {}),
        "middle palette": (student, "p6", {"minimum_deployment_target": "iOS18"}),
        "large palette": (student, "p8", {"minimum_deployment_target": "iOS16"}),
        "blocks": (student, "w4", {"minimum_deployment_target": "iOS18", "half": True}),
        "sparse": (pruned, "p4", {"minimum_deployment_target": "iOS18", "sparse": True}),
        "image": (prepared, "fp16", {"image": True, "classifier": True}),
        "shapes": (student, "fp32", {"batch": "1,4"}),
        "states": (stateful, "fp16", {"minimum_deployment_target": "iOS18"}),
    }
    for name, (source, _, _) in cases.items():
        (tmp_path / f"{name}.pt2").write_bytes(program_bytes(source.program))
        (tmp_path / f"{name}.json").write_text(json.dumps(source.card.to_json()))
    (tmp_path / "cases.json").write_text(json.dumps({name: case[1:] for name, case in cases.items()}))
    script = (
        "import json, pathlib, sys\n"
        "from edgekd.exporters.coreml import EXPORTER\n"
        "from edgekd.programs.models import load_program\n"
        "from edgekd.types import Card, Student\n"
        "folder, out = (pathlib.Path(a) for a in sys.argv[1:])\n"
        "for name, (word, options) in json.loads((folder / 'cases.json').read_text()).items():\n"
        "    card = Card.from_json(json.loads((folder / f'{name}.json').read_text()))\n"
        "    student = Student(load_program(folder / f'{name}.pt2'), card)\n"
        "    EXPORTER.write(student, out / f'{name}.mlpackage', word, EXPORTER.options(**options))\n"
    )
    for name, (source, word, told) in cases.items():
        EXPORTER.write(source, tmp_path / "here" / f"{name}.mlpackage", word, EXPORTER.options(**told))
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr, run.stdout) == (0, "", "")
    files = sorted(p.relative_to(tmp_path / "here") for p in (tmp_path / "here").rglob("*") if p.is_file())
    assert len(files) == 3 * len(cases)
    for file in files:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
