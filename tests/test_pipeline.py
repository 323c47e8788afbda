"""The whole way on the image template, with ONNX Runtime: what is done once, what is done again, and after a kill."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgekd.cli.scaffold import write_template
from edgekd.errors import CacheError, DataError, NumericalError, ParityError
from edgekd.recipes.reading import load_recipe
from edgekd.stages.workspace import Workspace
from edgekd.store import hash_path

from command import edgekd, in_a_process
from listening import Listening

pytest.importorskip("onnxruntime")

CHANGES = {
    'targets = ["onnx", "coreml", "tflite"]': 'targets = ["onnx"]',
    "epochs = 12": "epochs = 2",
    "blocks = 6": "blocks = 1\nmin_s = 0.1",
    "views = 4": "views = 2",
}


def make_recipe(folder: Path, **changes: str) -> Path:
    write_template("image", folder)
    path = folder / "edgekd.toml"
    text = path.read_text()
    for old, new in {**CHANGES, **changes}.items():
        assert old in text, old
        text = re.sub(re.escape(old) + r"( +#.*)?", new, text, count=1)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_recipe(folder)
    done = in_a_process("run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Workspace:
    """A finished run of one's own, to spoil."""
    shutil.copytree(finished, tmp_path / "run")
    return Workspace(load_recipe(tmp_path / "run" / "edgekd.toml"))


def test_a_run_leaves_everything_that_the_report_tells(finished: Path) -> None:
    folder = finished / "runs" / "shapes"
    report = json.loads((folder / "report.json").read_text())
    stages = [row["stage"] for row in report["ledger"]["rows"]]

    assert stages == ["teacher", "control", "student", "student", "compressed", "artifact", "artifact"]
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert {arm["arm"] for arm in report["arms"]} == {"control", "kd", "dist"}
    assert all(a["parity"]["status"] == "passed" for a in report["artifacts"])
    assert all(a["card"]["lineage"][0].startswith("teacher: ") for a in report["artifacts"])
    measured = {m["precision"]: m for m in report["measurements"]}
    assert set(measured) == {"fp32", "w8a8"}
    assert all(m["accuracy"] is not None and m["summary"]["p50_ms"] > 0 for m in measured.values())
    assert not list(folder.glob("checkpoints/*"))


def test_accuracy_of_the_file_is_that_of_the_program(finished: Path) -> None:
    report = json.loads((finished / "runs" / "shapes" / "report.json").read_text())
    rows = {(row["stage"], row["name"]): row for row in report["ledger"]["rows"]}
    students = {row["accuracy"] for (stage, _), row in rows.items() if stage == "student"}

    assert rows["artifact", "onnx-fp32"]["accuracy"] in students
    measured = next(m for m in report["measurements"] if m["precision"] == "fp32")
    assert measured["accuracy"] == rows["artifact", "onnx-fp32"]["accuracy"]


def test_more_seeds_are_trained_beside_the_first_and_later_commands_know_them(copied: Workspace) -> None:
    folder = copied.recipe.folder
    done = edgekd("distill", "--seeds", "3", cwd=folder)

    assert done.returncode == 0, done.stderr
    assert "distill-kd-0: unchanged" in done.stderr
    assert len(re.findall(r"^(control|kd|dist) +seed [012] ", done.stdout, re.MULTILINE)) == 9
    told = edgekd("report", cwd=folder)
    report = json.loads((folder / "runs" / "shapes" / "report.json").read_text())
    arms = {arm["arm"]: arm for arm in report["ledger"]["arms"]}
    assert told.returncode == 0, told.stderr
    assert {arm["seeds"] for arm in arms.values()} == {3}
    assert arms["control"]["gain"] is None
    for arm in ("kd", "dist"):
        means = [r["test"]["accuracy"] for r in report["arms"] if r["arm"] == arm]
        assert arms[arm]["accuracy"] == pytest.approx(sum(means) / 3)
        assert arms[arm]["gain"]["low"] <= arms[arm]["gain"]["points"] <= arms[arm]["gain"]["high"]
    assert "paired over 3 seeds" in told.stdout
    assert " ± " in told.stdout
    assert len(list((folder / "runs" / "shapes" / "answers").glob("*.npz"))) == 9


def test_a_second_run_does_nothing_again_and_says_so(finished: Path) -> None:
    again = edgekd("run", cwd=finished)
    unchanged = re.findall(r"^(\S+): unchanged, not done again$", again.stderr, re.MULTILINE)

    assert again.returncode == 0
    assert unchanged == [
        *(f"capture-{split}" for split in ("train", "validation", "test")),
        *(f"distill-{arm}-0" for arm in ("control", "kd", "dist")),
        "compress-w8a8",
        "export-onnx-fp32",
        "export-onnx-w8a8",
        "bench-host",
    ]


