"""Fashion-MNIST (Xiao et al. 2017): the data, the teacher, the student and the augmentation that edgekd.toml names."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

HERE = Path(__file__).parent
DATA = Path("/usr/share/datasets/fashion-mnist")
WEIGHTS = HERE / "teacher.safetensors"
VALIDATION_SAMPLES = 5_000


def train() -> dict[str, np.ndarray]:
    """The first 55,000 training images; the teacher is trained on the same ones."""
    return _read("train", slice(None, -VALIDATION_SAMPLES))


def validation() -> dict[str, np.ndarray]:
    """The last 5,000 training images: settings are chosen on these, never on the test images."""
    return _read("train", slice(-VALIDATION_SAMPLES, None))


def test() -> dict[str, np.ndarray]:
    """The 10,000 test images."""
    return _read("t10k", slice(None))


def _read(prefix: str, part: slice) -> dict[str, np.ndarray]:
    images = read_idx(DATA / f"{prefix}-images-idx3-ubyte.gz")[part]
    labels = read_idx(DATA / f"{prefix}-labels-idx1-ubyte.gz")[part]
    return {"image": images[:, None].astype(np.float32) / 255, "label": labels.astype(np.int64)}


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, 8 (unsigned byte), the number of axes, each size in 4 bytes, then the values.

    Raises:
        FileNotFoundError: The data set is not installed; the message has the line that installs it.
        ValueError: The file is of another format, or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; Debian has it: apt-get install dataset-fashion-mnist")
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex()}")
    axes = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes)
    if values.size != shape.prod():
        raise ValueError(f"{path} holds {values.size} values; its header says {tuple(shape.tolist())}")
    return values.reshape(shape)


def augment(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Shift by up to two pixels each way, and mirror half of the time; image (1, 28, 28)."""
    down, right, mirror = torch.randint(0, 10, (3,), generator=generator).tolist()
    image = sample["image"]
    image = nn.functional.pad(image, (2, 2, 2, 2))[:, down % 5 : down % 5 + 28, right % 5 : right % 5 + 28]
    return {"image": image.flip(2) if mirror % 2 else image}


def nudge(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Shift by up to one pixel each way: for students that keep places, and have few epochs to learn them."""
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    padded = nn.functional.pad(sample["image"], (1, 1, 1, 1))
    return {"image": padded[:, down : down + 28, right : right + 28]}


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: folds to a single fused operator in all three targets."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(features + self.norm(self.second(self.first(features))))


class Teacher(nn.Module):
    """A small ResNet: 760,298 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, 32),  # 28×28
            convolution(32, 64, stride=2),  # 14×14
            Residual(64),
            convolution(64, 128, stride=2),  # 7×7
            Residual(128),
            convolution(128, 256, stride=2),  # 4×4
        )
        self.classifier = nn.Linear(256, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).mean((2, 3)))


class Student(nn.Module):
    """Four convolutions, the first with stride 2 so that no operator works at 28×28: 57,034 parameters at width 1.

    Args:
        width: What all channels are multiplied with.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        first, second, third, fourth = (max(1, round(width * channels)) for channels in (16, 24, 48, 96))
        self.features = nn.Sequential(
            convolution(1, first, kernel=5, stride=2),  # 14×14
            convolution(first, second),
            convolution(second, third, stride=2),  # 7×7
            convolution(third, fourth, stride=2),  # 4×4
        )
        self.classifier = nn.Linear(fourth, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).mean((2, 3)))


class Placed(nn.Module):
    """Convolutions and a classifier that sees where a feature is, since the clothes are centred.

    Args:
        layers: Channels, kernel and stride of each convolution; together they make 4×4 of 28×28.
    """

    def __init__(self, *layers: tuple[int, int, int]) -> None:
        super().__init__()
        inputs = [1, *(channels for channels, _, _ in layers)]
        self.features = nn.Sequential(
            *(convolution(before, *layer) for before, layer in zip(inputs, layers, strict=False))
        )
        self.classifier = nn.Linear(inputs[-1] * 16, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).flatten(1))


def student_15() -> nn.Module:
    """113,418 parameters, 14.9 % of the teacher's; 3.0 M multiply-accumulates, 7 %."""
    layers = ((32, 5, 2), (48, 3, 2), (64, 3, 1), (96, 3, 2))
    return Placed(*layers)


def student_2() -> nn.Module:
    """16,042 parameters, 2.1 % of the teacher's; 0.36 M multiply-accumulates, 0.9 %."""
    return Placed((16, 5, 2), (24, 3, 2), (32, 3, 2))


def student(width: float = 1.0) -> nn.Module:
    """A student to train: 7.5 % of the teacher's parameters, a twentieth of its multiply-accumulates."""
    return Student(width)


def teacher() -> nn.Module:
    """The trained teacher.

    Raises:
        FileNotFoundError: ``train_teacher.py`` was not run yet.
    """
    from safetensors.torch import load_file

    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"no {WEIGHTS}; python train_teacher.py makes it (about 45 minutes on one core)")
    model = Teacher()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
