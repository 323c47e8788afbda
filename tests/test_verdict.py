"""What the report says of the arms: whether the teacher helped, and what was inherited from it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgekd.distillation.arms import CONTROL
from edgekd.distillation.distill import ArmResult
from edgekd.metrics import ClassCount, Quality
from edgekd.recipes.recipe import Recipe
from edgekd.recipes.seeds import first_seeds, keep_count, with_seeds
from edgekd.reporting.answers import Answers
from edgekd.reporting.ledger import ArmRow
from edgekd.reporting.verdict import arm_rows, gain_sentence, inheritance_sentence, kept_sentence, perplexity_sentence

SAMPLES = 2000


def result(arm: str, seed: int, accuracy: float) -> ArmResult[Quality]:
    quality = Quality(SAMPLES, accuracy, 0.9, 0.1, 0.02, (ClassCount(SAMPLES, int(SAMPLES * accuracy)),))
    return ArmResult(arm, seed, quality, quality)


def rows_of(own: Sequence[float], control: Sequence[float]) -> tuple[ArmRow, ...]:
    results = [result(CONTROL, seed, value) for seed, value in enumerate(control)]
    return arm_rows([*results, *(result("kd", seed, value) for seed, value in enumerate(own))], "kd", None)


@pytest.mark.parametrize(
    ("own", "control", "helped", "words"),
    [
        ((0.950, 0.951, 0.952), (0.900, 0.902, 0.901), "yes", "Distillation helped: +5.00 points"),
        ((0.900, 0.901, 0.902), (0.950, 0.952, 0.951), "no", "Distillation did not help, it hurt: -5.00 points"),
        ((0.95, 0.90, 0.93), (0.93, 0.94, 0.90), "cannot be told", "Whether distillation helped cannot be told: +0.33"),
        ((0.99, 0.99), (0.80, 0.80), "cannot be told", "with 2 seeds; another seed could say the opposite"),
        ((0.99,), (0.80,), "cannot be told", "with one seed; another seed could say the opposite"),
    ],
)
def test_the_report_says_whether_the_teacher_helped(
    own: tuple[float, ...], control: tuple[float, ...], helped: str, words: str
) -> None:
    rows = rows_of(own, control)

    assert rows[1].gain is not None
    assert rows[1].gain.helped == helped
    assert words in gain_sentence(rows)
    assert ("95 % interval" in gain_sentence(rows)) == (len(own) > 2)


def of_windows(losses: np.ndarray, tokens: int) -> list[Quality]:
    """Each seed's; losses are (seeds, windows), nats."""
    return [
        Quality(tokens, 0.3, 0.5, 0.1, 0.02, (), float(np.exp(row.sum() / tokens)), tuple(row.tolist()))
        for row in losses
    ]


@pytest.mark.parametrize(
    ("ratio", "seeds", "words"),
    [
        (0.8, 3, "Distillation helped: perplexity 40.0 against 50.0 of the same student without a teacher (20.0 of"),
        (1.25, 3, "Distillation did not help, it hurt: perplexity 62.5 against 50.0"),
        (0.999, 3, "Whether distillation helped cannot be told: perplexity 50.0 against 50.0"),
        (0.8, 2, "with 2 seeds; another seed could say the opposite"),
        (0.8, 1, "0.800×, with one seed; another seed could say the opposite"),
    ],
)
def test_the_report_says_what_the_teacher_did_to_perplexity_and_for_whom(ratio: float, seeds: int, words: str) -> None:
    tokens = 60 * 100
    noise = np.random.default_rng(0).normal(size=(2, seeds, 60))
    noise -= noise.mean(axis=2, keepdims=True)  # perplexities are exact, windows are not
    own, control = (
        of_windows(100 * np.log(value) + part, tokens) for value, part in zip((50 * ratio, 50), noise, strict=True)
    )
    sentence = perplexity_sentence(own, control, of_windows(np.full((1, 60), 100 * np.log(20)), tokens)[0])

    assert words in sentence
    assert ("95 % interval" in sentence) == ("new seeds and new windows" in sentence) == (seeds > 2)
    assert "next token is the teacher's at 50.0% of these tokens" in sentence


