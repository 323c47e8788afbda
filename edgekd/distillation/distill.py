"""Teacher cache to trained student: every arm, its control, and what each is worth."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import processes
from edgekd.data.samples import Split, Splits
from edgekd.data.truth import Truth
from edgekd.data.views import Views
from edgekd.distillation.embeddings import (
    EMBEDDING,
    Likeness,
    check_embedding,
    embedding_objective,
    likeness,
    with_head,
)
from edgekd.distillation.feature_losses import FEATURE_LOSSES, FeatureLoss
from edgekd.distillation.features import with_features
from edgekd.distillation.losses import LOSSES, Term, weighted
from edgekd.distillation.perplexity import judge_student
from edgekd.distillation.train import Objective, TrainingPlan, train
from edgekd.errors import DataError
from edgekd.metrics import Quality, quality
from edgekd.plugins import load_function
from edgekd.programs.models import count_macs, count_parameters, input_specs, output_specs, run_program
from edgekd.programs.student_files import save_student
from edgekd.programs.tracing import export_program, rename_outputs
from edgekd.protocols import Loss, Progress
from edgekd.recipes.recipe import VECTOR_CODEC, Mix, Recipe
from edgekd.store import RunFolder, fingerprint, read_json
from edgekd.teachers.blocks import started_from
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.sources import load_student_module, module_fingerprint
from edgekd.teachers.teacher_cache import TeacherCache
from edgekd.types import LOGITS, Card, Json, Student

__all__ = [
    "CONTROL",
    "STARTED_FROM",
    "ArmResult",
    "EmbeddingResult",
    "Trained",
    "arm_inputs",
    "arms_of",
    "choose_arm",
    "evaluate",
    "fresh_student",
    "judged",
    "load_embedding_result",
    "load_result",
    "objective_of",
    "plan_of",
    "train_arm",
]

CONTROL = "control"

STARTED_FROM = "student starts from: "
"""Begins the line of a card's lineage that says whose weights a student started from."""


@dataclass(frozen=True)
class EmbeddingResult:
    """One trained student whose output is an embedding; see :class:`ArmResult`."""

    arm: str
    seed: int
    validation: Likeness
    test: Likeness


@dataclass(frozen=True)
class ArmResult:
    """One trained student.

    Attributes:
        arm: ``control``, or the name of the loss.
        validation: For choices.
        test: For reports; no choice looks at it.
    """

    arm: str
    seed: int
    validation: Quality
    test: Quality


Trained = ArmResult | EmbeddingResult


def arms_of(recipe: Recipe, labelled: bool = True) -> tuple[str, ...]:
    """All arms to train; where there are labels, the control is one of them whether it is listed or not."""
    return (*([CONTROL] if labelled else ()), *(arm for arm in dict.fromkeys(recipe.distill.arms) if arm != CONTROL))


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
        "losses": _losses_told(recipe, mix),
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


def _losses_told(recipe: Recipe, mix: Mix) -> Json:
    """Of a mix, by what they do."""
    if recipe.teacher.embeds:
        vectors = _vector_losses(recipe, mix)
        return {name: [weight, _feature_loss_fingerprint(loss)] for name, (weight, loss) in vectors.items()}
    return {term.name: [term.weight, _loss_fingerprint(term.loss)] for term in _terms(recipe, mix)}


_HOW = {"precision": "fp32", "accumulate": 1, "compile": False}
"""How a student is trained; what is as usual is left out, so that students trained before it could be said stay."""


def _student_fingerprint(recipe: Recipe, splits: Splits, seed: int) -> str:
    """Of a fresh student: its layers, its first weights, and what it makes of two samples."""
    module = load_student_module(recipe.student.model, recipe.folder, seed, recipe.student.told, recipe.labels)
    with torch.no_grad():
        outputs = module.eval()(*_example(splits))
    values = outputs.numpy().tobytes() if isinstance(outputs, Tensor) else b""
    return fingerprint([repr(module), module_fingerprint(module), hashlib.sha256(values).hexdigest()])


