"""One step of training, as :mod:`edgekd.benchmarks.distill_speed` times it: the same student three ways."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from edgekd.buffers import buffers_kept
from edgekd.console import SilentProgress
from edgekd.data.order import Order
from edgekd.data.split import Split
from edgekd.data.truth import Truth
from edgekd.data.views import Views, view_batch, view_seeds
from edgekd.distillation.losses import LOSSES, Term, weighted
from edgekd.distillation.train import TrainingPlan, learning_rate_at, train
from edgekd.protocols import Augmentation
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.teacher_cache import TeacherCache

__all__ = [
    "BATCH",
    "STEPS",
    "Case",
    "Network",
    "Samples",
    "Side",
    "Unstacked",
    "augment",
    "cached_step",
    "import_torchdistill",
    "plain_step",
    "stacked",
    "torchdistill_box",
    "torchdistill_step",
]

BATCH, STEPS = 128, 25
TEMPERATURE, LABEL_WEIGHT = 2.0, 0.3


class Network(nn.Module):
    """Four convolutions and a classifier; all channels times ``width``."""

    def __init__(self, inputs: int, classes: int, width: float) -> None:
        super().__init__()
        sizes = [inputs, *(round(size * width) for size in (16, 24, 48, 96))]
        shapes = zip(sizes, sizes[1:], (5, 3, 3, 3), (2, 1, 2, 2), strict=False)
        self.features = nn.Sequential(*(layer for shape in shapes for layer in _layers(*shape)))
        self.classifier = nn.Linear(sizes[-1], classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).mean((2, 3)))


def _layers(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def augment(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Shift by up to two pixels each way, and mirror half of the time."""
    image = sample["image"]
    size = image.shape[-1]
    down, right, mirror = torch.randint(0, 10, (3,), generator=generator).tolist()
    padded = nn.functional.pad(image, (2, 2, 2, 2))
    shifted = padded[:, down % 5 : down % 5 + size, right % 5 : right % 5 + size]
    return {"image": shifted.flip(2) if mirror % 2 else shifted}


@dataclass(frozen=True)
class Case:
    """One student on one kind of data."""

    name: str
    split: Split
    cache: TeacherCache
    classes: int
    teachers: Mapping[str, nn.Module]

    def student(self) -> nn.Module:
        torch.manual_seed(0)
        return Network(self.split.inputs["image"].shape[1], self.classes, 1.0)


PLAN = TrainingPlan(1000, BATCH, 1e-3, 1e-4, 0.1, seed=0)
Side = Callable[[Case], float]
"""CPU seconds of one step, the mean over ``STEPS`` of them; the first step of a training is not timed."""


class _EnoughError(Exception):
    """The steps that are timed are done."""


