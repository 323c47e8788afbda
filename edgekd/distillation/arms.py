"""An arm: what it minimises, how it is trained, and the fingerprint of all that its student depends on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.data.samples import Splits
from edgekd.data.truth import Truth
from edgekd.distillation.embeddings import embedding_objective
from edgekd.distillation.feature_losses import FEATURE_LOSSES, FeatureLoss
from edgekd.distillation.losses import LOSSES, Term, weighted
from edgekd.distillation.train import Objective, TrainingPlan
from edgekd.plugins import load_function
from edgekd.protocols import Loss
from edgekd.recipes.recipe import Mix, Recipe
from edgekd.store import fingerprint
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.sources import fresh_module, module_fingerprint
from edgekd.types import Json

__all__ = ["CONTROL", "arm_inputs", "arms_of", "objective_of", "plan_of", "threads_of"]

CONTROL = "control"


def arms_of(recipe: Recipe, labelled: bool = True) -> tuple[str, ...]:
    """All arms to train; where there are labels, the control is one of them whether it is listed or not."""
    return (*([CONTROL] if labelled else ()), *(arm for arm in dict.fromkeys(recipe.distill.arms) if arm != CONTROL))


def objective_of(recipe: Recipe, arm: str, features: bool = True, labelled: bool = True) -> Objective:
    """What an arm minimises; the control sees labels only.

    Args:
        features: Whether the student gives the arm's features; what compression made has no modules left to listen to.
        labelled: Whether there are labels: a student of embeddings may have none.
    """
    mix = recipe.distill.mix(arm)
    if recipe.teacher.embeds:
        return embedding_objective(_vector_losses(recipe, mix), mix.label_weight if labelled else 0.0)
    terms = _terms(recipe, mix)
    matches = _matches(recipe, arm) if features else []

    def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
        own, said = student.logits, teacher.classes
        parts = weighted(own, said, truth, terms, mix.temperature, mix.label_weight, mix.standardize)
        for match in matches:
            apart = match.loss(student.features[match.name], teacher.features[match.stored])
            parts[match.name] = (1 - mix.label_weight) * match.weight * apart
        return parts

    return objective


def _terms(recipe: Recipe, mix: Mix) -> list[Term]:
    """The losses of a mix over classes, loaded."""
    return [
        Term(name, weight, LOSSES[name] if name in LOSSES else load_function(name, recipe.folder))
        for name, weight in mix.losses.items()
        if name not in recipe.distill.features
    ]


def _vector_losses(recipe: Recipe, mix: Mix) -> dict[str, tuple[float, FeatureLoss]]:
    """The losses of a mix over embeddings, loaded, with their weights."""
    return {name: (weight, _feature_loss(name, recipe)) for name, weight in mix.losses.items()}


def _feature_loss(name: str, recipe: Recipe) -> FeatureLoss:
    return FEATURE_LOSSES[name] if name in FEATURE_LOSSES else load_function(name, recipe.folder)


@dataclass(frozen=True)
class _Match:
    """One feature in a mix: its name, that of the teacher's in the cache, its weight and its loss."""

    name: str
    stored: str
    weight: float
    loss: FeatureLoss


def _matches(recipe: Recipe, arm: str) -> list[_Match]:
    """The features of an arm, their losses loaded."""
    weights = recipe.distill.mix(arm).losses
    return [
        _Match(name, spec.stored, weights[name], _feature_loss(spec.loss, recipe))
        for name, spec in recipe.distill.features_of(arm).items()
    ]


def plan_of(recipe: Recipe, arm: str, seed: int) -> TrainingPlan:
    """How one arm is trained."""
    distill = recipe.distill.for_arm(arm)
    return TrainingPlan(
        epochs=distill.epochs,
        batch_size=distill.batch_size,
        learning_rate=distill.learning_rate,
        weight_decay=distill.weight_decay,
        warmup_share=distill.warmup_share,
        seed=seed,
        views_per_decode=recipe.data.views_per_decode,
        labelled_only=arm == CONTROL,
        precision=distill.precision,
        accumulate=distill.accumulate,
        compile=distill.compile,
        shard=distill.shard,
    )


def threads_of(recipe: Recipe) -> int:
    """Threads that train; another number adds up in another order, so it belongs to the fingerprint."""
    return recipe.distill.threads or os.cpu_count() or 1


def arm_inputs(recipe: Recipe, splits: Splits, arm: str, seed: int, data: Json) -> Json:
    """Everything a trained student depends on: its fingerprint says whether it must be trained again.

    Student and loss go in by what they do, not by their source: a changed comment trains nothing again.

    Args:
        data: Keys of the caches it learns from and is judged on.
    """
    distill, mix = recipe.distill.for_arm(arm), recipe.distill.mix(arm)
    features = {
        match.name: [
            match.stored,
            match.weight,
            recipe.distill.features[match.name].student,
            _feature_loss_fingerprint(match.loss),
        ]
        for match in _matches(recipe, arm)
    }
    return {
        **({"features": features} if features else {}),
        "arm": arm,
        "seed": seed,
        "student": _student_fingerprint(recipe, splits, seed),
        "losses": _losses_told(recipe, mix, len(splits.labels)),
        "standardize": mix.standardize,
        "data": data,
        "temperature": mix.temperature,
        "label_weight": mix.label_weight,
        "epochs": distill.epochs,
        "batch_size": distill.batch_size,
        "learning_rate": distill.learning_rate,
        "weight_decay": distill.weight_decay,
        "warmup_share": distill.warmup_share,
        "views_per_decode": recipe.data.views_per_decode,
        "threads": threads_of(recipe),
        **{name: getattr(distill, name) for name, usual in _HOW.items() if getattr(distill, name) != usual},
        "torch": torch.__version__,
    }


def _losses_told(recipe: Recipe, mix: Mix, classes: int) -> Json:
    """Of a mix, by what they do; the user's own may want as many classes as there are."""
    if recipe.teacher.embeds:
        vectors = _vector_losses(recipe, mix)
        return {name: [weight, _feature_loss_fingerprint(loss)] for name, (weight, loss) in vectors.items()}
    return {
        term.name: [term.weight, _loss_fingerprint(term.loss, 5 if term.name in LOSSES else classes or 5)]
        for term in _terms(recipe, mix)
    }


_HOW = {"precision": "fp32", "accumulate": 1, "compile": False}
"""How a student is trained; what is as usual is left out, so that students trained before it could be said stay."""


def _student_fingerprint(recipe: Recipe, splits: Splits, seed: int) -> str:
    """Of a fresh student: its layers, its first weights, and what it makes of two samples."""
    module = fresh_module(recipe, seed)
    with torch.no_grad():
        outputs = module.eval()(*splits.example())
    values = outputs.numpy().tobytes() if isinstance(outputs, Tensor) else b""
    return fingerprint([repr(module), module_fingerprint(module), hashlib.sha256(values).hexdigest()])


def _loss_fingerprint(loss: Loss, classes: int) -> str:
    """Of a loss: its values on fixed logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, classes, generator=generator)
    labels = torch.arange(8) % classes
    return fingerprint([float(loss(student, teacher, labels, temperature)) for temperature in (1.0, 4.0)])


def _feature_loss_fingerprint(loss: FeatureLoss) -> str:
    """The same, on fixed features."""
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    return fingerprint(float(loss(student, teacher)))