def _loss_fingerprint(loss: Loss) -> str:
    """Of a loss: its values on fixed logits."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 5, generator=generator)
    labels = torch.arange(8) % 5
    return fingerprint([float(loss(student, teacher, labels, temperature)) for temperature in (1.0, 4.0)])


def _feature_loss_fingerprint(loss: FeatureLoss) -> str:
    """The same, on fixed features."""
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    return fingerprint(float(loss(student, teacher)))


def _example(splits: Splits) -> list[Tensor]:
    """Two samples, or the only one."""
    arrays = splits.train.arrays(np.arange(min(2, len(splits.train))))
    return [torch.from_numpy(array) for array in arrays.values()]


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


def threads_of(recipe: Recipe) -> int:
    """Threads that train; another number adds up in another order, so it belongs to the fingerprint."""
    return recipe.distill.threads or os.cpu_count() or 1


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


def train_arm(
    recipe: Recipe,
    splits: Splits,
    caches: Mapping[str, TeacherCache],
    views: Views,
    arm: str,
    seed: int,
    inputs: Json,
    progress: Progress,
) -> None:
    """Train one arm with one seed, strip it of all that served training, and save it; all processes call this.

    Args:
        caches: Of ``train``, ``validation`` and ``test``.
        views: How those of ``train`` are made.
        inputs: From ``arm_inputs``; a checkpoint of other inputs is not continued.

    Raises:
        DataError: The student's outputs do not fit the teacher's.
        NumericalError: The loss became NaN.
        ModelFileError: The student cannot be exported.
    """
    torch.set_num_threads(max(1, threads_of(recipe) // processes.on_this_machine()))
    folder = RunFolder(recipe.run_folder)
    module, learner = fresh_student(recipe, splits, caches["train"], arm, seed)
    example, start = _example(splits), started_from(module)
    plan = plan_of(recipe, arm, seed)
    name = f"{arm}, seed {seed}"
    checkpoint = folder.checkpoint(f"{arm}-{fingerprint(inputs)}", seed)
    objective = objective_of(recipe, arm, labelled=bool(splits.labels) or caches["train"].positions > 0)
    history = train(learner, splits.train, caches["train"], views, objective, plan, checkpoint, progress, name)
    if not processes.is_main():
        return
    # A program is saved with its weights as they lie, and torch warns of those that lie channels last.
    module.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    meaning = EMBEDDING if recipe.teacher.embeds else LOGITS
    program = rename_outputs(export_program(module, example), [meaning])
    manifest = caches["train"].manifest
    keys = manifest["key"]
    card = Card(
        name=recipe.name,
        inputs=input_specs(program),
        outputs=tuple(replace(spec, meaning=meaning) for spec in output_specs(program)),
        labels=() if recipe.teacher.embeds else splits.labels,
        preprocessing=splits.preprocessing,
        parameters=count_parameters(module),
        macs=count_macs(program),
        lineage=(
            *(manifest.get("teacher") or [f"teacher: {keys['teacher']}"]),
            f"data: {keys['data']}",
            *([f"{STARTED_FROM}{start}"] if start else []),
            f"distill {name}: {fingerprint(inputs)}",
        ),
        assets=tuple(splits.assets),
    )
    student = Student(program, card)
    record = {
        "arm": arm,
        "seed": seed,
        "validation": judged(student, splits.validation, caches["validation"]).to_json(),
        "test": judged(student, splits.test, caches["test"]).to_json(),
        "history": history,
    }
    save_student(folder.arm(arm, seed), student, splits.assets, record)
    checkpoint.unlink(missing_ok=True)


def fresh_student(
    recipe: Recipe, splits: Splits, cache: TeacherCache, arm: str, seed: int
) -> tuple[nn.Module, nn.Module]:
    """A student before it is trained: what is saved in the end, and what is trained, with projectors or a head.

    Args:
        cache: Of the training views.

    Raises:
        DataError: The student's outputs do not fit the teacher's.
    """
    example = _example(splits)
    module = load_student_module(recipe.student.model, recipe.folder, seed, recipe.student.told, recipe.labels)
    output = module.eval()(*example)
    if recipe.teacher.embeds:
        check_embedding(output, cache.classes)
        heard = recipe.distill.mix(arm).label_weight > 0
        return module, with_head(module, cache.classes, len(splits.labels) if heard else 0, seed)
    check_outputs(output, cache.classes, len(splits.labels), cache.positions)
    shapes = {name: shape for name, (_, shape) in cache.features.items()}
    inputs = dict(zip(splits.train.inputs, example, strict=True))
    return module, with_features(module, recipe.distill.features_of(arm), shapes, inputs, seed)


def judged(student: Student, split: Split, cache: TeacherCache) -> Quality | Likeness:
    """A program on samples, beside the teacher: over classes, or by its embeddings."""
    if cache.codec.name != VECTOR_CODEC:
        return evaluate(student, split, cache)
    assert split.labels is not None
    vectors = next(iter(run_program(student.program, split.arrays()).values()))
    return likeness(vectors, cache.vectors(split.ids), split.labels)


def evaluate(student: Student, split: Split, cache: TeacherCache) -> Quality:
    """A program on labelled samples, beside the teacher."""
    if cache.positions:
        return judge_student(student, split, cache)
    assert split.labels is not None
    outputs = run_program(student.program, split.arrays())
    return quality(next(iter(outputs.values())), split.labels, cache.logits(split.ids))


def load_result(recipe: Recipe, arm: str, seed: int) -> ArmResult:
    """What ``train_arm`` saved.

    Raises:
        UsageError: That arm has not been trained yet.
    """
    folder = RunFolder(recipe.run_folder)
    record = read_json(folder.require(folder.arm(arm, seed) / "result.json", "distill"))
    return ArmResult(arm, seed, Quality.from_json(record["validation"]), Quality.from_json(record["test"]))


def load_embedding_result(recipe: Recipe, arm: str, seed: int) -> EmbeddingResult:
    """See :func:`load_result`."""
    folder = RunFolder(recipe.run_folder)
    record = read_json(folder.require(folder.arm(arm, seed) / "result.json", "distill"))
    return EmbeddingResult(arm, seed, Likeness.from_json(record["validation"]), Likeness.from_json(record["test"]))


_Result = TypeVar("_Result", ArmResult, EmbeddingResult)


def choose_arm(results: Sequence[_Result], ship: str = "best") -> _Result:
    """The student to ship, by validation only: the best arm over its seeds, then the best seed of it.

    Args:
        ship: ``best`` among the distilled arms (all arms when only the control was trained), or the name of an arm.
    """
    arms = {r.arm for r in results if r.arm != CONTROL} or {CONTROL}
    if ship != "best":
        arms = {ship}
    mean = {arm: statistics.fmean(r.validation.score for r in results if r.arm == arm) for arm in sorted(arms)}
    best = max(mean, key=lambda arm: mean[arm])
    return max((r for r in results if r.arm == best), key=lambda r: (r.validation.score, -r.seed))


def check_outputs(output: object, teacher_classes: int, labels: int, positions: int = 0) -> None:
    """Whether student, teacher and labels speak of the same classes.

    Args:
        positions: Of a window of tokens; 0 where a sample has one label.

    Raises:
        DataError: They do not; the message has all the numbers.
    """
    if positions:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.shape[1:] != (positions, teacher_classes):
            raise DataError(
                f"the student returns {found}; logits of the next token at each position, "
                f"(batch, {positions}, {teacher_classes}) as the teacher's, are needed"
            )
        return
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(f"the student returns {found}; logits of shape (batch, classes) are needed")
    if not output.shape[1] == teacher_classes == labels:
        raise DataError(
            f"the student gives {output.shape[1]} classes, the teacher {teacher_classes}, "
            f"and there are {labels} labels; all three must be equal"
        )


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
        _Match(
            name,
            spec.stored,
            weights[name],
            _feature_loss(spec.loss, recipe),
        )
        for name, spec in recipe.distill.features_of(arm).items()
    ]


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
