"""A recipe's student in one precision: with the data, the teacher cache and the settings that compression needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from edgekd.compress import WEIGHT_BITS, compress
from edgekd.distill import CONTROL, arm_inputs, evaluate, objective_of, threads_of
from edgekd.metrics import Quality
from edgekd.mixed import DEFAULT_MAX_DROP, Budget, mixed_precision
from edgekd.protocols import Progress
from edgekd.prune import Pruning, prune
from edgekd.store import fingerprint
from edgekd.train import TrainingPlan, train
from edgekd.types import Json, Precision, Retraining, Student

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.data import Split
    from edgekd.distill import ArmResult
    from edgekd.workspace import Workspace

__all__ = [
    "DEFAULT_QAT_EPOCHS",
    "Settings",
    "calibration_split",
    "compressed",
    "fit_of",
    "settings_of",
    "training_inputs",
]

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
    work: Workspace, student: Student, shipped: ArmResult, settings: Settings, progress: Progress
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
        return _trained(work, student, shipped, settings, progress)
    else:
        smaller = compress(student, settings.precision, calibration, spec.observer, spec.corrections)
    return smaller, {"test": evaluate(smaller, test, work.cache("test")).to_json()}


def calibration_split(work: Workspace, samples: int) -> Split:
    """Training samples that set the scales: the first by id, so the choice is random but stable."""
    return work.splits.train.take(np.argsort(work.splits.train.ids)[:samples])


def _trained(
    work: Workspace, student: Student, shipped: ArmResult, settings: Settings, progress: Progress
) -> tuple[Student, Json]:
    """Quantization-aware training with the loss of the shipped arm and, for comparison, with labels only."""
    from edgekd.qat import train_quantized

    spec = work.recipe.compress
    calibration = calibration_split(work, spec.samples).arrays()
    found: dict[str, tuple[Student, Quality]] = {}
    arms = list(dict.fromkeys((CONTROL, shipped.arm)))
    checkpoints = []
    for arm in arms:
        fit, checkpoint = fit_of(
            work,
            arm,
            shipped.seed,
            settings.qat_epochs,
            settings.qat_learning_rate,
            progress,
            f"qat {settings.precision}",
            [student.card.lineage, vars(settings)],
        )
        checkpoints.append(checkpoint)
        static, trained = train_quantized(
            student, settings.precision, calibration, fit, spec.observer, spec.corrections
        )
        for name, made in (("static", static), (arm, trained)):
            found[name] = made, evaluate(made, work.splits.test, work.cache("test"))
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)
    made, quality = found[shipped.arm]
    retraining = Retraining(
        "qat",
        shipped.arm,
        settings.qat_epochs,
        before=found["static"][1].accuracy,
        after=quality.accuracy,
        control=found[CONTROL][1].accuracy if shipped.arm != CONTROL else None,
    )
    card = replace(made.card, retraining=(*student.card.retraining, retraining))
    record = {"test": quality.to_json(), "static": found["static"][1].to_json()}
    if shipped.arm != CONTROL:
        record["control"] = found[CONTROL][1].to_json()
    return Student(made.program, card), record


def pruned(
    work: Workspace, student: Student, shipped: ArmResult, pruning: Pruning, progress: Progress
) -> tuple[Student, Json]:
    """The student with fewer weights, trained again under the mask with the loss of the shipped arm.

    Args:
        student, shipped: See :func:`compressed`.

    Returns:
        It, and the record: its quality, without training, and after the same training from labels only.
    """
    epochs, test = work.recipe.compress.prune_epochs, work.splits.test
    bare = prune(student, pruning)
    before = evaluate(bare, test, work.cache("test"))
    if not epochs:
        return bare, {"test": before.to_json()}
    found: dict[str, tuple[Student, Quality]] = {}
    checkpoints = []
    for arm in dict.fromkeys((CONTROL, shipped.arm)):
        rate = work.recipe.distill.learning_rate * PRUNE_RATE
        what, inputs = f"prune {pruning.word}", [student.card.lineage, pruning.word]
        fit, checkpoint = fit_of(work, arm, shipped.seed, epochs, rate, progress, what, inputs)
        checkpoints.append(checkpoint)
        made = prune(student, pruning, fit)
        found[arm] = made, evaluate(made, test, work.cache("test"))
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)
    made, quality = found[shipped.arm]
    control = found[CONTROL][1].accuracy if shipped.arm != CONTROL else None
    retraining = Retraining(
        f"pruning {pruning.word}", shipped.arm, epochs, before=before.accuracy, after=quality.accuracy, control=control
    )
    card = replace(made.card, retraining=(*student.card.retraining, retraining))
    record = {"test": quality.to_json(), "before": before.to_json()}
    return Student(made.program, card), record


def training_inputs(work: Workspace, arm: str, seed: int) -> Json:
    """What a training of compression depends on, besides the module and its length."""
    inputs = arm_inputs(work.recipe, work.splits, arm, seed, work.capture_key("train").to_json())
    return {key: value for key, value in inputs.items() if key not in ("epochs", "learning_rate", "student")}


def fit_of(
    work: Workspace,
    arm: str,
    seed: int,
    epochs: int,
    learning_rate: float,
    progress: Progress,
    what: str,
    inputs: object,
) -> tuple[Callable[[nn.Module], None], Path]:
    """A training of the recipe's kind, for a module that compression made.

    Same data, views, losses and loop as distillation; killed, it goes on from its checkpoint bit for bit.

    Args:
        inputs: What the module depends on, as JSON: a checkpoint of others is not continued.

    Returns:
        The training, and its checkpoint, to be removed when its result is saved.
    """
    distill, cache = work.recipe.distill, work.cache("train")
    plan = TrainingPlan(epochs, distill.batch_size, learning_rate, distill.weight_decay, distill.warmup_share, seed)
    key = fingerprint([inputs, vars(plan), training_inputs(work, arm, seed)])
    checkpoint = work.folder.checkpoint(f"{what.replace(' ', '-').replace(':', '.')}-{arm}-{key}", seed)

    def fit(module: nn.Module) -> None:
        torch.set_num_threads(threads_of(work.recipe))  # another number adds up in another order
        objective = objective_of(work.recipe, arm)
        name = f"{what} {arm}, seed {seed}"
        train(module, work.splits.train, cache, work.augment, objective, plan, checkpoint, progress, name)
        module.eval()

    return fit, checkpoint
