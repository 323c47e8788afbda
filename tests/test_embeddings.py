"""Teachers whose output is an embedding: what is kept of it, who learns it, and how near students come."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.console import progress_for
from edgekd.distillation.embeddings import check_embedding, likeness, nearest
from edgekd.distillation.feature_losses import FEATURE_LOSSES
from edgekd.errors import DataError, NumericalError, RecipeError, UsageError
from edgekd.programs.student_files import load_student
from edgekd.recipes.arm_faults import VECTOR_LOSSES
from edgekd.recipes.reading import load_recipe
from edgekd.reporting.summary import collect, write_report
from edgekd.stages.check import check_workspace
from edgekd.stages.pipeline import capture_stage, compress_stage, distill_stage, export_stage
from edgekd.stages.verify import verify_caches
from edgekd.stages.workspace import Workspace
from edgekd.store import load_artifact
from edgekd.teachers.targets import VectorTargets, codec_of
from edgekd.types import LOGITS

CODE = """
import numpy as np, torch
from torch import nn
def arrays(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] > 0).astype(int)}
def train(): return arrays(200, 0)
def test(): return arrays(60, 1)
def bare_train(): return {"x": train()["x"]}
def bare_test(): return {"x": test()["x"]}
def teacher():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
class Positions(nn.Module):
    def forward(self, x): return torch.stack([x[:, :4], 3 * x[:, :4]], 1)
