"""What is named beside a recipe is found however its module comes by it, and nothing is run to find it."""

from pathlib import Path

import pytest

from edgekd.recipes.places import function_fault


@pytest.mark.parametrize(
    "source",
    [
        "def found(): ...",
        "class found: ...",
        "found = 1",
        "from others import first, found",
        "from others import first as found",
        "import found",
        "if True:\n    def found(): ...",
        "from others import *",
        "this is no Python",
    ],
)
def test_a_name_is_found_however_it_is_bound(tmp_path: Path, source: str) -> None:
    (tmp_path / "mine.py").write_text(source)

    assert function_fault("mine:found", tmp_path) == ""


@pytest.mark.parametrize("source", ["", "# def found", "def foundling(): ...", "text = 'import found'", "print(found)"])
def test_a_name_that_nothing_binds_is_a_fault(tmp_path: Path, source: str) -> None:
    (tmp_path / "mine.py").write_text(source)

    assert function_fault("mine:found", tmp_path) == "mine.py beside the recipe defines no 'found'"