def test_the_gain_is_paired_by_seed() -> None:
    """Seeds move both arms together: the pairs tell what the two means alone would not."""
    gain = rows_of((0.91, 0.94, 0.97), (0.90, 0.93, 0.96))[1].gain

    assert gain is not None
    assert gain.points == pytest.approx(1.0)
    assert (gain.low, gain.high) == pytest.approx((1.0, 1.0))


def test_the_mean_and_the_deviation_of_each_arm_are_told() -> None:
    rows = rows_of((0.91, 0.94, 0.97), (0.90, 0.93, 0.96))
    quality = result("teacher", 0, 0.98).test

    assert [row.accuracy_deviation for row in rows] == pytest.approx([0.03, 0.03])
    assert kept_sentence(rows, quality, 0.1) == (
        "The student (kd) keeps 95.9% of the teacher's accuracy with 10.0% of its parameters: "
        "94.00 ± 3.00 % against 98.00% on 2000 test samples."
    )


def answers(copied: float, seeds: int = 3, mistakes: int = 200) -> Answers:
    """A control that makes a tenth of the teacher's mistakes as well, and a student that makes ``copied`` of them."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, SAMPLES)
    teacher = labels.copy()
    teacher[:mistakes] = (labels[:mistakes] + 1) % 5

    def student(share: float) -> np.ndarray:
        made = np.stack([labels] * seeds)
        made[:, :mistakes] = np.where(random.random((seeds, mistakes)) < share, teacher[:mistakes], labels[:mistakes])
        return made

    return Answers(labels, teacher, {CONTROL: student(0.1), "kd": student(copied)})


def test_mistakes_beyond_those_of_the_control_are_inherited() -> None:
    inherited, none, fewer = (inheritance_sentence("kd", answers(copied)) for copied in (0.4, 0.1, 0.0))

    assert inherited.startswith("The student inherited mistakes: of the teacher's 200 mistakes it repeats 4")
    assert "the control 1" in inherited
    assert "95 % interval +2" in inherited
    assert none.startswith("Whether the student inherited mistakes cannot be told")
    assert fewer.startswith("The student inherited no mistakes")
    assert "cannot be told" in inheritance_sentence("kd", answers(0.9, seeds=2))
    assert "makes 5 mistakes on the test split, too few to tell" in inheritance_sentence("kd", answers(0.9, mistakes=5))
    assert "there was none to inherit" in inheritance_sentence("kd", answers(0.4, mistakes=0))


def test_another_wrong_class_than_the_teachers_is_not_inherited() -> None:
    told = answers(0.9)
    told.students["kd"][:, :200] = (told.labels[:200] + 2) % 5

    assert "it repeats 0.0%" in inheritance_sentence("kd", told)
    rows = arm_rows([result(arm, seed, 0.9) for seed in range(3) for arm in (CONTROL, "kd")], "kd", told)
    assert rows[1].mistakes_repeated == 0
    assert rows[0].mistakes_repeated == pytest.approx(0.1, abs=0.03)


def recipe(folder: Path, seeds: list[int]) -> Recipe:
    made = Recipe.model_validate(
        {"name": "x", "data": {"train": "a.npz", "test": "b.npz"}, "teacher": {"model": "pt2:t.pt2"},
         "student": {"model": "m:f"}, "distill": {"seeds": seeds}}
    )  # fmt: skip
    made._folder = folder
    return made


def test_more_seeds_keep_those_of_the_recipe() -> None:
    assert first_seeds((0,), 3) == (0, 1, 2)
    assert first_seeds((7, 1), 4) == (7, 1, 0, 2)
    assert first_seeds((5, 6, 7), 2) == (5, 6)


def test_as_many_seeds_as_were_asked_for_are_taken_until_others_are(tmp_path: Path) -> None:
    own = recipe(tmp_path, [0])
    asked = with_seeds(own, 3)
    before = with_seeds(own).distill.seeds
    keep_count(asked, 3)
    keep_count(with_seeds(own), None)

    assert asked.folder == own.folder
    assert (before, asked.distill.seeds, with_seeds(own).distill.seeds) == ((0,), (0, 1, 2), (0, 1, 2))
    keep_count(own, 1)
    assert with_seeds(own).distill.seeds == (0,)
