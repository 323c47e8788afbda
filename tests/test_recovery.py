"""A recipe's student, compressed with the teacher at hand: trained with its rounding, mixed within a budget, told."""

import hashlib
import shutil
from pathlib import Path

import pytest

import edgekd.distillation.train
from edgekd.cli.app import app
from edgekd.cli.scaffold import write_template
from edgekd.compression.mixed import mixed_precision
from edgekd.errors import RecipeError, UsageError
from edgekd.programs.student_files import load_student
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe import parse_drop
from edgekd.reporting.summary import collect
from edgekd.stages.pipeline import capture_stage, compress_stage, distill_stage, export_stage, prune_stage
from edgekd.stages.results import shipped
from edgekd.stages.workspace import Workspace
from edgekd.store import read_json

from listening import Listening


def make_recipe(folder: Path) -> Path:
    """The image template, cut down to seconds."""
    write_template("image", folder)
    path = folder / "edgekd.toml"
    text = path.read_text()
    for old, new in {"epochs = 12": "epochs = 2", "views = 4": "views = 2"}.items():
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


class Stopping(Listening):
    """Breaks off after so many steps of a training."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def advance(self, steps: int = 1, note: str = "") -> None:
        if note.startswith("loss"):
            self.left -= steps
            if self.left < 0:
                raise KeyboardInterrupt


def workspace(folder: Path) -> Workspace:
    return Workspace(load_recipe(folder / "edgekd.toml"))


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    make_recipe(folder)
    work = workspace(folder)
    capture_stage(work, Listening())
    distill_stage(work, Listening())
    return folder


def digest(work: Workspace, precision: str) -> str:
    return hashlib.sha256((work.folder.compressed(precision) / "student.pt2").read_bytes()).hexdigest()


def test_a_trained_student_is_told_as_one_and_an_export_does_not_undo_it(distilled: Path) -> None:
    pytest.importorskip("onnxruntime")
    work = workspace(distilled)
    compress_stage(work, Listening(), ["w4a8"], qat=True)
    folder = work.folder.compressed("w4a8")
    (retraining,) = load_student(folder)[0].card.retraining
    record = read_json(folder / "result.json")
    assert (retraining.method, retraining.epochs) == ("qat", 3)
    assert retraining.arm in ("kd", "dist")
    assert retraining.before == record["before"]["accuracy"]
    assert retraining.after == record["test"]["accuracy"]
    assert retraining.control == record["control"]["accuracy"]
    before = digest(work, "w4a8")
    again = Listening()
    compress_stage(work, again, ["w4a8"], qat=True)
    assert again.lines == ["compress-w4a8: unchanged, not done again"]
    (artifact,) = export_stage(work, again, ["onnx"], ["w4a8"])
    assert digest(work, "w4a8") == before
    notes = " ".join(read_json(artifact / "manifest.json")["notes"])
    assert "qat for 3 epochs" in notes
    assert f"{retraining.before:.2%} before, {retraining.after:.2%} after" in notes
    ledger, _ = collect(work)
    row = next(row for row in ledger.rows if row.stage == "compressed" and row.name == "w4a8")
    assert "qat for 3 epochs" in row.note
    compress_stage(work, Listening(), ["w4a8"], qat=False)
    assert load_student(folder)[0].card.retraining == ()


def test_a_training_that_was_broken_off_goes_on_to_the_same_student(
    distilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgekd.distillation.train, "CHECKPOINT_EVERY_S", 0.0)
    work = workspace(distilled)
    compress_stage(work, Listening(), ["w8a8"], force=True, qat=True)
    whole = digest(work, "w8a8")
    with pytest.raises(KeyboardInterrupt):
        compress_stage(work, Stopping(9), ["w8a8"], force=True, qat=True)
    assert list((work.folder.path / "checkpoints").glob("qat-w8a8-*"))
    resumed = Stopping(10_000)
    compress_stage(work, resumed, ["w8a8"], force=True, qat=True)
    assert digest(work, "w8a8") == whole
    assert not list((work.folder.path / "checkpoints").glob("qat-*"))


def test_auto_is_chosen_on_validation_and_never_sees_the_test_split(
    distilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workspace(distilled)
    seen: list[int] = []
    search = mixed_precision

    def watched(student, calibration, budget, *rest):  # type: ignore[no-untyped-def]
        seen.append(len(budget.labels))
        arrays = work.splits.validation.arrays()
        assert all((budget.samples[name] == arrays[name]).all() for name in arrays)
        return search(student, calibration, budget, *rest)

    monkeypatch.setattr("edgekd.stages.recovery.mixed_precision", watched)
    compress_stage(work, Listening(), ["auto"], max_drop=0.02)
    assert seen == [len(work.splits.validation)]
    card = load_student(work.folder.compressed("auto"))[0].card
    assert card.mixture is not None
    assert (card.mixture.metric, card.mixture.max_drop) == ("accuracy", 0.02)
    assert card.mixture.drop <= 0.02
    again = Listening()
    compress_stage(work, again, ["auto"])  # what was said last stays
    assert again.lines == ["compress-auto: unchanged, not done again"]


def test_a_recipe_that_prunes_ships_the_pruned_student(distilled: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    shutil.copytree(distilled, tmp_path / "run")
    path = tmp_path / "run" / "edgekd.toml"
    path.write_text(path.read_text().replace("[compress]", '[compress]\nprune = "channels:0.25"\nprune_epochs = 1', 1))
    work = workspace(path.parent)
    files = export_stage(work, Listening(), ["onnx"], ["fp32", "w8"])
    small, whole = load_student(work.folder.pruned)[0].card, load_student(shipped(work)[1])[0].card
    assert small.macs is not None
    assert whole.macs is not None
    assert small.macs < 0.8 * whole.macs
    for folder in files:
        manifest = read_json(folder / "manifest.json")
        assert manifest["card"]["macs"] == small.macs
        assert any("pruning channels:0.25 for 1 epochs" in note for note in manifest["notes"])
    ledger, _ = collect(work)
    assert "channels:0.25" in [row.name for row in ledger.rows if row.stage == "compressed"]
    again = Listening()
    prune_stage(work, again)
    assert again.lines == ["prune: unchanged, not done again"]
    path.write_text(path.read_text().replace("channels:0.25", "channels:2"))
    with pytest.raises(RecipeError, match=r"compress\.prune: 'channels:2'.* is no pruning"):
        load_recipe(path)


def test_training_is_for_static_activations(distilled: Path) -> None:
    with pytest.raises(UsageError, match="quantization-aware training is for w8a8, w4a8; asked was w8"):
        compress_stage(workspace(distilled), Listening(), ["w8"], qat=True)


def test_a_budget_is_read_as_people_write_it(tmp_path: Path) -> None:
    assert [parse_drop(text) for text in ("0.5pt", "0.5%", "0.005", " 1 pt")] == pytest.approx([0.005] * 3 + [0.01])
    with pytest.raises(ValueError, match="'half' is no budget"):
        parse_drop("half")
    path = make_recipe(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("[compress]", '[compress]\nmax_drop = "0.5pt"\nqat_epochs = 2', 1))
    spec = load_recipe(path).compress
    assert spec.max_drop == pytest.approx(0.005)
    assert spec.qat_epochs == 2
    path.write_text(text.replace("[compress]", '[compress]\nmax_drop = "all"\nqat_epochs = -1', 1))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert any(fault.startswith("compress.max_drop: ") and "0.5pt" in fault for fault in error.value.faults)
    assert any(fault.startswith("compress.qat_epochs: ") for fault in error.value.faults)


def test_the_command_line_refuses_a_budget_that_is_none(distilled: Path) -> None:
    from typer.testing import CliRunner

    recipe = str(distilled / "edgekd.toml")
    done = CliRunner().invoke(app, ["compress", "-r", recipe, "-p", "auto", "--max-drop", "half"])
    assert isinstance(done.exception, UsageError)
    assert "--max-drop 'half' is no budget; 0.5pt (half a point) or 0.005 works" in str(done.exception)
