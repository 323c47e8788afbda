"""scikit-learn's digits, 8×8 grey images of 10 classes: what edgekd.toml names, all of it trained in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

WEIGHTS = Path(__file__).parent / "teacher.safetensors"
TEST_SAMPLES = 500


def train() -> dict[str, np.ndarray]:
    """1,297 images, (samples, 1, 8, 8) from 0 to 1, and their digits."""
    return _split(test_part=False)


def test() -> dict[str, np.ndarray]:
    """The 500 others; every digit has its share in both."""
    return _split(test_part=True)


def _split(test_part: bool) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = np.arange(len(digits.target))
    parts = train_test_split(indices, test_size=TEST_SAMPLES, random_state=0, stratify=digits.target)
    chosen = np.sort(parts[1] if test_part else parts[0])
    images = digits.images[chosen, None].astype(np.float32) / 16
    return {"image": images, "label": digits.target[chosen].astype(np.int64)}


def augment(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Shift by up to one pixel each way; image (1, 8, 8)."""
    down, right = torch.randint(0, 3, (2,), generator=generator).tolist()
    padded = nn.functional.pad(sample["image"], (1, 1, 1, 1))
    return {"image": padded[:, down : down + 8, right : right + 8]}


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: folds to a single fused operator in all three targets."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Classifier(nn.Module):
    """Three convolutions, the mean over all places, one linear layer.

    Args:
        channels: Of the three convolutions.
    """

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = channels
        self.features = nn.Sequential(
            convolution(1, first), convolution(first, second, stride=2), convolution(second, third)
        )
        self.classifier = nn.Linear(third, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).mean((2, 3)))


def student(width: float = 1.0) -> nn.Module:
    """A student with a tenth of the teacher's parameters, at width 1."""
    first, second, third = (max(1, round(width * channels)) for channels in (8, 24, 32))
    return Classifier((first, second, third))


def teacher() -> nn.Module:
    """The teacher: loaded from teacher.safetensors beside this file, or trained and saved there."""
    from safetensors.torch import load_file, save_file

    model = Classifier((32, 64, 128))
    if WEIGHTS.is_file():
        model.load_state_dict(load_file(WEIGHTS))
    else:
        train_teacher(model)
        partial = WEIGHTS.with_suffix(".partial")
        save_file(model.state_dict(), partial)
        partial.replace(WEIGHTS)  # so a kill never leaves half a file under the name
    return model.eval()


def train_teacher(model: nn.Module, epochs: int = 20, batch: int = 64, seed: int = 0) -> None:
    """Cross-entropy on shifted images, one cycle of the learning rate; the same seed gives the same weights."""
    data = train()
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    generator = Generator().manual_seed(seed)
    for parameter in model.parameters():  # PyTorch's own initialisation reads the global generator
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = -(-len(images) // batch) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch):
            views = torch.stack([augment({"image": image}, generator)["image"] for image in images[rows]])
            loss = nn.functional.cross_entropy(model(views), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
