"""Shared fixtures: tiny real programs, no mocks."""

import pytest
import torch
from torch import nn

from edgekd.models import export_program, input_specs, output_specs
from edgekd.types import Card, Student


@pytest.fixture(scope="session")
def small_convnet() -> nn.Module:
    """A convnet with everything that compression has to fold or fuse; (batch, 1, 12, 12) to (batch, 5)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8, eps=1e-3),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for _ in range(3):  # running statistics that are not the defaults
        net(torch.randn(16, 1, 12, 12))
    return net.eval()


@pytest.fixture(scope="session")
def convnet_student(small_convnet: nn.Module) -> Student:
    program = export_program(small_convnet, [torch.zeros(1, 1, 12, 12)])
    card = Card("convnet", input_specs(program), output_specs(program), labels=("a", "b", "c", "d", "e"))
    return Student(program, card)
