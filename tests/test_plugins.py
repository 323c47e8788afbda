"""Plugins by name, and the user's own functions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd import plugins
from edgekd.errors import MissingToolchainError, UsageError


def test_unknown_target_names_the_known() -> None:
    with pytest.raises(
        UsageError, match="no exporter called 'corml'; there are coreai, coreml, executorch, onnx, ort, tflite"
    ):
        plugins.load_exporter("corml")


def test_unknown_kind_of_device_names_the_known() -> None:
    with pytest.raises(UsageError, match=r"no kind of device called 'pixel'; there are .*host"):
        plugins.load_kind("pixel")


def test_a_missing_toolchain_is_answered_with_its_install_line() -> None:
    class Absent:
        suffix, requires, extra, precisions = ".x", ("no_such_module",), "onnx", ("fp32",)

    with pytest.raises(MissingToolchainError, match=r"no_such_module.*pip install 'edgekd\[onnx\]'"):
        plugins.require("x", Absent())  # type: ignore[arg-type]


def test_a_function_beside_the_recipe_is_found_and_its_siblings_too(tmp_path: Path) -> None:
    (tmp_path / "sibling_module.py").write_text("VALUE = 3\n")
    (tmp_path / "mine.py").write_text("from sibling_module import VALUE\ndef f(): return VALUE\n")

    assert plugins.load_function("mine:f", tmp_path)() == 3


def test_two_recipes_may_have_a_module_of_the_same_name(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(f"def f(): return {value}\n")

    assert plugins.load_function("model:f", tmp_path / "a")() == 1
    assert plugins.load_function("model:f", tmp_path / "b")() == 2


def test_a_function_that_is_not_there_names_the_near_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def teacher(): ...\n")

    with pytest.raises(UsageError, match="mine has no 'techer'; near names: teacher"):
        plugins.load_function("mine:techer", tmp_path)
    with pytest.raises(UsageError, match="no module 'nobody' beside the recipe"):
        plugins.load_function("nobody:f", tmp_path)


def test_a_package_of_someone_else_adds_a_target_by_entry_point(tmp_path: Path) -> None:
    """Installed as pip would leave it: a module, and a .dist-info with its entry points."""
    (tmp_path / "their_target.py").write_text(
        "class Theirs:\n"
        "    suffix, requires, extra, precisions = '.theirs', (), 'theirs', ('fp32',)\n"
        "    def write(self, student, path, precision): path.write_bytes(b'theirs')\n"
        "    def load(self, path): raise NotImplementedError\n"
        "EXPORTER = Theirs()\n"
    )
    info = tmp_path / "their_target-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-target\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgekd.exporters]\ntheirs = their_target:EXPORTER\n")
    done = subprocess.run(
        [sys.executable, "-m", "edgekd.cli.app", "targets"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
    )

    assert [line.split() for line in done.stdout.splitlines() if line.startswith("theirs")] == [
        ["theirs", "fp32", "ready"]
    ]
