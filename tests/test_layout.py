"""Channels last while a student trains: the same function, faster; and students that cannot stay as they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekd.distillation.train
from edgekd.console import SilentProgress
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.truth import Truth
from edgekd.data.views import Views
from edgekd.distillation.layout import lay_channels_last
from edgekd.distillation.train import TrainingPlan, train
from edgekd.teachers.capture import capture
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.teacher_cache import CaptureKey, TeacherCache
from edgekd.teaching import Answer, Teacher

PLAN = TrainingPlan(epochs=2, batch_size=16, learning_rate=1e-2, weight_decay=1e-4, warmup_share=0.1, seed=3)


class Convolutions(nn.Module):
    """Convolution, batch norm, dropout; and a flattening that takes any strides, or one that does not."""

    def __init__(self, by_view: bool, dropout: float) -> None:
        super().__init__()
        self.by_view = by_view
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.Conv2d(8, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.classifier = nn.Linear(8 * 16, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.features(image)
        return self.classifier(x.view(len(x), -1) if self.by_view else x.flatten(1))


def convolutions(by_view: bool = False, dropout: float = 0.2) -> Convolutions:
    torch.manual_seed(0)
    return Convolutions(by_view, dropout)


def is_channels_last(student: Convolutions) -> bool:
    return all(
        weight.is_contiguous(memory_format=torch.channels_last) for weight in student.parameters() if weight.ndim == 4
    )


@pytest.fixture
def material(tmp_path: Path) -> tuple[Split, TeacherCache]:
    image = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)
    split = split_from_arrays({"image": image, "label": (image.mean((1, 2, 3)) > 0).astype(int)}, labels=("no", "yes"))
    teacher = Teacher(lambda arrays: Answer(arrays["image"][:, 0, 0, :2].copy()), "t", 0, None, 0)
    key = CaptureKey("t", "d", "", 1, 0)
    return split, capture(tmp_path / "cache", split, teacher, key, Views(), SilentProgress())


def labels(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
    return {"labels": nn.functional.cross_entropy(student.logits, truth.classes)}


def test_convolutions_train_with_their_channels_last_and_come_back_contiguous(
    tmp_path: Path, material: tuple[Split, TeacherCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, seen = convolutions(dropout=0), []  # which values are dropped depends on the layout
    history = train(
        student, *material, Views(), labels, PLAN, tmp_path / "c.pt", SilentProgress(), "x",
        lambda epoch, means: seen.append(is_channels_last(student)),
    )  # fmt: skip
    monkeypatch.setattr(edgekd.distillation.train, "lay_channels_last", lambda student, inputs: None)
    plain = convolutions(dropout=0)
    expected = train(plain, *material, Views(), labels, PLAN, tmp_path / "p.pt", SilentProgress(), "x")

    assert seen == [True, True]
    assert all(weight.is_contiguous() for weight in student.parameters())
    assert [epoch["loss"] for epoch in history] == pytest.approx([epoch["loss"] for epoch in expected], rel=1e-4)
    torch.testing.assert_close(student.state_dict(), plain.state_dict(), atol=1e-4, rtol=1e-3)


def test_a_student_that_flattens_with_view_trains_as_it_is(
    tmp_path: Path, material: tuple[Split, TeacherCache]
) -> None:
    student = convolutions(by_view=True)
    train(student, *material, Views(), labels, PLAN, tmp_path / "c.pt", SilentProgress(), "x")

    with pytest.raises(RuntimeError, match="view"):
        student.to(memory_format=torch.channels_last)(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("by_view", [False, True])
def test_trying_a_layout_leaves_statistics_gradients_and_random_numbers_alone(by_view: bool) -> None:
    student, untouched = convolutions(by_view), convolutions(by_view)
    state = torch.get_rng_state()
    lay_channels_last(student, [torch.randn(2, 1, 8, 8, generator=torch.Generator())])

    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in student.parameters())
    torch.testing.assert_close(student.state_dict(), untouched.state_dict(), atol=0, rtol=0)
    assert is_channels_last(student) is not by_view


class Stopping(SilentProgress):
    """Ends the work after five steps, as a kill would."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps += steps
        if self.steps == 5:
            raise KeyboardInterrupt


def test_a_broken_off_training_with_channels_last_resumes_bit_for_bit(
    tmp_path: Path, material: tuple[Split, TeacherCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgekd.distillation.train, "CHECKPOINT_EVERY_S", 0.0)
    whole, resumed = convolutions(), convolutions()
    train(whole, *material, Views(), labels, PLAN, tmp_path / "whole.pt", SilentProgress(), "x")
    with pytest.raises(KeyboardInterrupt):
        train(convolutions(), *material, Views(), labels, PLAN, tmp_path / "c.pt", Stopping(), "x")
    train(resumed, *material, Views(), labels, PLAN, tmp_path / "c.pt", SilentProgress(), "x")

    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), atol=0, rtol=0)
