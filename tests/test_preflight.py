"""What a run will cost: the arithmetic, and that the probe does the real work."""

from pathlib import Path

import numpy as np
import pytest

from edgekd.choosing import preflight as module
from edgekd.choosing.preflight import ArmCost, Preflight, duration, preflight
from edgekd.data.samples import split_from_arrays
from edgekd.recipes.reading import load_recipe
from edgekd.stages.workspace import Workspace

RECIPE = """
name = "small"
[data]
train = "mine:train"
test = "mine:test"
augment = "mine:augment"
views = 3
[teacher]
model = "mine:teacher"
[student]
model = "mine:student"
[distill]
arms = ["control", "kd"]
epochs = 7
batch_size = 32
seeds = [0, 1]
threads = 1
[distill.overrides.kd]
epochs = 5
"""
CODE = """
import numpy as np, torch
from torch import nn
def arrays(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] + x[:, 1] > 0).astype(int)}
def train(): return arrays(3000, 0)
def test(): return arrays(100, 1)
def augment(sample, generator): return {"x": sample["x"] + 0.1 * torch.randn(4, generator=generator)}
class Teacher(nn.Module):
    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), 4 * (x[:, 0] + x[:, 1])], 1)
def teacher(): return Teacher()
def student(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""


def workspace(folder: Path) -> Workspace:
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(RECIPE)
    return Workspace(load_recipe(folder / "edgekd.toml"))


def test_the_cost_of_a_run_is_that_of_its_passes_steps_and_students() -> None:
    arms = (ArmCost("control", 100, 0.5, 3.0, 7.0, 20), ArmCost("kd", 200, 0.25, 0.0, 10.0, 18))
    cost = Preflight(passes=4000, pass_s=0.01, probed=5120, arms=arms, students=3, probe_s=12.0)

    assert cost.capture_s == pytest.approx(40)
    assert cost.training_s == pytest.approx(3 * (3 + 50 + 7 + 50 + 10))
    assert cost.facts() == {
        "capture": "4,000 passes of the teacher, about 40 s (10 ms each, probed on 5,120)",
        "training": "6 students, about 6 min (steps: control 100 of 500 ms, kd 200 of 250 ms; probed on 18)",
        "probe": "took 12 s",
    }


def test_durations_read_as_people_say_them() -> None:
    assert [duration(s) for s in (0.53, 95.2, 600, 9000)] == ["0.5 s", "95 s", "10 min", "2.5 h"]


def test_a_probe_captures_and_trains_for_real_and_leaves_nothing(tmp_path: Path) -> None:
    work = workspace(tmp_path)
    cost = preflight(work)
    train, plain = len(work.splits.train), len(work.splits.validation) + 100

    assert cost.passes == 3 * train + plain
    assert [arm.arm for arm in cost.arms] == ["control", "kd"]
    assert [arm.steps for arm in cost.arms] == [7 * -(-train // 32), 5 * -(-train // 32)]
    assert all(arm.probed == module.BATCHES for arm in cost.arms)
    assert module.BATCHES * 256 - 3 * 32 < cost.probed <= module.BATCHES * 256
    assert cost.students == 2
    assert min(cost.pass_s, *(arm.step_s for arm in cost.arms)) > 0
    assert not work.folder.path.exists()


def test_a_slow_teacher_is_probed_on_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = workspace(tmp_path)
    monkeypatch.setattr(module, "MOST_S", 0.0)
    cost = preflight(work)

    assert cost.probed == 2 * 3  # two samples, their three views
    assert all(arm.probed == 1 for arm in cost.arms)


def test_samples_with_a_label_come_first_since_the_control_learns_from_nothing_else() -> None:
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    labels = np.full(50, -1)
    labels[17] = 1
    order = module._labelled_first(split_from_arrays({"x": x, "label": labels}), 8)

    assert order[0] == 17
    assert sorted(order) == list(range(50))
