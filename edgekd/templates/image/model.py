"""Data, teacher and student of the recipe. The data here are drawn shapes: replace them with your own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

WEIGHTS = Path(__file__).parent / "teacher.safetensors"
SIZE = 16


def train() -> dict[str, np.ndarray]:
    """Inputs by name, in the order of the model's forward, and "label"."""
    return _draw(900, seed=0)


def test() -> dict[str, np.ndarray]:
    return _draw(300, seed=1)


def augment(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """One sample (no batch axis) to one view; all randomness from the generator, so that a view can be replayed."""
    image = sample["image"]
    if torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    return {"image": image}


def teacher() -> nn.Module:
    """Yours would be loaded from its weights; this one is trained in a few seconds and then kept."""
    from safetensors.torch import load_file, save_file

    model = _network(32)
    if WEIGHTS.is_file():
        model.load_state_dict(load_file(WEIGHTS))
        return model.eval()
    torch.manual_seed(0)
    data = train()
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        for rows in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_file(model.state_dict(), WEIGHTS)
    return model.eval()


def student() -> nn.Module:
    """A fresh module that returns logits, (batch, classes)."""
    return _network(10)


def _network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 3),
    )


def _draw(count: int, seed: int) -> dict[str, np.ndarray]:
    """Outlines of circles, squares and triangles at random places and sizes, in noise."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    labels = random.integers(0, 3, count)
    images = random.normal(0, 0.35, (count, 1, SIZE, SIZE)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        y, x = random.uniform(6, SIZE - 6, 2)
        radius = random.uniform(3, 5)
        down, right = rows - y, columns - x
        distance = (
            np.hypot(down, right),
            np.maximum(abs(down), abs(right)),
            np.maximum(down, 2 * abs(right) - down - radius) + radius / 2,
        )[label]
        image[0] += np.exp(-((distance - radius) ** 2)).astype(np.float32)
    return {"image": images, "label": labels.astype(np.int64)}