class _Clock(SilentProgress):
    """A progress that notes the process's CPU time after each step, and ends the training."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.times.append(time.process_time())
        if len(self.times) > STEPS:
            raise _EnoughError

    def seconds(self) -> float:
        return (self.times[STEPS] - self.times[0]) / STEPS


def cached_step(case: Case) -> float:
    """What ``edgekd distill`` does, with all that it logs."""

    def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
        terms = [Term("kd", 1.0, LOSSES["kd"])]
        return weighted(student.logits, teacher.classes, truth, terms, TEMPERATURE, LABEL_WEIGHT)

    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_EnoughError):
        checkpoint = Path(folder) / "c.pt"
        train(case.student(), case.split, case.cache, Views(augment), objective, PLAN, checkpoint, clock, "cache")
    return clock.seconds()


@buffers_kept()
def plain_step(case: Case, layout: torch.memory_format = torch.channels_last) -> float:
    """A loop as one writes it, on the same views; buffers kept and, by default, the channels last, as in edgekd."""
    split, student, clock = case.split, case.student().train().to(memory_format=layout), _Clock()
    optimizer = torch.optim.AdamW(student.parameters(), lr=PLAN.learning_rate, weight_decay=PLAN.weight_decay)
    assert split.labels is not None
    labels, seeds = torch.from_numpy(split.labels), view_seeds(split.ids, np.zeros(len(split)), 0)
    order = Order(np.arange(len(split)), split.ids, 1, 1, 0)
    with contextlib.suppress(_EnoughError):
        for step in range(STEPS + 1):
            batch, _ = order.draws(step * BATCH, (step + 1) * BATCH)
            inputs = view_batch(split, batch, seeds[batch], Views(augment)).inputs
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, 1000, PLAN)
            loss = nn.functional.cross_entropy(student(*inputs), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.advance(note=f"{loss.item():.3f}")
    return clock.seconds()


class Samples(torch.utils.data.Dataset[Any]):
    """Samples and augmentation, as torch's loader takes them; several inputs are one tensor, see :class:`Unstacked`.

    Attributes:
        labels: Classes, (samples,); each sample has one here. Of windows the next tokens, (samples, positions).
    """

    def __init__(self, split: Split, augment: Augmentation | None) -> None:
        assert split.labels is not None
        self.inputs = {name: torch.from_numpy(array) for name, array in split.arrays().items()}
        self.labels = torch.from_numpy(split.labels.copy())
        self.augment, self.generator = augment, Generator()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample: Mapping[str, Tensor] = {name: tensor[index] for name, tensor in self.inputs.items()}
        if self.augment is not None:
            sample = self.augment(sample, self.generator)
        return stacked([sample[name] for name in self.inputs]), self.labels[index]


def stacked(inputs: Sequence[Tensor], axis: int = 0) -> Tensor:
    """The only input as it is; several, of one shape and type, as one."""
    return inputs[0] if len(inputs) == 1 else torch.stack(list(inputs), axis)


class Unstacked(nn.Module):
    """A model of several inputs that takes them as one tensor, (batch, inputs, …): torchdistill hands over no more."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        return self.module(*inputs.unbind(1))


def torchdistill_box(
    teacher: nn.Module,
    student: nn.Module,
    samples: Samples,
    plan: TrainingPlan,
    temperature: float,
    label_weight: float,
) -> Any:
    """KD as torchdistill's examples train: a box, a loader, a teacher at every step.

    Its loss is edgekd's ``kd``: label_weight · cross-entropy + (1 − label_weight) · T² · KL, means over the batch.
    """
    kd = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "temperature": temperature,
        "alpha": label_weight,
    }
    return import_torchdistill()(
        teacher,
        student,
        {"train": samples},
        {
            "num_epochs": plan.epochs,
            "train_data_loader": {
                "dataset_id": "train",
                "sampler": {"class_or_func": torch.utils.data.RandomSampler},
                "kwargs": {"batch_size": plan.batch_size, "num_workers": 0, "drop_last": True},
            },
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "AdamW", "kwargs": {"lr": plan.learning_rate, "weight_decay": plan.weight_decay}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}},
            },
        },
        torch.device("cpu"),
        [],
        False,
        1,
    )


def torchdistill_step(case: Case, teacher: str) -> float:
    """A live teacher's KD; see :func:`torchdistill_box`."""
    samples = Samples(case.split, augment)
    box = torchdistill_box(case.teachers[teacher], case.student(), samples, PLAN, TEMPERATURE, LABEL_WEIGHT)
    clock = _Clock()
    box.pre_epoch_process(epoch=0)
    with contextlib.suppress(_EnoughError):
        while True:
            for images, targets, supplements in box.train_data_loader:
                loss = box.forward_process(images, targets, supplements)
                box.post_forward_process(loss)
                clock.advance(note=f"{loss.item():.3f}")
    return clock.seconds()


def import_torchdistill() -> Any:
    """What makes its box; to be called before anything else looks for torchvision.

    It imports torchvision for models that are not used here; the one for CUDA does not load beside a torch for CPUs
    unless its registrations are kept out.
    """
    import logging

    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    from torchdistill.core.distillation import get_distillation_box

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    return get_distillation_box
