"""A recipe's student in one precision: with the data, the teacher cache and the settings that compression needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import nn

from edgekd.compression.compress import compress
from edgekd.compression.mixed import DEFAULT_MAX_DROP, Budget, mixed_precision
from edgekd.compression.prune import Pruning, prune
from edgekd.distillation.arms import CONTROL, arm_inputs, objective_of, threads_of
from edgekd.distillation.distill import evaluate, judged
from edgekd.distillation.train import TrainingPlan, train
from edgekd.errors import UsageError
from edgekd.metrics import Quality
from edgekd.precisions import WEIGHT_BITS
from edgekd.protocols import Progress
from edgekd.store import fingerprint
from edgekd.types import Json, Precision, Retraining, Student

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.data.split import Split
    from edgekd.distillation.distill import Trained
    from edgekd.stages.workspace import Workspace

__all__ = [
    "DEFAULT_QAT_EPOCHS",
    "Settings",
    "calibration_split",
    "compressed",
    "pruned",
    "settings_of",
    "training_inputs",
]

Fit: TypeAlias = Callable[[nn.Module], None]
"""Trains a module in place."""

DEFAULT_QAT_EPOCHS = 3
QAT_RATE = 0.1
"""Share of the learning rate of distillation with which the quantized student is trained."""
PRUNE_RATE = 0.5
"""The same for a pruned student, which has more to learn again."""


@dataclass(frozen=True)
class Settings:
    """How one precision is made.

    Attributes:
        max_drop: Budget of ``auto``; None for the others.
        qat_epochs: 0 without training; only static activations can be trained.
        qat_learning_rate: Its peak.
    """

    precision: Precision
    max_drop: float | None
    qat_epochs: int
    qat_learning_rate: float


@dataclass(frozen=True)
class Schedule:
    """How long something smaller is trained.

    Attributes:
        method: As the card calls it.
        name: As progress and checkpoints do.
        learning_rate: Its peak.
    """

    method: str
    name: str
    epochs: int
    learning_rate: float


def settings_of(
    work: Workspace, precision: Precision, done: Json, qat: bool | None = None, max_drop: float | None = None
) -> Settings:
    """Settings by who said them last: the call, else the recipe, else the call that made what lies there.

    So ``edgekd compress --qat`` is not undone by the ``edgekd export`` that follows.

    Args:
        done: What the stage was last done with; empty when it never was.
        qat: True to train, False not to, None when the call does not say.
        max_drop: None when the call does not say.
    """
    spec, before = work.recipe.compress, done.get("settings", {})
    epochs = 0
    if precision in WEIGHT_BITS and qat is not False:
        if spec.qat_epochs is not None:
            epochs = spec.qat_epochs or (DEFAULT_QAT_EPOCHS if qat else 0)
        else:
            epochs = DEFAULT_QAT_EPOCHS if qat else before.get("qat_epochs", 0) if qat is None else 0
    drop = None
    if precision == "auto":
        said = [max_drop, spec.max_drop, before.get("max_drop"), DEFAULT_MAX_DROP]
        drop = next(value for value in said if value is not None)
    rate = spec.qat_learning_rate or work.recipe.distill.learning_rate * QAT_RATE
    return Settings(precision, drop, epochs, rate)


def compressed(
    work: Workspace, student: Student, shipped: Trained, settings: Settings, progress: Progress
) -> tuple[Student, Json]:
    """The student in a precision, and the record of how good it is.

    Args:
        student: In ``fp32``.
        shipped: The arm and seed that it came from: a quantized student is trained with the same loss.

    Raises:
        BudgetError: ``auto`` finds no mix within its budget.
        NumericalError: The loss of a training became NaN.
    """
    spec, test = work.recipe.compress, work.splits.test
    calibration = calibration_split(work, spec.samples).arrays()
    if settings.precision == "auto":
        validation = work.splits.validation
        assert settings.max_drop is not None
        budget = Budget(settings.max_drop, validation.arrays(), validation.labels)
        smaller = mixed_precision(student, calibration, budget, spec.observer, spec.corrections, progress.say)
    elif settings.qat_epochs:
        if work.recipe.teacher.embeds:
            raise UsageError("quantization-aware training does not go with a teacher of embeddings yet; --no-qat works")
        return _trained(work, student, shipped, settings, progress)
    else:
        smaller = compress(student, settings.precision, calibration, spec.observer, spec.corrections)
    return smaller, {"test": judged(smaller, test, work.cache("test")).to_json()}


def calibration_split(work: Workspace, samples: int) -> Split:
    """Training samples that set the scales: the first by id, so the choice is random but stable."""
    return work.splits.train.take(np.argsort(work.splits.train.ids)[:samples])


def _trained(
    work: Workspace, student: Student, shipped: Trained, settings: Settings, progress: Progress
) -> tuple[Student, Json]:
    """Quantization-aware training."""
    from edgekd.compression.qat import train_quantized

    spec = work.recipe.compress
    calibration = calibration_split(work, spec.samples).arrays()

    def make(fits: Sequence[Fit]) -> tuple[Student, list[Student]]:
        return train_quantized(student, settings.precision, calibration, fits, spec.observer, spec.corrections)

    schedule = Schedule("qat", f"qat {settings.precision}", settings.qat_epochs, settings.qat_learning_rate)
    return _recovered(work, student, shipped, schedule, vars(settings), make, progress)


def pruned(
    work: Workspace, student: Student, shipped: Trained, pruning: Pruning, progress: Progress
) -> tuple[Student, Json]:
    """The student with fewer weights, trained again under the mask with the loss of the shipped arm.

    Args:
        student, shipped: See :func:`compressed`.

    Returns:
        It, and the record: its quality, without training, and after the same training from labels only.
    """
    epochs = work.recipe.compress.prune_epochs
    if not epochs:
        bare = prune(student, pruning)
        return bare, {"test": evaluate(bare, work.splits.test, work.cache("test")).to_json()}

    def make(fits: Sequence[Fit]) -> tuple[Student, list[Student]]:
        return prune(student, pruning), [prune(student, pruning, fit) for fit in fits]

    rate = work.recipe.distill.learning_rate * PRUNE_RATE
    schedule = Schedule(f"pruning {pruning.word}", f"prune {pruning.word}", epochs, rate)
    return _recovered(work, student, shipped, schedule, pruning.word, make, progress)


def _recovered(
    work: Workspace,
    student: Student,
    shipped: Trained,
    schedule: Schedule,
    inputs: object,
    make: Callable[[Sequence[Fit]], tuple[Student, list[Student]]],
    progress: Progress,
) -> tuple[Student, Json]:
    """A smaller student trained with the loss of the shipped arm and, for comparison, with labels only.

    Args:
        inputs: What the training depends on, besides student and recipe, as JSON.
        make: The smaller student without training, and after each training.
    """
    arms = list(dict.fromkeys((CONTROL, shipped.arm)))
    pairs = [_fit_of(work, arm, shipped.seed, schedule, [student.card.lineage, inputs], progress) for arm in arms]
    bare, trained = make([fit for fit, _ in pairs])
    for _, checkpoint in pairs:
        checkpoint.unlink(missing_ok=True)

    def quality(made: Student) -> Quality:
        return evaluate(made, work.splits.test, work.cache("test"))

    before, after = quality(bare), dict(zip(arms, map(quality, trained), strict=True))
    control = after[CONTROL] if shipped.arm != CONTROL else None
    retraining = Retraining(
        schedule.method,
        shipped.arm,
        schedule.epochs,
        before=before.accuracy,
        after=after[shipped.arm].accuracy,
        control=None if control is None else control.accuracy,
    )
    made = trained[arms.index(shipped.arm)]
    card = replace(made.card, retraining=(*student.card.retraining, retraining))
    record = {"test": after[shipped.arm].to_json(), "before": before.to_json()}
    return Student(made.program, card), record if control is None else record | {"control": control.to_json()}


def training_inputs(work: Workspace, arm: str, seed: int) -> Json:
    """What a training of compression depends on, besides the module and its length."""
    inputs = arm_inputs(work.recipe, work.splits, arm, seed, work.capture_key("train").to_json())
    return {key: value for key, value in inputs.items() if key not in ("epochs", "learning_rate", "student")}


def _fit_of(
    work: Workspace, arm: str, seed: int, schedule: Schedule, inputs: object, progress: Progress
) -> tuple[Fit, Path]:
    """A training of the recipe's kind, for a module that compression made.

    Same data, views, losses and loop as distillation; killed, it goes on from its checkpoint bit for bit.

    Args:
        inputs: What the module depends on, as JSON: a checkpoint of others is not continued.

    Returns:
        The training, and its checkpoint, to be removed when its result is saved.
    """
    distill, cache, views = work.recipe.distill.for_arm(arm), work.cache("train"), work.views_of("train")
    plan = TrainingPlan(
        schedule.epochs,
        distill.batch_size,
        schedule.learning_rate,
        distill.weight_decay,
        distill.warmup_share,
        seed,
        work.recipe.data.views_per_decode,
        labelled_only=arm == CONTROL,
    )
    key = fingerprint([inputs, vars(plan), training_inputs(work, arm, seed)])
    checkpoint = work.folder.checkpoint(f"{schedule.name.replace(' ', '-').replace(':', '.')}-{arm}-{key}", seed)

    def fit(module: nn.Module) -> None:
        torch.set_num_threads(threads_of(work.recipe))  # another number adds up in another order
        objective = objective_of(work.recipe, arm, features=False)
        name = f"{schedule.name} {arm}, seed {seed}"
        if features := distill.features_of(arm):
            progress.say(f"{name}: without {', '.join(features)}; what compression made has no modules to listen to")
        train(module, work.splits.train, cache, views, objective, plan, checkpoint, progress, name)
        module.eval()

    return fit, checkpoint
