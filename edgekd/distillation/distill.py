"""Teacher cache to trained student: every arm, its control, and what each is worth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import processes
from edgekd.data.samples import Splits
from edgekd.data.split import Split
from edgekd.data.views import Views
from edgekd.data.windows import positions_of
from edgekd.distillation.arms import CONTROL, objective_of, plan_of, threads_of
from edgekd.distillation.embeddings import EMBEDDING, Likeness, check_embedding, likeness, with_head
from edgekd.distillation.features import with_features
from edgekd.distillation.perplexity import judge_student
from edgekd.distillation.train import train
from edgekd.errors import DataError
from edgekd.metrics import Quality, quality
from edgekd.programs.models import count_macs, count_parameters, input_specs, output_specs, run_program
from edgekd.programs.student_files import save_student
from edgekd.programs.tracing import export_program, rename_outputs
from edgekd.protocols import Progress
from edgekd.recipes.recipe import VECTOR_CODEC, Recipe
from edgekd.store import RunFolder, fingerprint, read_json
from edgekd.teachers.blocks import started_from
from edgekd.teachers.sources import fresh_module
from edgekd.teachers.teacher_cache import TeacherCache
from edgekd.types import LOGITS, Card, Json, Student

__all__ = [
    "STARTED_FROM",
    "ArmResult",
    "Trained",
    "check_output",
    "choose_arm",
    "evaluate",
    "fresh_student",
    "judged",
    "load_result",
    "outputs_on",
    "student_of",
    "train_arm",
]

JUDGED_AT_ONCE = 512

STARTED_FROM = "student starts from: "
"""Begins the line of a card's lineage that says whose weights a student started from."""


_Judgement_co = TypeVar("_Judgement_co", bound=Quality | Likeness, covariant=True)
_Judgement = TypeVar("_Judgement", bound=Quality | Likeness)
_Kind = TypeVar("_Kind", Quality, Likeness)


@dataclass(frozen=True)
class ArmResult(Generic[_Judgement_co]):
    """One trained student, judged by its classes or by its embeddings.

    Attributes:
        arm: ``control``, or the name of the loss.
        validation: For choices.
        test: For reports; no choice looks at it.
    """

    arm: str
    seed: int
    validation: _Judgement_co
    test: _Judgement_co


Trained: TypeAlias = ArmResult[Quality | Likeness]
"""A result, whatever its student gives."""


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
    plan, name, start = plan_of(recipe, arm, seed), f"{arm}, seed {seed}", started_from(module)
    checkpoint = folder.checkpoint(f"{arm}-{fingerprint(inputs)}", seed)
    objective = objective_of(recipe, arm, labelled=bool(splits.labels))
    history = train(learner, splits.train, caches["train"], views, objective, plan, checkpoint, progress, name)
    if not processes.is_main():
        return
    module.eval().requires_grad_(False)
    manifest = caches["train"].manifest
    keys = manifest["key"]
    lineage = (
        *(manifest.get("teacher") or [f"teacher: {keys['teacher']}"]),
        f"data: {keys['data']}",
        *([f"{STARTED_FROM}{start}"] if start else []),
        f"distill {name}: {fingerprint(inputs)}",
    )
    student = student_of(recipe, splits, module, lineage)
    record = {
        "arm": arm,
        "seed": seed,
        "validation": judged(student, splits.validation, caches["validation"]).to_json(),
        "test": judged(student, splits.test, caches["test"]).to_json(),
        "history": history,
    }
    save_student(folder.arm(arm, seed), student, splits.assets, record)
    checkpoint.unlink(missing_ok=True)


def student_of(recipe: Recipe, splits: Splits, module: nn.Module, lineage: tuple[str, ...]) -> Student:
    """A module as a program, with its card.

    Raises:
        ModelFileError: It cannot be exported.
    """
    embeds = recipe.teacher.embeds
    meaning = EMBEDDING if embeds else LOGITS
    program = rename_outputs(export_program(module, splits.example()), [meaning])
    card = Card(
        name=recipe.name,
        inputs=input_specs(program),
        outputs=tuple(replace(spec, meaning=meaning) for spec in output_specs(program)),
        labels=() if embeds else splits.labels,
        preprocessing=splits.preprocessing,
        parameters=count_parameters(module),
        macs=count_macs(program),
        lineage=lineage,
        assets=tuple(splits.assets),
    )
    return Student(program, card)


def fresh_student(
    recipe: Recipe, splits: Splits, cache: TeacherCache, arm: str, seed: int
) -> tuple[nn.Module, nn.Module]:
    """A student before it is trained: what is saved in the end, and what is trained, with projectors or a head.

    Args:
        cache: Of the training views.

    Raises:
        DataError: The student's outputs do not fit the teacher's.
    """
    example = splits.example()
    module = fresh_module(recipe, seed)
    check_output(recipe, splits, module.eval()(*example), cache.classes)
    if recipe.teacher.embeds:
        heard = recipe.distill.mix(arm).label_weight > 0
        return module, with_head(module, cache.classes, len(splits.labels) if heard else 0, seed)
    shapes = {name: shape for name, (_, shape) in cache.features.items()}
    inputs = dict(zip(splits.train.inputs, example, strict=True))
    return module, with_features(module, recipe.distill.features_of(arm), shapes, inputs, seed)


def judged(student: Student, split: Split, cache: TeacherCache) -> Quality | Likeness:
    """A program on samples, beside the teacher: over classes, or by its embeddings."""
    if cache.codec.name != VECTOR_CODEC:
        return evaluate(student, split, cache)
    assert split.labels is not None
    vectors = outputs_on(student, split)
    return likeness(vectors, cache.vectors(split.ids), split.labels)


def evaluate(student: Student, split: Split, cache: TeacherCache) -> Quality:
    """A program on labelled samples, beside the teacher."""
    if cache.positions:
        return judge_student(student, split, cache)
    assert split.labels is not None
    return quality(outputs_on(student, split), split.labels, cache.logits(split.ids))


def outputs_on(student: Student, split: Split) -> np.ndarray:
    """The first output on all samples, of which some hundred are in memory at a time."""
    starts = range(0, len(split), JUDGED_AT_ONCE)
    parts = (split.arrays(slice(start, start + JUDGED_AT_ONCE)) for start in starts)
    return np.concatenate([next(iter(run_program(student.program, part).values())) for part in parts])


def load_result(recipe: Recipe, arm: str, seed: int, kind: type[_Kind]) -> ArmResult[_Kind]:
    """What ``train_arm`` saved.

    Args:
        kind: What its student is judged by.

    Raises:
        UsageError: That arm has not been trained yet.
    """
    folder = RunFolder(recipe.run_folder)
    record = read_json(folder.require(folder.arm(arm, seed) / "result.json", "distill"))
    return ArmResult(arm, seed, kind.from_json(record["validation"]), kind.from_json(record["test"]))


def choose_arm(results: Sequence[ArmResult[_Judgement]], ship: str = "best") -> ArmResult[_Judgement]:
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


def check_output(recipe: Recipe, splits: Splits, output: object, width: int) -> None:
    """Whether a student gives what the recipe's teacher does.

    Args:
        output: Of a batch.
        width: Classes of the teacher, or numbers of its embedding.

    Raises:
        DataError: It does not; the message has all the numbers.
    """
    if recipe.teacher.embeds:
        check_embedding(output, width)
    else:
        check_outputs(output, width, len(splits.labels), positions_of(splits.train.labels))


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
