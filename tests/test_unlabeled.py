"""Unlabeled samples join the training set, none that is held out does, and only the teacher's losses see them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.console import SilentProgress
from edgekd.data.samples import Splits, load_splits
from edgekd.data.truth import Truth
from edgekd.data.views import Views
from edgekd.distillation.train import TrainingPlan, train
from edgekd.errors import DataError
from edgekd.recipes.reading import load_recipe
from edgekd.reporting.summary import collect
from edgekd.stages.check import check_workspace
from edgekd.stages.pipeline import capture_stage, distill_stage
from edgekd.stages.workspace import Workspace
from edgekd.teachers.capture import capture, verify_cache
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.teacher_cache import CaptureKey
from edgekd.teaching import Answer, Teacher


class Quiet(SilentProgress):
    def start(self, what: str, total: int, done: int = 0) -> None:
        self.total = total


def splits_of(folder: Path, extra: np.ndarray, data: str = "") -> Splits:
    random = np.random.default_rng(0)
    for name, count in (("train", 40), ("validation", 10), ("test", 12)):
        x = random.normal(size=(count, 3)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, label=(x.sum(1) > 0).astype(int))
    np.savez(folder / "served.npz", x=extra)
    (folder / "m.py").write_text("def teacher(): ...\ndef student(): ...\n")
    (folder / "edgekd.toml").write_text(
        'name = "x"\n[data]\ntrain = "train.npz"\nvalidation = "validation.npz"\ntest = "test.npz"\n'
        f'unlabeled = "served.npz"\n{data}[teacher]\nmodel = "m:teacher"\n[student]\nmodel = "m:student"\n'
    )
    return load_splits(load_recipe(folder / "edgekd.toml"))


def fresh(count: int) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(count, 3)).astype(np.float32)


def test_unlabeled_samples_join_the_training_set_without_a_label(tmp_path: Path) -> None:
    splits = splits_of(tmp_path, fresh(25))
    labels = splits.train.labels

    assert labels is not None
    assert (labels[:40] >= 0).all()
    assert (labels[40:] == -1).all()
    assert len(splits.train) == len(set(splits.train.ids.tolist())) == 65
    assert splits.joined is not None
    assert splits.joined.sentence().startswith("25 unlabeled samples, labelled by the teacher, joined the 40 labelled")


def test_what_is_in_a_split_already_is_left_out_and_said(tmp_path: Path) -> None:
    splits_of(tmp_path, fresh(5))
    held = [np.load(tmp_path / f"{name}.npz")["x"][:count] for name, count in (("test", 3), ("validation", 2))]
    known = np.load(tmp_path / "train.npz")["x"][:4]
    splits = splits_of(tmp_path, np.concatenate([*held, known, fresh(5)]))

    assert len(splits.train) == 45
    assert not np.isin(splits.train.ids, np.concatenate([splits.test.ids, splits.validation.ids])).any()
    assert splits.joined is not None
    assert "Left out were 3 that are in test and 2 that are in validation and 4 that are in train." in (
        splits.joined.sentence()
    )
    with pytest.raises(DataError, match=r"all 3 samples are in a split already \(3 in test\)"):
        splits_of(tmp_path, held[0])


def test_every_copy_of_a_sample_that_is_in_a_split_is_left_out(tmp_path: Path) -> None:
    splits_of(tmp_path, fresh(5))
    known = [np.load(tmp_path / f"{name}.npz")["x"][:1] for name in ("test", "test", "validation", "train", "train")]
    joined = splits_of(tmp_path, np.concatenate([*known, *known, fresh(5)])).joined

    assert joined is not None
    assert (joined.samples, joined.left_out) == (5, {"test": 4, "validation": 2, "train": 4})


def test_whole_numbers_beside_decimals_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input x is float32 in train and int32 in unlabeled .*uint8.*; .*alike"):
        splits_of(tmp_path, np.arange(15, dtype=np.uint8).reshape(5, 3))


def test_inputs_that_differ_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train has the inputs x \(3,\); unlabeled has x \(4,\)"):
        splits_of(tmp_path, np.zeros((5, 4), np.float32))


def test_a_copy_of_a_test_image_is_found_under_another_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 12), ("test", 4)):
        for index in range(count):
            folder = tmp_path / split / ("cat", "dog")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([index, count]).integers(0, 255, (20, 20, 3), np.uint8)
            image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / "served").mkdir()
    for index in range(6):
        pixels = np.random.default_rng([index, 99]).integers(0, 255, (20, 20, 3), np.uint8)
        image.fromarray(pixels).save(tmp_path / "served" / f"{index}.png")
    (tmp_path / "served" / "new name.png").write_bytes((tmp_path / "test" / "cat" / "0.png").read_bytes())
    (tmp_path / "m.py").write_text("def teacher(): ...\ndef student(): ...\n")
    (tmp_path / "edgekd.toml").write_text(
        'name = "x"\n[data]\ntrain = "imagefolder:train"\ntest = "imagefolder:test"\nvalidation_share = 0.3\n'
        'unlabeled = "imagefolder:served"\n[data.image]\nsize = 8\n'
        '[teacher]\nmodel = "m:teacher"\n[student]\nmodel = "m:student"\n'
    )
    splits = load_splits(load_recipe(tmp_path / "edgekd.toml"))

    assert splits.joined is not None
    assert (splits.joined.samples, splits.joined.left_out["test"]) == (6, 1)
    assert splits.train.arrays()["image"].shape == (splits.joined.labelled + 6, 3, 8, 8)


@pytest.mark.parametrize("labelled_only", [False, True])
def test_the_control_learns_from_labelled_samples_alone_in_as_many_steps(tmp_path: Path, labelled_only: bool) -> None:
    splits, shown, progress = splits_of(tmp_path, fresh(25)), list[Tensor](), Quiet()
    teacher = Teacher(lambda arrays: Answer(arrays["x"][:, :2].copy()), "t", 0, None, 0)
    cache = capture(tmp_path / "c", splits.train, teacher, CaptureKey("t", "d", "", 1, 0), Views(), Quiet())

    def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
        shown.append(truth.classes)
        return {"labels": truth.cross_entropy(student.logits)}

    torch.manual_seed(0)
    plan = TrainingPlan(2, 13, 1e-3, 0.0, 0.0, seed=1, labelled_only=labelled_only)
    train(nn.Linear(3, 2), splits.train, cache, Views(), objective, plan, tmp_path / "p.pt", progress, "x")

    seen = torch.cat(shown)
    assert len(seen) == 130
    assert len(shown) == progress.total == 10
    assert int((seen == -1).sum()) == (0 if labelled_only else 50)


def test_a_missing_folder_is_a_fault_of_the_recipe(tmp_path: Path) -> None:
    splits_of(tmp_path, fresh(5))
    (tmp_path / "served.npz").unlink()

    with pytest.raises(Exception, match=re.escape("data.unlabeled: no file 'served.npz' beside the recipe")):
        load_recipe(tmp_path / "edgekd.toml")


def test_a_recipe_that_mixes_and_has_unlabeled_samples_is_captured_trained_verified_and_told(tmp_path: Path) -> None:
    splits_of(tmp_path, fresh(25), 'mix = "mixup"\nviews = 4\nviews_per_decode = 2\n')
    train, test = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("train", "test"))
    np.savez(tmp_path / "test.npz", **{name: np.concatenate([train[name][:2], test[name][2:]]) for name in test})
    np.savez(tmp_path / "validation.npz", **{name: np.concatenate([train[name][:1], test[name][:2]]) for name in test})
    (tmp_path / "m.py").write_text(
        "import torch\n"
        "def teacher():\n    net = torch.nn.Linear(3, 2, bias=False)\n"
        "    net.weight.data = torch.tensor([[-1.0] * 3, [1.0] * 3])\n    return net\n"
        "def student():\n    return torch.nn.Linear(3, 2)\n"
    )
    with (tmp_path / "edgekd.toml").open("a") as recipe:
        recipe.write('[distill]\narms = ["kd"]\nepochs = 2\nbatch_size = 16\nthreads = 1\n')
    work = Workspace(load_recipe(tmp_path / "edgekd.toml"))
    capture_stage(work, Quiet())
    results = distill_stage(work, Quiet())
    checked = verify_cache(work.cache("train"), work.split("train"), work.teacher, work.views_of("train"))

    assert {result.arm for result in results} == {"control", "kd"}
    assert work.capture_key("train").mix
    assert (checked.records, checked.top1_differs) == (64, 0)
    sentences, facts = collect(work)[0].sentences, check_workspace(work)
    assert any(line.startswith("25 unlabeled samples, labelled by the teacher") for line in sentences)
    assert any(line.startswith("2 of the 12 test samples are in train or validation as well") for line in sentences)
    assert facts["validation in train"].startswith("1 of 3 samples")
    assert facts["test in train or validation"].startswith("2 of 12 samples")