def test_a_run_that_is_killed_again_and_again_goes_on_to_the_same_student(finished: Path, tmp_path: Path) -> None:
    make_recipe(tmp_path)
    shutil.copy(finished / "teacher.safetensors", tmp_path)  # the teacher is not edgekd's to make
    for moment in ("capture train: started", "kd, seed 0: started", "export onnx fp32: started"):
        process = subprocess.Popen(
            [sys.executable, "-m", "edgekd.cli.app", "run"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        try:
            assert any(line.startswith(moment) for line in process.stderr), f"it ended before {moment!r}"
        finally:
            process.kill()
            process.stderr.close()
        assert process.wait(60) == -signal.SIGKILL, moment
    resumed = in_a_process("run", cwd=tmp_path)

    assert resumed.returncode == 0, resumed.stderr
    for name in (
        *(f"students/{arm}-0/{file}" for arm in ("control", "kd", "dist") for file in ("student.pt2", "card.json")),
        "cache/train",
        "artifacts/onnx-fp32/model.onnx",
        "artifacts/onnx-w8a8/model.onnx",
    ):
        assert hash_path(tmp_path / "runs/shapes" / name) == hash_path(finished / "runs/shapes" / name), name
    leftovers = [p.name for p in (tmp_path / "runs/shapes").rglob(".*")]
    assert not leftovers


def test_only_what_changed_is_done_again(copied: Workspace) -> None:
    path = copied.recipe.folder / "edgekd.toml"
    path.write_text(path.read_text().replace("samples = 64 ", "samples = 32 "))
    again = edgekd("run", cwd=copied.recipe.folder)

    assert again.returncode == 0, again.stderr
    assert "distill-kd-0: unchanged" in again.stderr
    assert "export-onnx-fp32: unchanged" not in again.stderr
    manifest = json.loads((copied.folder.artifact("onnx", "fp32") / "manifest.json").read_text())
    assert manifest["parity"]["samples"] == 32


def test_a_comment_costs_nothing_and_another_student_costs_no_teacher(copied: Workspace) -> None:
    model = copied.recipe.folder / "model.py"
    model.write_text(model.read_text() + "\n# A comment.\n")
    commented = edgekd("run", cwd=copied.recipe.folder)
    model.write_text(model.read_text().replace("return _network(10)", "return _network(11)"))
    wider = edgekd("run", cwd=moved(copied.recipe.folder))

    assert commented.stderr.count("unchanged, not done again") == 10
    assert wider.returncode == 0, wider.stderr
    assert "capture-train: unchanged" in wider.stderr
    assert "distill-kd-0: unchanged" not in wider.stderr


def moved(folder: Path) -> Path:
    """Elsewhere the module beside the recipe has another name, so that this process reads it again."""
    return Path(shutil.move(folder, folder.with_name("moved")))


def test_another_augmentation_is_captured_again(copied: Workspace) -> None:
    model = copied.recipe.folder / "model.py"
    before = copied.capture_key("train").augmentation
    model.write_text(model.read_text().replace("image.flip(-1)", "image.flip(-2)"))
    changed = Workspace(load_recipe(moved(copied.recipe.folder) / "edgekd.toml"))

    assert changed.capture_key("train").augmentation != before
    assert changed.capture_key("test").augmentation == ""


def test_verify_finds_a_file_that_was_changed(copied: Workspace) -> None:
    from edgekd.stages.verify import verify_artifacts

    verify_artifacts(copied, Listening())
    path = copied.folder.artifact("onnx", "fp32") / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(ParityError, match="its sha256 differs"):
        verify_artifacts(copied, Listening())


def test_verify_runs_the_teacher_again(copied: Workspace) -> None:
    from edgekd.stages.verify import verify_caches

    progress = Listening()
    verify_caches(copied, progress)

    assert len(progress.lines) == 3
    assert "top class differs in 0.00%" in progress.lines[0]


def test_a_cache_that_was_whole_when_the_run_was_killed_is_not_captured_again(copied: Workspace) -> None:
    (record,) = copied.folder.path.rglob("capture-train.json")
    record.unlink()
    done = edgekd("capture", cwd=copied.recipe.folder)

    assert done.returncode == 0, done.stderr
    assert "capture train: " not in done.stderr
    assert record.is_file()
    assert "capture train: " in edgekd("capture", "--force", cwd=copied.recipe.folder).stderr


def test_a_teacher_that_answers_otherwise_than_its_cache_is_found_though_its_weights_are_the_same(
    copied: Workspace,
) -> None:
    model = copied.recipe.folder / "model.py"
    changed = "return model.eval().register_forward_hook(lambda module, inputs, output: 3 * output) and model"
    model.write_text(model.read_text().replace("return model.eval()", changed))
    folder = moved(copied.recipe.folder)
    told = edgekd("capture", cwd=folder)

    assert told.returncode == 1
    assert "this is another teacher, augmentation or data set; run: edgekd capture --force" in told.stderr
    assert edgekd("capture", "--force", cwd=folder).returncode == 0
    assert edgekd("capture", cwd=folder).returncode == 0


def test_what_was_judged_on_other_test_samples_is_compressed_again(copied: Workspace) -> None:
    assert copied.folder.done_with("compress-w8a8")["test"] == copied.capture_key("test").to_json()


def test_a_damaged_cache_shard_stops_distill_and_is_captured_again_by_run(copied: Workspace) -> None:
    from edgekd.stages.pipeline import distill_stage

    shard = copied.folder.cache("train") / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 255
    shard.write_bytes(content)

    with pytest.raises(CacheError, match="damaged"):
        distill_stage(copied, Listening())
    assert edgekd("run", cwd=copied.recipe.folder).returncode == 0


def test_a_file_that_computes_something_else_is_kept_aside(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that drops an activation: the bug class that this project exists to end."""
    import dataclasses

    import edgekd.exporters.onnx as target
    from edgekd.programs.tracing import retrace
    from edgekd.stages.pipeline import export_stage
    from edgekd.types import Student

    write: Callable[..., None] = type(target.EXPORTER).write

    def dropping(self: object, student: Student, path: Path, precision: str, options: object) -> None:
        module = student.program.module()
        for node in list(module.graph.nodes):
            if "relu" in str(node.target):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
                break
        module.recompile()
        write(self, dataclasses.replace(student, program=retrace(module, student.program)), path, precision, options)

    good = hash_path(copied.folder.artifact("onnx", "fp32"))
    monkeypatch.setattr(type(target.EXPORTER), "write", dropping)
    with pytest.raises(ParityError, match=r"onnx fp32 failed its proof.*onnx-fp32\.failed.*output 'logits': max error"):
        export_stage(copied, Listening(), precisions=["fp32"], force=True)

    failed = copied.folder.path / "artifacts" / "onnx-fp32.failed"
    assert json.loads((failed / "manifest.json").read_text())["parity"]["status"] == "failed"
    assert hash_path(copied.folder.artifact("onnx", "fp32")) == good


def test_nan_from_the_teacher_is_one_line(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    model = tmp_path / "model.py"
    source = model.read_text().replace("def teacher()", "def healthy_teacher()")
    sick = """

class Sick(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return torch.full((len(image), 3), float("nan"))


def teacher() -> nn.Module:
    return Sick()
"""
    model.write_text(source + sick)
    from edgekd.stages.check import check_workspace
    from edgekd.stages.pipeline import capture_stage

    work = Workspace(load_recipe(tmp_path / "edgekd.toml"))
    with pytest.raises(NumericalError, match="NaN or infinity"):
        check_workspace(work)
    with pytest.raises(NumericalError, match="the teacher gives NaN or infinity for"):
        capture_stage(work, Listening())


def test_a_student_that_does_not_fit_the_teacher_is_one_line(tmp_path: Path) -> None:
    make_recipe(tmp_path)
    model = tmp_path / "model.py"
    model.write_text(
        model.read_text().replace("return _network(10)", "return nn.Sequential(nn.Flatten(), nn.Linear(256, 4))")
    )
    from edgekd.stages.check import check_workspace

    with pytest.raises(DataError, match="the student gives 4 classes, the teacher 3, and there are 3 labels"):
        check_workspace(Workspace(load_recipe(tmp_path / "edgekd.toml")))


def test_a_loss_of_the_users_own_is_an_arm(tmp_path: Path) -> None:
    from edgekd.stages.pipeline import capture_stage, distill_stage

    changes = {
        'arms = ["control", "kd", "dist"]': 'arms = ["model:squared"]',
        "overrides.dist": 'overrides."model:squared"',
    }
    make_recipe(tmp_path, **changes, **{"views = 2": "views = 1"})
    model = tmp_path / "model.py"
    # The first weights of a student may depend on the number of threads, so that is set before it is made.
    source = model.read_text().replace(
        "return _network(10)", "assert torch.get_num_threads() == 1\n    return _network(10)"
    )
    model.write_text(source)
    loss = "def squared(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:\n"
    model.write_text(
        model.read_text()
        + f"\n\n{loss}    return ((student - teacher).square() * torch.tensor([1.0, 2.0, 1.0])).mean()\n"
    )
    work = Workspace(load_recipe(tmp_path / "edgekd.toml"))
    capture_stage(work, Listening())
    torch.set_num_threads(2)
    results = distill_stage(work, Listening())

    assert [result.arm for result in results] == ["control", "model:squared"]
    assert (work.folder.arm("model:squared", 0) / "student.pt2").is_file()


def test_views_that_the_teacher_cannot_read_are_told(finished: Path, tmp_path: Path) -> None:
    """An augmentation that drowns the image: the lesson of the spam example, where masked mails misled the students."""
    from edgekd.reporting.summary import _view_sentences
    from edgekd.stages.pipeline import capture_stage

    make_recipe(tmp_path)
    model = tmp_path / "model.py"
    drowned = "image = image + 9 * torch.randn(image.shape, generator=generator)\n    return {"
    model.write_text(model.read_text().replace('return {"image": image}', drowned + '"image": image}'))
    shutil.copy(finished / "teacher.safetensors", tmp_path)
    work = Workspace(load_recipe(tmp_path / "edgekd.toml"))
    capture_stage(work, Listening())

    assert "a milder data.augment may help" in _view_sentences(work)[0]
    assert _view_sentences(Workspace(load_recipe(finished / "edgekd.toml"))) == []
