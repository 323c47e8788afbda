"""The command line as its users meet it, by what it prints and how it exits; some of it in a process of its own."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.benchmarks.cells import TIMED
from edgekd.precisions import PORTABLE
from edgekd.programs.student_files import load_student, save_student
from edgekd.types import Student

from command import edgekd, in_a_process


@pytest.fixture(scope="module")
def scaffold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    assert edgekd("init", str(folder), cwd=folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def captured(scaffold: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured") / "image"
    shutil.copytree(scaffold, folder)
    assert edgekd("capture", cwd=folder).returncode == 0
    return folder


def test_help_lists_every_command(tmp_path: Path) -> None:
    done = in_a_process("--help", cwd=tmp_path)

    assert done.returncode == 0
    commands = "init check capture distill compress export verify bench report run targets devices doctor"
    for command in commands.split():
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize(("command", "words"), [("compress", PORTABLE), ("compare", tuple(TIMED))])
def test_help_lists_every_word_that_an_option_takes(tmp_path: Path, command: str, words: tuple[str, ...]) -> None:
    done = edgekd(command, "--help", cwd=tmp_path, COLUMNS="110")

    assert len(words) >= 4
    assert ", ".join(words) in " ".join(done.stdout.split())


@pytest.mark.parametrize("template", ["image", "text"])
def test_every_template_passes_check(tmp_path: Path, template: str) -> None:
    if template == "text":
        pytest.importorskip("datasets")
    made = edgekd("init", "--template", template, ".", cwd=tmp_path)
    done = edgekd("check", "--json", cwd=tmp_path)

    assert made.returncode == 0, made.stderr
    assert done.returncode == 0, done.stderr
    assert "train" in json.loads(done.stdout)["samples"]


def test_init_overwrites_nothing(scaffold: Path) -> None:
    done = edgekd("init", ".", cwd=scaffold)

    assert done.returncode == 2
    assert "edgekd.toml exists already" in done.stderr


@pytest.mark.parametrize("folder", ["ok.npz", "ok.npz/inside"])
def test_init_writes_into_no_file(tmp_path: Path, folder: str) -> None:
    (tmp_path / "ok.npz").write_bytes(b"kept")
    done = edgekd("init", "--template", "text", folder, cwd=tmp_path)

    assert done.returncode == 2
    assert done.stderr == "edgekd: ok.npz is a file; choose another folder: edgekd init FOLDER\n"
    assert (tmp_path / "ok.npz").read_bytes() == b"kept"


def test_a_wrong_recipe_is_all_its_lines_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "edgekd.toml").write_text('name = "x"\n[data]\ntrain = "a.npz"\n[teacher]\n[student]\n')
    done = edgekd("check", cwd=tmp_path)

    assert done.returncode == 2
    assert [line.partition(": ")[2].partition(":")[0] for line in done.stderr.splitlines()] == [
        "data.test",
        "teacher",
        "student.model",
        "data.train",
    ]


def write_files(folder: Path, student: Student) -> None:
    """``model.pt2``, half of it, weights without a program, labels that are wrong, and what is no archive."""
    save_student(folder / "s", student, {})
    shutil.copy(folder / "s" / "student.pt2", folder / "model.pt2")
    (folder / "cut.pt2").write_bytes((folder / "model.pt2").read_bytes()[:3000])
    (folder / "bad.npz").write_bytes(b"PK")
    torch.save(student.program.state_dict, folder / "weights.pt2")
    samples = np.random.default_rng(0).normal(size=(8, 1, 12, 12)).astype(np.float32)
    np.savez(folder / "labels.npz", image=samples, label=np.arange(8) % 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run",), "no edgekd.toml in"),
        (("export", "nothing.pt2", "--target", "onnx"), "no model file at nothing.pt2"),
        (("export", "model.pt2"), "which target?"),
        (("export", "model.pt2", "--target", "corml"), "no exporter called 'corml'; there are"),
        (
            ("export", "model.pt2", "--target", "coreml", "--precision", "w8d8"),
            "coreml has no precision 'w8d8'; it has",
        ),
        (("export", "model.pt2", "--target", "onnx", "--precision", "w8a8"), "give them with --calibration"),
        (("export", "cut.pt2", "--target", "onnx"), "it is truncated"),
        (
            ("export", "weights.pt2", "--target", "onnx"),
            "weights.pt2 was not written by torch.export.save, but by torch.save it seems",
        ),
        (("export", "model.pt2", "-t", "onnx", "-p", "w8a8", "--calibration", "bad.npz"), "cannot be read as .npz"),
        (
            ("export", "model.pt2", "-t", "onnx", "-p", "auto", "--calibration", "labels.npz"),
            "'label' of labels.npz: 0 to 6 was found; the model has 5 classes",
        ),
        (("export", "model.pt2", "-t", "onnx", "-p", "fp32", "--observer", "foo"), "no observer called 'foo'; there"),
        (("export", "model.pt2", "-t", "onnx", "--corrections", "round"), "no correction called 'round'; there are"),
        (("export", "-t", "onnx", "--corrections", "none"), "--corrections is for a model file; a recipe says such"),
        (("export", "-t", "onnx", "--max-length", "64"), "--max-length is for a model file"),
        (("export", "model.pt2", "-t", "onnx", "-r", "edgekd.toml"), "either the model file model.pt2 or --recipe"),
    ],
)
def test_what_goes_wrong_is_one_line(
    tmp_path: Path, convnet_student: Student, arguments: tuple[str, ...], message: str
) -> None:
    write_files(tmp_path, convnet_student)
    done = edgekd(*arguments, cwd=tmp_path)

    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export nope.pt2 -t onnx", "no model file at nope.pt2"),
        ("export pt2:nope.pt2 -t onnx", "no model file at nope.pt2"),
        ("export hf:nope -t onnx", "no model folder at nope"),
        ("export model.pt2 -t onnx --calibration nope.npz", "no data file at nope.npz"),
        ("export model.pt2 -t onnx --samples nope.npz", "no data file at nope.npz"),
        ("lint nope.onnx", "no model file at nope.onnx"),
        ("compare nope.onnx nope.onnx", "there is no nope.onnx"),
        ("calibrate nope.onnx", "there is no nope.onnx"),
        ("check -r nope.toml", "nope.toml: No such file"),
        ("generate hf:nope prompts.jsonl out.jsonl", "no model folder at nope"),
        ("generate hf:. nope.jsonl out.jsonl", "no file of prompts at nope.jsonl"),
        ("on-policy hf:nope hf:. prompts.jsonl out", "no model folder at nope"),
        ("on-policy hf:. hf:nope prompts.jsonl out", "no model folder at nope"),
        ("on-policy hf:. hf:. nope.jsonl out", "no file of prompts at nope.jsonl"),
        ("on-policy hf:. hf:. model.pt2 out --weights nope", "no student at nope"),
    ],
)
def test_a_file_that_was_named_and_is_not_there_is_exit_2(
    tmp_path: Path, convnet_student: Student, words: str, message: str
) -> None:
    write_files(tmp_path, convnet_student)
    done = edgekd(*words.split(), cwd=tmp_path)

    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("reference", ["nope.npz", "jsonl:nope.jsonl"])
def test_samples_of_an_app_that_are_not_there_are_exit_2(scaffold: Path, reference: str) -> None:
    done = edgekd("check", "--shift", reference, cwd=scaffold)

    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("edgekd: --shift: no ")


def test_a_wrong_option_of_a_target_is_told_as_it_was_typed(tmp_path: Path, convnet_student: Student) -> None:
    write_files(tmp_path, convnet_student)
    done = edgekd("export", "model.pt2", "-t", "onnx", "--option", "foo=1", "--option", "bar=2", cwd=tmp_path)

    assert done.returncode == 2
    assert [line.partition("; ")[0] for line in done.stderr.splitlines()] == [
        "edgekd: --option onnx.foo: onnx has no such option",
        "edgekd: --option onnx.bar: onnx has no such option",
    ]


@pytest.mark.parametrize("option", ["--ms", "--mb", "--macs"])
@pytest.mark.parametrize("limit", ["-1", "0", "nan"])
def test_a_budget_that_nothing_can_meet_is_refused(scaffold: Path, option: str, limit: str) -> None:
    done = edgekd("suggest", option, limit, cwd=scaffold)

    assert done.returncode == 2
    assert done.stderr == f"edgekd: {option} {limit} is no limit; a number above 0 works\n"


@pytest.mark.parametrize("words", ["run", "export model.pt2 -t onnx -p w8a8 --calibration bad.npz"])
def test_a_process_of_its_own_says_the_same_and_no_more(tmp_path: Path, convnet_student: Student, words: str) -> None:
    """No toolchain that is imported for it says a word of its own."""
    write_files(tmp_path, convnet_student)
    here, there = (run(*words.split(), cwd=tmp_path) for run in (edgekd, in_a_process))

    assert (there.returncode, there.stdout, there.stderr) == (here.returncode, here.stdout, here.stderr)


def test_a_third_party_program_is_exported_and_proven(tmp_path: Path) -> None:
    """A file that torch.export.save wrote, with two inputs, and data by arr_0 and arr_1."""
    pytest.importorskip("onnxruntime")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.left(a)) + self.right(b)

    torch.manual_seed(0)
    torch.export.save(torch.export.export(Two().eval(), (torch.zeros(1, 6), torch.zeros(1, 3))), tmp_path / "model.pt2")
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(40, n)).astype(np.float32) for n in (6, 3)]
    np.savez(tmp_path / "data.npz", *arrays)
    command = (
        "export --target onnx --precision fp32 --precision w8a8 --calibration data.npz --corrections bias model.pt2"
    )
    done = in_a_process(*command.split(), "-o", "out", "--json", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert [(a["target"], a["precision"], a["parity"]["status"]) for a in listed] == [
        ("onnx", "fp32", "passed"),
        ("onnx", "w8a8", "passed"),
    ]
    assert set(listed[0]) >= {"target", "precision", "path", "sha256", "size_bytes", "parity"}
    assert listed[0]["parity"]["samples"] == 10
    manifest = json.loads((tmp_path / "out" / "onnx-w8a8" / "manifest.json").read_text())
    assert manifest["sha256"] == listed[1]["sha256"]
    assert manifest["card"]["calibration"]["samples"] == 30
    assert manifest["card"]["calibration"]["corrections"] == ["bias"]
    assert [spec["name"] for spec in manifest["inputs"]] == ["a", "b"]


def test_a_stage_without_the_one_before_says_which_command_makes_it(scaffold: Path) -> None:
    for command, needed in (
        ("distill", "edgekd capture"),
        ("sweep", "edgekd capture"),
        ("compress", "edgekd distill"),
        ("export", "edgekd distill"),
        ("bench", "edgekd export"),
        ("verify", "edgekd export"),
        ("verify --cache", "edgekd capture"),
        ("report", "edgekd distill"),
    ):
        done = edgekd(*command.split(), cwd=scaffold)

        assert done.returncode == 2, done.stderr
        assert needed in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_caches_that_are_verified_speak_json(captured: Path) -> None:
    done = edgekd("verify", "--cache", "--json", cwd=captured)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [cache["split"] for cache in found] == ["train", "validation", "test"]
    assert all(cache["records"] > 0 and cache["top1_differs"] == 0.0 for cache in found)
    assert all(0 <= cache["max_relative"] < 0.01 for cache in found)
    assert edgekd("verify", "--cache", cwd=captured).stdout == "good\n"


def test_targets_devices_and_doctor_speak_json(tmp_path: Path) -> None:
    targets = json.loads(edgekd("targets", "--json", cwd=tmp_path).stdout)
    devices = json.loads(edgekd("devices", "--json", cwd=tmp_path).stdout)
    findings = json.loads(edgekd("doctor", "--json", cwd=tmp_path).stdout)

    assert {fact["target"] for fact in targets} >= {"onnx", "coreml", "tflite"}
    assert {"fake", "host"} <= {fact["device"] for fact in devices if fact["reachable"]}
    assert all(fact["reason"] for fact in devices if not fact["reachable"])
    assert {finding["state"] for finding in findings} <= {"good", "warn", "bad"}


def test_the_student_of_another_program_keeps_its_card(tmp_path: Path, convnet_student: Student) -> None:
    save_student(tmp_path / "s", convnet_student, {})
    student, _ = load_student(tmp_path / "s")

    assert student.card.labels == ("a", "b", "c", "d", "e")


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path: Path, convnet_student: Student) -> None:
    """On a file system of its own with no room left."""
    pytest.importorskip("onnxruntime")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        save_student(tmp_path / "s", convnet_student, {})
        (small / "kept").write_text("kept")
        done = edgekd("export", str(tmp_path / "s" / "student.pt2"), "-t", "onnx", "-o", str(small / "o"), cwd=tmp_path)

        assert done.returncode == 1
        assert "the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert (small / "kept").read_text() == "kept"
        assert not list(small.rglob("model.onnx"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise FileNotFoundError('no weights; train them first')", "FileNotFoundError at model.py:"),
        ("import no_such_package", "ModuleNotFoundError at model.py:"),
    ],
)
def test_a_fault_in_the_users_own_code_is_one_line_with_its_place(tmp_path: Path, body: str, message: str) -> None:
    edgekd("init", ".", cwd=tmp_path)
    model = tmp_path / "model.py"
    source = model.read_text().replace("def teacher()", "def former_teacher()")
    model.write_text(source + f"\n\ndef teacher() -> nn.Module:\n    {body}\n")
    done = edgekd("check", cwd=tmp_path)

    assert done.returncode == 1
    assert message in done.stderr
    assert "EDGEKD_TRACEBACK=1" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_teacher_that_cannot_take_the_data_is_one_line(tmp_path: Path) -> None:
    edgekd("init", ".", cwd=tmp_path)
    model = tmp_path / "model.py"
    source = model.read_text().replace("def teacher()", "def former_teacher()")
    model.write_text(source + "\n\ndef teacher() -> nn.Module:\n    return nn.Linear(5, 3)\n")
    done = edgekd("check", cwd=tmp_path)

    assert done.returncode == 1
    assert "teacher 'model:teacher' cannot take image (32, 1, 16, 16): mat1 and mat2 shapes" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