def positions(): return Positions()
def student(): return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
"""

RECIPE = """
name = "vectors"
[data]
train = "mine:train"
test = "mine:test"
[teacher]
model = "mine:teacher"
gives = "embedding"
[student]
model = "mine:student"
[distill]
arms = ["cosine", "mse"]
epochs = 20
batch_size = 32
learning_rate = 0.02
[export]
targets = ["onnx"]
precisions = ["fp32"]
"""


def workspace(folder: Path, recipe: str = RECIPE) -> Workspace:
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(recipe)
    return Workspace(load_recipe(folder / "edgekd.toml"))


def trained(work: Workspace) -> Workspace:
    progress = progress_for()
    capture_stage(work, progress)
    distill_stage(work, progress)
    return work


def test_neighbours_are_the_nearest_by_angle_and_never_oneself() -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(1500, 5)).astype(np.float32)
    vectors[3] = vectors[7] * 4
    found = nearest(vectors, 10)
    for row in (0, 3, 700, 1499):
        angles = vectors @ vectors[row] / np.linalg.norm(vectors, axis=1)
        order = [other for other in np.argsort(-angles, kind="stable") if other != row]
        assert found[row].tolist() == order[:10]
    assert (found[3, 0], found[7, 0]) == (7, 3)


def test_likeness_is_one_of_what_is_turned_alike_and_chance_of_what_is_random() -> None:
    random = np.random.default_rng(1)
    teacher, labels = random.normal(size=(400, 8)), np.arange(400) % 2
    teacher[:, 0] += 40 * (labels - 0.5)
    same = likeness(teacher * 3, teacher, labels)
    assert same.cosine == pytest.approx(1)
    assert (same.neighbours, same.same_label) == (1, 1)
    turned = likeness(teacher @ np.linalg.qr(random.normal(size=(8, 8)))[0], teacher, np.full(400, -1))
    assert turned.neighbours > 0.99
    assert abs(turned.cosine) < 0.99
    assert turned.same_label is None
    assert likeness(random.normal(size=(400, 8)), teacher, labels).neighbours == pytest.approx(10 / 399, abs=0.02)


def test_an_embedding_is_kept_as_it_is() -> None:
    codec, vectors = codec_of("vector-f16"), np.asarray([[1.5, -2.25, 300], [0, 0.125, -1]], np.float32)
    records = np.empty(2, codec.fields(3))
    codec.encode(vectors, records)
    targets = codec.decode(records)

    assert isinstance(targets, VectorTargets)
    np.testing.assert_array_equal(targets.vectors, vectors)
    with pytest.raises(UsageError, match="holds embeddings, and a loss over classes finds none"):
        targets.paired(torch.zeros(2, 3), torch.zeros(2), 1.0)
    with pytest.raises(NumericalError, match=r"reaches 1e\+05; what is kept of it ends at 65504"):
        codec.encode(vectors * 1e5 / 300, records)


def test_a_student_learns_the_embedding_and_the_control_learns_the_labels_alone(tmp_path: Path) -> None:
    work = trained(workspace(tmp_path))
    verify_caches(work, progress_for())
    ledger = write_report(work)
    rows = {row.name: row for row in ledger.rows if row.stage != "teacher"}
    student, _ = load_student(work.folder.arm("cosine", 0))

    assert rows["cosine"].cosine > 0.95 > (rows["no teacher"].cosine or 0) + 0.2  # type: ignore[operator]
    assert rows["cosine"].neighbours > 1.5 * rows["no teacher"].neighbours  # type: ignore[operator]
    assert rows["no teacher"].same_label > 0.85  # type: ignore[operator]
    assert rows["cosine"].accuracy is None
    assert student.card.parameters == 6 * 8 + 8 + 8 * 4 + 4  # the control's head is left behind, and so is any other
    assert load_student(work.folder.arm("control", 0))[0].card.parameters == student.card.parameters
    assert student.card.outputs[0].meaning == "embedding" != LOGITS
    assert student.card.labels == ()
    assert ledger.sentences[0].startswith("The student (")
    assert "of the teacher's neighbours over the same student without a teacher" in ledger.sentences[1]
    assert "the control's, which learned these labels" in ledger.sentences[2]
    assert "neighbours %" in work.folder.report_html.read_text()


def test_without_labels_there_is_no_control_and_the_report_says_why_and_files_are_proven(tmp_path: Path) -> None:
    recipe = RECIPE.replace("mine:t", "mine:bare_t").replace("bare_teacher", "teacher").replace(', "mse"', "")
    work = trained(workspace(tmp_path, recipe))
    assert work.arms == ("cosine",)
    assert not work.folder.arm("control", 0).exists()
    pytest.importorskip("onnxruntime")
    (folder,) = export_stage(work, progress_for())
    artifact = load_artifact(folder)
    assert (artifact.parity.status, artifact.accuracy, artifact.teacher_agreement) == ("passed", None, None)
    sentences = collect(work)[0].sentences
    assert sentences[1].startswith("There is no control: the data have no labels")
    with pytest.raises(UsageError, match="quantization-aware training does not go with a teacher of embeddings"):
        compress_stage(work, progress_for(), ["w8a8"], qat=True)


def test_check_says_what_will_be_learned_and_what_does_not_fit(tmp_path: Path) -> None:
    facts = check_workspace(workspace(tmp_path))
    assert facts["embedding"] == "4 numbers"
    assert facts["control"] == "from 2 labels alone, by a head that is left behind"
    assert "3 to train: control, cosine, mse" in facts["students"]
    with pytest.raises(DataError, match=r"returns \(32, 3\); the teacher's embedding is \(batch, 4\)"):
        check_embedding(torch.zeros(32, 3), 4)
    raw = workspace(tmp_path, RECIPE.replace("mine:teacher", "mine:positions"))
    with pytest.raises(DataError, match=r'an embedding with positions; pool = "mean" or "first"'):
        raw.teacher.logits(raw.splits.test.arrays())
    pooled = workspace(tmp_path, RECIPE.replace('mine:teacher"', 'mine:positions"\npool = "mean"'))
    x = pooled.splits.test.arrays()["x"]
    np.testing.assert_allclose(pooled.teacher.logits({"x": x}), 2 * x[:, :4], rtol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('arms = ["cosine", "mse"]', 'arms = ["kd"]', "distill.arms.0: kd compares no embeddings; there are mse, cos"),
        ('arms = ["cosine", "mse"]', "", 'distill.arms: needs to be said, as ["mse", "cosine"]'),
        ('gives = "embedding"', 'gives = "embedding"\ncodec = "top10"', "codec 'top10' is for classes"),
        ('gives = "embedding"', 'pool = "mean"', 'pool is for gives = "embedding"'),
        (
            'model = "mine:teacher"\ngives = "embedding"',
            'models = ["mine:teacher", { model = "mine:teacher", gives = "embedding" }]',
            "embeddings of several teachers lie in no common space",
        ),
        ("[export]", '[compress]\nprune = "2:4"\n[export]', "compress.prune: does not go with a teacher of embeddings"),
    ],
)
def test_what_does_not_go_with_embeddings_is_told_by_its_key(tmp_path: Path, old: str, new: str, fault: str) -> None:
    with pytest.raises(RecipeError) as told:
        workspace(tmp_path, RECIPE.replace(old, new))
    assert fault in str(told.value)


def test_the_losses_that_a_recipe_may_name_are_those_that_there_are() -> None:
    assert set(VECTOR_LOSSES) == set(FEATURE_LOSSES)
