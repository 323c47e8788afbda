"""Which students there could be at a budget: families, blocks of the teacher, and what they cost on a device."""

from pathlib import Path

import pytest

from edgekd.choosing.candidates import candidates_of
from edgekd.choosing.suggest import Budget, Latency, Suggestion, _chosen, _over, parse_share, suggest
from edgekd.console import SilentProgress
from edgekd.errors import UsageError
from edgekd.programs.models import count_parameters
from edgekd.recipes.reading import load_recipe
from edgekd.stages.workspace import Workspace
from edgekd.teachers.sources import load_student_module

RECIPE = """
name = "small"
[data]
train = "mine:train"
test = "mine:test"
[teacher]
model = "mine:teacher"
[student]
model = "mine:student"
[bench]
blocks = 1
warmup_s = 0.01
min_s = 0.01
"""
CODE = """
import numpy as np, torch
from torch import nn
def arrays(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] + x[:, 1] > 0).astype(int)}
def train(): return arrays(300, 0)
def test(): return arrays(100, 1)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)
    def forward(self, x):
        return x + torch.relu(self.inner(x))
def teacher():
    return nn.Sequential(nn.Linear(4, 32), Block(), Block(), Block(), Block(), nn.Linear(32, 2))
def student(width: float = 1.0, layers: int = 1):
    size = max(1, round(40 * width))
    between = [nn.Linear(size, size) for _ in range(layers - 1)]
    return nn.Sequential(nn.Linear(4, size), nn.ReLU(), *between, nn.Linear(size, 2))
def narrow(depth: int = 2):
    return nn.Sequential(nn.Linear(4, 8), *(nn.Linear(8, 8) for _ in range(depth)), nn.Linear(8, 2))
def fixed(): return nn.Linear(4, 2)
"""


def workspace(folder: Path, old: str = "", new: str = "") -> Workspace:
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(RECIPE.replace(old, new))
    return Workspace(load_recipe(folder / "edgekd.toml"))


def test_a_family_is_what_the_students_function_takes_and_blocks_are_the_teachers(tmp_path: Path) -> None:
    found, notes = candidates_of(workspace(tmp_path).recipe)
    names = [candidate.name for candidate in found]

    assert names[0] == "the recipe's own"
    assert "own, width 0.35" in names
    assert names[-2:] == ["teacher, 2 of 4 blocks", "teacher, 1 of 4 blocks"]
    assert notes == []


def test_what_a_candidate_says_makes_it_again(tmp_path: Path) -> None:
    work = workspace(tmp_path)
    candidate = next(c for c in candidates_of(work.recipe)[0] if c.name == "own, width 2")
    path = tmp_path / "edgekd.toml"
    path.write_text(RECIPE.replace('[student]\nmodel = "mine:student"', candidate.lines()))
    recipe = load_recipe(path).student
    made = load_student_module(recipe.model, tmp_path, 0, recipe.told)

    assert candidate.lines() == '[student]\nmodel = "mine:student"\narguments = { "width" = 2.0 }'.replace(
        '"width"', "width"
    )
    assert count_parameters(made) == 4 * 80 + 80 + 80 * 2 + 2


def test_whole_numbers_stay_whole_and_come_once(tmp_path: Path) -> None:
    found, _ = candidates_of(workspace(tmp_path, "mine:student", "mine:narrow").recipe)
    depths = [c.told["arguments"]["depth"] for c in found if "arguments" in c.told]

    assert depths == [1, 3, 4, 6, 8, 11, 16]


def test_a_student_without_knobs_and_a_teacher_without_blocks_are_told(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    work = workspace(tmp_path, "mine:student", "mine:fixed")
    recipe = work.recipe.model_copy(update={"teacher": work.recipe.teacher.model_copy(update={"model": "mine:fixed"})})
    found, notes = candidates_of(recipe)

    assert len(found) == 1
    assert notes == [
        "No family of mine:fixed: it takes neither width nor depth with a number as default "
        "(def student(width: float = 1.0)).",
        "No student of blocks of mine:fixed: it repeats no block of equal shapes.",
    ]


def test_arguments_that_a_function_does_not_take_are_one_line(tmp_path: Path) -> None:
    workspace(tmp_path)
    with pytest.raises(UsageError, match=r"mine:student, arguments .*'hight'; it takes width, layers"):
        load_student_module("mine:student", tmp_path, 0, {"arguments": {"hight": 2}})


def test_a_share_is_a_range_of_numbers_or_percents() -> None:
    assert parse_share("0.1:0.2") == (0.1, 0.2)
    assert parse_share("10:20%") == (0.1, 0.2)
    for text in ("0.2", "0.2:0.1", "much"):
        with pytest.raises(UsageError, match="--share"):
            parse_share(text)


def row(share: float, name: str = "", ms: float | None = None) -> Suggestion:
    latency = Latency("host", "measured", "", ms) if ms else Latency("host", "not_run", "no runtime")
    return Suggestion(name, "", int(share * 1000), share, 10, 4000, (latency,))


def test_what_is_nearest_to_the_budget_is_measured_and_the_recipes_own_always() -> None:
    rows = [row(share) for share in (0.9, 0.01, 0.12, 0.25, 0.18, 0.5)]

    assert _chosen(rows, Budget(), 4) == [0, 2, 3, 4]
    assert _chosen(rows, Budget(None), 3) == [0, 1, 5]  # the smallest and the largest
    assert _chosen(rows, Budget(None, megabytes=1e-9), 3) == [0]


def test_every_limit_of_the_budget_is_told_where_it_is_passed() -> None:
    assert _over(row(0.15, ms=1.0), Budget()) == []
    assert _over(row(0.3, ms=1.0), Budget()) == ["30.0% of the teacher, above the budget"]
    assert _over(row(0.3, ms=1.5), Budget(None, 0.003, 5, 1.0)) == ["0.00 MB", "10 MACs", "1.5 ms on host"]
    assert _over(row(0.3), Budget(None, latency_ms=1.0)) == ["its latency was not measured"]


def test_candidates_are_measured_on_a_device_and_the_fastest_within_the_budget_comes_first(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    work = workspace(tmp_path)
    rows, notes = suggest(work, Budget((0.01, 0.1)), ["host", "iphone-16"], "onnx", 2, SilentProgress())

    assert notes == []
    assert len(rows) == 2
    assert [bool(one.over) for one in rows] == sorted(bool(one.over) for one in rows)
    for one in rows:
        host, phone = one.latencies
        assert host.status == "measured"
        assert host.p50_ms is not None
        assert host.p50_ms > 0
        assert host.where.startswith("host (")
        assert (phone.status, phone.p50_ms) == ("not_run", None)
        assert phone.reason
        assert one.size_bytes > 4 * one.parameters  # a file, not a product
        assert one.share == pytest.approx(one.parameters / work.teacher.parameters)  # type: ignore[operator]
        assert bool(one.warnings) == (one.parameters < 0.05 * (work.teacher.parameters or 0))
    within = [one.latency_ms for one in rows if not one.over]
    assert within == sorted(within)


def test_an_unknown_device_or_target_is_a_fault_before_anything_is_written(tmp_path: Path) -> None:
    for devices, target in ((["hosst"], "onnx"), (["host"], "onxx")):
        with pytest.raises(UsageError, match=r"hosst|onxx"):
            suggest(workspace(tmp_path), Budget(), devices, target, 1, SilentProgress())
