"""Several teachers as one, and the preprocessing that each keeps for itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.console import progress_for
from edgekd.errors import DataError, UsageError
from edgekd.metrics import softmax
from edgekd.programs.student_files import load_student
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe import ImageData
from edgekd.recipes.recipe_models import Member
from edgekd.stages.check import check_workspace
from edgekd.stages.members import teacher_sentences
from edgekd.stages.pipeline import capture_stage, distill_stage
from edgekd.stages.served import described
from edgekd.stages.workspace import Workspace
from edgekd.teachers.ensemble import MEMBERS, as_logits, averaged, teacher_of
from edgekd.teachers.teacher_inputs import prepared_images
from edgekd.teaching import Preprocessing

CODE = """
import numpy as np, torch
from torch import nn
def arrays(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] + x[:, 1] > 0).astype(int)}
def train(): return arrays(120, 0)
def test(): return arrays(80, 1)
def made(*rows):
    net = nn.Linear(4, 2, bias=False)
    net.weight.data = torch.tensor(rows, dtype=torch.float32)
    return net
def good(): return made([-3, -3, 0, 0], [3, 3, 0, 0])
def poor(): return made([0, -1, 0, 1], [0, 1, 0, -1])
def soft(): return nn.Sequential(good(), nn.Softmax(1))
def student(): return nn.Linear(4, 2)
def turned(arrays): return {"x": arrays["x"][:, ::-1].copy()}
def fewer(arrays): return {"x": arrays["x"][:1]}
"""

RECIPE = """
name = "several"
labels = ["no", "yes"]
[data]
train = "mine:train"
test = "mine:test"
[teacher]
TEACHER
[student]
model = "mine:student"
[distill]
arms = ["control", "kd"]
epochs = 1
[export]
targets = ["onnx"]
"""

SEVERAL = 'models = ["mine:good", { model = "mine:poor", share = 3.0, preprocessing = "mine:turned" }]'


def workspace(folder: Path, teacher: str) -> Workspace:
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(RECIPE.replace("TEACHER", teacher))
    return Workspace(load_recipe(folder / "edgekd.toml"))


def test_averaging_is_the_mean_of_the_probabilities() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 5, 4)).astype(np.float32) * 30
    expected = 0.25 * softmax(a) + 0.75 * softmax(b)

    np.testing.assert_allclose(softmax(averaged([a, b], [1, 3])), expected, rtol=1e-5)
    np.testing.assert_allclose(softmax(averaged([a], [7])), softmax(a), rtol=1e-5)
    with pytest.raises(DataError, match=r"the teachers give \(5, 4\), \(5, 3\); all must be the same"):
        averaged([a, b[:, :3]], [1, 1])


def test_several_teachers_are_one_and_each_takes_what_it_is_made_for(tmp_path: Path) -> None:
    work = workspace(tmp_path, SEVERAL)
    x = work.splits.test.arrays()["x"]
    answer = work.teacher.outputs({"x": x})
    good, poor = x[:, :2].sum(1) * 6, (x[:, ::-1][:, 1] - x[:, ::-1][:, 3]) * 2
    expected = 0.25 / (1 + np.exp(-good)) + 0.75 / (1 + np.exp(-poor))

    np.testing.assert_allclose(softmax(answer.logits)[:, 1], expected, rtol=1e-4)
    np.testing.assert_array_equal(answer.features[MEMBERS], np.stack([good > 0, poor > 0], 1))
    assert work.teacher.parameters == 16


def test_a_teachers_share_and_preprocessing_are_part_of_its_fingerprint_and_alone_it_keeps_its_own(
    tmp_path: Path,
) -> None:
    prints = {
        told: workspace(tmp_path, told).teacher.fingerprint
        for told in (
            SEVERAL,
            SEVERAL.replace("3.0", "2.0"),
            SEVERAL.replace(', preprocessing = "mine:turned"', ""),
            'model = "mine:good"',
            'model = "mine:good"\npreprocessing = "mine:turned"',
        )
    }
    from edgekd.teachers.sources import load_teacher

    assert len(set(prints.values())) == 5
    alone = load_teacher("mine:good", tmp_path, {"x": np.zeros((1, 4), np.float32)})
    assert prints['model = "mine:good"'] == alone.fingerprint


def test_check_and_report_tell_what_each_teacher_is_worth_and_the_card_what_was_done(tmp_path: Path) -> None:
    work = workspace(tmp_path, SEVERAL)
    facts = check_workspace(work)
    capture_stage(work, progress_for())
    distill_stage(work, progress_for())
    labels, tops = work.splits.test.labels, work.cache("test").feature(work.splits.test.ids, MEMBERS)
    student, _ = load_student(work.folder.arm("kd", 0))

    assert labels is not None
    assert (tops[:, 0] == labels).all()
    poor = f"{(tops[:, 1] == labels).mean():.2%}"
    (sentence,) = teacher_sentences(work, 0.5)
    assert sentence == f"The teachers together reach 50.00%: mine:good 100.00%, mine:poor {poor} alone."
    assert "mine:good 100.0%, mine:poor " in facts["teacher"]
    assert work.cache("train").features == {}
    assert student.card.lineage[0].startswith("teacher: ")
    assert student.card.lineage[2].startswith("of teacher mine:poor (share 3, preprocessing mine:turned ")


def test_the_drift_test_sees_probabilities_and_no_numbers_of_classes(tmp_path: Path) -> None:
    work = workspace(tmp_path, SEVERAL)

    assert [vectors.shape for vectors in described(work, work.splits.test).vectors] == [(80, 2)]


def test_a_single_teacher_has_no_such_sentence(tmp_path: Path) -> None:
    work = workspace(tmp_path, 'model = "mine:good"')

    assert teacher_sentences(work, 0.5) == []
    assert check_workspace(work)["teacher"] == f"100.0% of {len(work.splits.validation)} validation samples"


def test_probabilities_are_logits_only_when_the_recipe_says_so(tmp_path: Path) -> None:
    work = workspace(tmp_path, 'model = "mine:soft"\ngives = "probabilities"')
    x = work.splits.test.arrays()
    logits = workspace(tmp_path, 'model = "mine:good"').teacher.logits(x)

    np.testing.assert_allclose(softmax(work.teacher.logits(x)), softmax(logits), atol=1e-6)
    with pytest.raises(DataError, match=r"'mine:soft' gives probabilities, not logits.*gives = \"probabilities\""):
        workspace(tmp_path, 'model = "mine:soft"').teacher.logits(x)
    with pytest.raises(DataError, match="gives no probabilities: its outputs do not sum to 1"):
        as_logits(np.ones((2, 3), np.float32), Member(model="m:f", gives="probabilities"))


def test_a_preprocessing_must_keep_the_samples(tmp_path: Path) -> None:
    work = workspace(tmp_path, 'model = "mine:good"\npreprocessing = "mine:fewer"')

    with pytest.raises(DataError, match="mine:fewer returned no dict of arrays with the 4 samples"):
        _ = work.teacher


def test_declared_preprocessing_undoes_the_students_and_does_the_teachers() -> None:
    image = ImageData(size=8, channels=1, mean=(0.5,), std=(0.25,))
    pixels = np.random.default_rng(0).random((2, 1, 8, 8)).astype(np.float32)
    spec = Preprocessing(channels=3, scale=255, mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0), layout="NHWC")
    made = prepared_images((pixels - 0.5) / 0.25, spec, image)
    expected = (np.repeat(pixels, 3, 1).transpose(0, 2, 3, 1) * 255 - [100, 110, 120]) / [50, 60, 70]

    np.testing.assert_allclose(made, expected, atol=1e-4)
    grey = prepared_images(np.repeat(pixels, 3, 1), Preprocessing(channels=1))
    np.testing.assert_allclose(grey, pixels, atol=1e-3)
    assert prepared_images(pixels, Preprocessing(size=4)).shape == (2, 1, 4, 4)
    small = torch.nn.functional.avg_pool2d(torch.full((1, 1, 8, 8), 0.3), 2).numpy()
    np.testing.assert_allclose(prepared_images(np.full((1, 1, 8, 8), 0.3, np.float32), Preprocessing(size=4)), small)


def test_what_is_no_image_passes_and_wrong_channels_are_refused() -> None:
    tokens = np.ones((2, 5), np.int32)

    assert prepared_images(tokens, Preprocessing(size=4)) is tokens
    with pytest.raises(DataError, match="mean has 2 values for 3 channels"):
        prepared_images(np.zeros((1, 3, 4, 4), np.float32), Preprocessing(mean=(0.0, 1.0)))
    with pytest.raises(DataError, match="3 channels cannot be made of the data's 2"):
        prepared_images(np.zeros((1, 2, 4, 4), np.float32), Preprocessing(channels=3))


@pytest.mark.parametrize(
    ("teacher", "fault"),
    [
        ("codec = 'dense-f16'", "teacher: a teacher is either model or models; give one of them"),
        ("model = 'mine:good'\nmodels = ['mine:good']", "a teacher is either model or models"),
        (SEVERAL + "\npreprocessing = 'mine:turned'", "teacher: preprocessing beside models is said of no teacher"),
        ("model = 'mine:good'\npreprocesing = 'mine:turned'", "teacher.preprocesing: no such key; did you mean prepro"),
        (
            SEVERAL.replace("mine:poor", "mine:pour"),
            "teacher.models.1.model: mine.py beside the recipe defines no 'pou",
        ),
        (SEVERAL.replace("share", "shares"), "teacher.models.1.shares: no such key; did you mean share?"),
        (
            "model = 'mine:good'\npreprocessing = 'mine:tuned'",
            "teacher.preprocessing: mine.py beside the recipe defines",
        ),
    ],
)
def test_faults_of_teachers_are_told_by_key(tmp_path: Path, teacher: str, fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        workspace(tmp_path, teacher)

    assert fault in str(caught.value)


def test_the_teacher_of_a_recipe_is_made_from_its_parts(tmp_path: Path) -> None:
    recipe = workspace(tmp_path, 'model = "mine:good"').recipe
    teacher = teacher_of(recipe, {"x": np.zeros((1, 4), np.float32)})

    assert (teacher.parameters, teacher.lineage) == (8, ())
