"""A sweep on a small recipe: it finds what is better, goes on after a kill, and never looks at the test split."""

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.choosing.judging import Judged, hold_out, judge
from edgekd.choosing.sweep import Sweep, Swept, _in_processes, sweep
from edgekd.choosing.sweep_space import Knob, Settings, own_settings, parse_knob, space_of, tidy, with_settings
from edgekd.choosing.sweep_words import is_worse, recipe_lines, sentences, write_settings
from edgekd.console import SilentProgress
from edgekd.data.samples import split_from_arrays
from edgekd.data.truth import NO_LABEL
from edgekd.data.views import Views
from edgekd.errors import UsageError
from edgekd.protocols import Progress
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe import Distill
from edgekd.stages.pipeline import distill_stage
from edgekd.stages.workspace import Workspace
from edgekd.teachers.capture import capture

from listening import Listening

RECIPE = """
name = "small" # a comment that stays
[data]
train = "mine:train"
test = "mine:test"
validation_share = 0.2
[teacher]
model = "mine:teacher"
[student]
model = "mine:student"
[distill]
arms = ["control", "kd"]
epochs = 4
batch_size = 64
learning_rate = 1e-4 # far too low: a sweep finds better
threads = 1
"""
CODE = """
import numpy as np, torch
from torch import nn
def arrays(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] + x[:, 1] > 0).astype(int)}
def train(): return arrays(700, 0)
def test(): raise RuntimeError("the test split was read")
class Teacher(nn.Module):
    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), 4 * (x[:, 0] + x[:, 1])], 1)
def teacher(): return Teacher()
def student(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""


def workspace(folder: Path, recipe: str = RECIPE) -> Workspace:
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(recipe)
    return Workspace(load_recipe(folder / "edgekd.toml"))


def recipe_of(folder: Path, **distill: object):  # type: ignore[no-untyped-def]
    recipe = workspace(folder).recipe
    return recipe.model_copy(update={"distill": Distill.model_validate({"arms": ("control", "kd"), **distill})})


# ── what is tried ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_knob_is_a_range_values_or_one_value() -> None:
    assert parse_knob("temperature", "1:8") == Knob(low=1, high=8, is_log=True)
    assert parse_knob("temperature", "4,1,2") == Knob((1.0, 2.0, 4.0))
    assert parse_knob("label_weight", "0:0.5") == Knob(low=0, high=0.5)
    assert parse_knob("learning_rate", "3e-3") == Knob((0.003,))
    for name, text in (("temperature", "8:1"), ("temperature", "hot"), ("temperature", "0:4"), ("label_weight", "0:2")):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
            parse_knob(name, text)


def test_the_usual_space_holds_what_the_recipe_says(tmp_path: Path) -> None:
    space, notes = space_of(recipe_of(tmp_path, temperature=20.0, learning_rate=1e-3), "kd", "dense-f16", {})

    assert (space["temperature"].low, space["temperature"].high) == (1, 20)
    assert (space["learning_rate"].low, space["learning_rate"].high) == pytest.approx((2e-4, 5e-3))
    assert notes == ()
    assert list(space_of(recipe_of(tmp_path), "control", "dense-f16", {})[0]) == ["learning_rate"]


def test_a_cache_of_the_top_classes_says_which_temperatures_it_serves(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    usual, notes = space_of(recipe, "kd", "top10", {})
    some, told = space_of(recipe, "kd", "top10", {"temperature": parse_knob("temperature", "1,3,4")})
    draws, _ = space_of(recipe, "kd", "sampled50", {})

    assert usual["temperature"] == Knob((1.0, 2.0, 4.0))
    assert notes[0].startswith("Temperatures: this top10 cache is exact at T = 1, 2, 4 alone")
    assert some["temperature"] == Knob((1.0, 4.0))
    assert "3 is left out" in told[0]
    assert draws["temperature"] == Knob((1.0,))
    with pytest.raises(UsageError, match=r"--temperature 3: this top10 cache is exact at T = 1, 2, 4 alone; take"):
        space_of(recipe, "kd", "top10", {"temperature": Knob((3.0,))})


def test_what_an_arm_does_not_have_is_not_swept(tmp_path: Path) -> None:
    hard = recipe_of(tmp_path, arms=("control", "hard"))

    assert "temperature" not in space_of(hard, "hard", "dense-f16", {})[0]
    with pytest.raises(UsageError, match="the control has no temperature"):
        space_of(hard, "control", "dense-f16", {"temperature": Knob((2.0,))})
    with pytest.raises(UsageError, match=r"no arm 'kd' is trained; distill\.arms has control, hard"):
        space_of(hard, "kd", "dense-f16", {})


def test_settings_go_into_the_arms_own_table_and_out_again(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, overrides={"kd": {"weight_decay": 0.5}})
    changed = with_settings(recipe, "kd", Settings(0.01, 3.0, 0.2))

    assert own_settings(changed, "kd") == Settings(0.01, 3.0, 0.2)
    assert own_settings(changed, "control") == Settings(1e-3)
    assert changed.distill.for_arm("kd").weight_decay == 0.5
    assert tidy(Settings(0.012345, 3.456, 0.12345)) == Settings(0.012, 3.5, 0.12)


# ── who judges ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_choices_and_the_verdict_are_made_on_different_samples_and_none_is_learned_from(tmp_path: Path) -> None:
    work = workspace(tmp_path)
    held, train = hold_out(work), work.splits.train
    learned = train.ids[held.learned_from]

    assert 0.15 < len(held.chosen_on) / len(train) < 0.25
    assert len(learned) + len(held.chosen_on) == len(train)
    assert not np.isin(held.chosen_on.ids, learned).any()
    assert held.judged_on is work.splits.validation


def test_where_samples_are_mixed_validation_is_shared_out(tmp_path: Path) -> None:
    work = workspace(tmp_path, RECIPE.replace("[teacher]", 'mix = "mixup"\nviews = 2\n[teacher]'))
    held, validation = hold_out(work), work.splits.validation

    assert len(held.learned_from) == len(work.splits.train)
    assert sorted([*held.chosen_on.ids, *held.judged_on.ids]) == sorted(validation.ids)
    assert min(len(held.chosen_on), len(held.judged_on)) > 0.3 * len(validation)


def test_where_few_training_samples_have_a_label_validation_is_shared_out(tmp_path: Path) -> None:
    work = workspace(tmp_path)
    train, validation = work.splits.train, work.splits.validation
    labels = np.array(train.labels)
    labels[len(validation) :] = NO_LABEL
    work.__dict__["splits"] = replace(work.splits, train=replace(train, labels=labels))
    held = hold_out(work)

    assert len(held.learned_from) == len(train)
    assert sorted([*held.chosen_on.ids, *held.judged_on.ids]) == sorted(validation.ids)
    assert held.words == "one half of validation, the other judges"


def test_scores_are_right_or_wrong_and_the_loss_only_breaks_ties() -> None:
    generator = np.random.default_rng(0)
    x, labels = generator.normal(size=(600, 3)).astype(np.float32), generator.integers(0, 3, 600)
    judged = judge(nn.Identity(), split_from_arrays({"x": x, "label": labels}))
    expected = nn.functional.cross_entropy(torch.from_numpy(x), torch.from_numpy(labels))

    assert judged.score == pytest.approx((x.argmax(1) == labels).mean())
    assert judged.loss == pytest.approx(float(expected), rel=1e-5)
    surer = Judged(judged.scores, 0.0)
    one_more = judged.scores.copy()
    one_more[np.flatnonzero(one_more == 0)[0]] = 1
    assert judged.rank < surer.rank < Judged(one_more, 99.0).rank


def test_windows_are_scored_by_their_tokens_and_padding_does_not_count() -> None:
    """The mean of the windows' scores is the log-likelihood of a token over all windows."""
    generator = np.random.default_rng(0)
    ids, labels = generator.integers(0, 5, (7, 4)).astype(np.int32), generator.integers(0, 5, (7, 4))
    labels[:3, 2:] = -1
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    split = split_from_arrays({"input_ids": ids, "label": labels})
    judged = judge(lambda tokens: table[tokens.long()], split)
    log_p = torch.log_softmax(table, 1).numpy()[ids, np.maximum(labels, 0)]

    assert judged.score == pytest.approx(log_p[labels >= 0].mean(), rel=1e-5)
    assert judged.loss == pytest.approx(-judged.score, rel=1e-5)


# ── the whole way ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with the caches that a sweep needs; its test split cannot be read."""
    pytest.importorskip("optuna")
    pytest.importorskip("tomlkit")
    folder = tmp_path_factory.mktemp("sweep")
    work = workspace(folder)
    for split in ("train", "validation"):
        capture(work.folder.cache(split), work.split(split), work.teacher, work.capture_key(split),
                work.views_of(split), SilentProgress())  # fmt: skip
    return folder


RATES = {"learning_rate": Knob(low=1e-4, high=0.1, is_log=True)}


def run_sweep(folder: Path, trials: int, progress: Progress | None = None, asked: Sweep | None = None) -> Swept:
    """As the command does it, in this process."""
    recipe = load_recipe(folder / "edgekd.toml")
    return sweep(asked or Sweep(recipe, "kd", trials, (0, 1, 2), RATES), progress or SilentProgress())


class BreakingOff(Listening):
    """Breaks off, as a kill would, when a piece of work begins."""

    def __init__(self, until: str) -> None:
        super().__init__()
        self._until = until

    def start(self, what: str, total: int, done: int = 0) -> None:
        if what == self._until:
            raise KeyboardInterrupt


def drawn(swept: Swept) -> list[tuple[Settings, float | None, int]]:
    return [(trial.settings, trial.rank, trial.epochs) for trial in swept.trials]


@pytest.fixture(scope="module")
def whole(captured: Path) -> Swept:
    """Six trials, never broken off."""
    return run_sweep(captured, 6)


def test_a_sweep_finds_better_settings_and_says_for_how_sure(whole: Swept) -> None:
    best, own, *controls = whole.contestants
    told = sentences(whole)

    assert [trial.number for trial in whole.trials] == list(range(6))
    assert whole.trials[0].settings == Settings(1e-4, 2.0, 0.3)
    assert whole.best.settings.learning_rate > 1e-3
    assert own.gain is not None
    assert own.gain.low is not None
    assert own.gain.low > 0.02
    assert own.gain.difference == pytest.approx(best.score - own.score)
    assert [one.name for one in controls] == ["control", "control at this learning rate"]
    assert best.scores.shape == (3, whole.judged_on)
    assert told[0].startswith("Best of 6 trials")
    assert "points over the recipe's own" in told[2]
    assert told[2].endswith(": better.")
    assert not is_worse(whole)


def test_a_second_call_only_adds_what_is_missing(captured: Path, whole: Swept) -> None:
    progress = Listening()
    more = run_sweep(captured, 7, progress)

    assert "sweep kd: 6 trials are done already, 0 are taken up again" in progress.lines
    assert drawn(more)[:6] == drawn(whole)
    assert len({settings for settings, _, _ in drawn(more)}) == 7  # nothing was drawn again


def test_a_sweep_that_was_broken_off_takes_up_its_trial_again_and_finds_the_same(
    captured: Path, whole: Swept, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(captured, folder, ignore=shutil.ignore_patterns("*.db"))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(folder, 6, BreakingOff("kd, trial 3"))
    progress = Listening()
    resumed = run_sweep(folder, 6, progress)

    assert "sweep kd: 3 trials are done already, 1 are taken up again" in progress.lines
    assert drawn(resumed) == drawn(whole)
    assert not list((folder / "runs" / "small" / "checkpoints").glob("*"))


def test_the_runs_own_students_are_judged_and_not_trained_again(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of seed 0 is one of the run's: a sweep takes its program, whatever it computes."""
    folder = tmp_path / "run"
    shutil.copytree(captured, folder, ignore=shutil.ignore_patterns("sweep"))
    (folder / "mine.py").write_text(
        CODE.replace('raise RuntimeError("the test split was read")', "return arrays(99, 1)")
    )
    work = Workspace(load_recipe(folder / "edgekd.toml"))
    capture(work.folder.cache("test"), work.split("test"), work.teacher, work.capture_key("test"), Views(),
            SilentProgress())  # fmt: skip
    distill_stage(work, SilentProgress())
    progress = Listening()
    seen: list[str] = []
    monkeypatch.setattr(progress, "start", lambda what, total, done=0: seen.append(what))
    run_sweep(folder, 1, asked=Sweep(work.recipe, "kd", 1, (0, 1), RATES), progress=progress)

    assert seen == ["kd, trial 0", *(f"{arm}, seed 1" for arm in ("kd (temperature = 2, label_weight = 0.3, "
                    "learning_rate = 0.0001)", "control (learning_rate = 0.0001)"))]  # fmt: skip


def test_the_lines_go_into_the_recipe_and_its_comments_stay(captured: Path, tmp_path: Path, whole: Swept) -> None:
    workspace(tmp_path, RECIPE + "[distill.overrides.kd]\nweight_decay = 0.5 # stays\n")
    path = tmp_path / "edgekd.toml"
    write_settings(path, "kd", whole.best.settings)
    written = path.read_text()

    assert own_settings(load_recipe(path), "kd") == whole.best.settings
    assert load_recipe(path).distill.for_arm("kd").weight_decay == 0.5
    assert "# a comment that stays" in written
    assert "weight_decay = 0.5 # stays" in written
    workspace(tmp_path)
    write_settings(path, "kd", whole.best.settings)
    assert recipe_lines("kd", whole.best.settings) in path.read_text()


def test_trials_that_come_to_nothing_are_told(captured: Path) -> None:
    asked = Sweep(load_recipe(captured / "edgekd.toml"), "kd", 2, (0,), {"learning_rate": Knob((1e30, 1e32))})

    with pytest.raises(UsageError, match=r"none of 2 trials came to an end: .*the loss is"):
        run_sweep(captured, 2, asked=asked)


def _train_for_long(asked: Sweep, progress: Progress, folder: Path) -> None:
    (folder / "began").touch()
    for _ in range(300):
        time.sleep(0.1)
        progress.advance()
    (folder / "ended").touch()


def _fail_beside(asked: Sweep, progress: Progress, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "began").exists():
        time.sleep(0.05)
    raise UsageError("this worker failed")


def test_the_first_error_of_a_worker_ends_the_others(tmp_path: Path) -> None:
    asked = Sweep(workspace(tmp_path).recipe, "kd", 3, (0, 1), {}, 2)
    tasks = [(_train_for_long, (tmp_path,)), (_fail_beside, (tmp_path,)), (_train_for_long, (tmp_path,))]
    with pytest.raises(UsageError, match="this worker failed"):
        _in_processes(asked, tasks, SilentProgress(), None, 3)

    assert (tmp_path / "began").exists()
    assert not (tmp_path / "ended").exists()


@pytest.mark.slow
def test_a_killed_sweep_of_two_workers_goes_on_and_no_trial_is_done_twice(captured: Path, tmp_path: Path) -> None:
    """By the command, with kill -9: the workers end by themselves."""
    folder = tmp_path / "run"
    shutil.copytree(captured, folder, ignore=shutil.ignore_patterns("sweep"))
    (folder / "mine.py").write_text(CODE.replace("def teacher()", "torch.set_num_threads(1)\ndef teacher()"))
    words = [sys.executable, "-m", "edgekd.cli.app", "sweep", "--trials", "30", "--workers", "2", "--json", "--write"]
    process = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    study, deadline = folder / "runs" / "small" / "sweep" / "kd.db", time.monotonic() + 300
    while time.monotonic() < deadline and _count(study, "COMPLETE") < 3:
        time.sleep(0.2)
    children = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert len(children) >= 2
    before = _count(study, "COMPLETE")
    while time.monotonic() < deadline and any(Path(f"/proc/{child}/exe").exists() for child in children):
        time.sleep(0.2)
    assert not any(Path(f"/proc/{child}/exe").exists() for child in children)
    resumed = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    told = json.loads(resumed.stdout)

    assert 3 <= before < 30
    assert len(told["trials"]) == 30
    assert len({json.dumps(trial["settings"]) for trial in told["trials"]}) >= 29
    assert told["trials"][0]["settings"] == {"learning_rate": 1e-4, "temperature": 2.0, "label_weight": 0.3}
    assert vars(own_settings(load_recipe(folder / "edgekd.toml"), "kd")) == told["best"]


def _count(database: Path, state: str) -> int:
    if not database.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            found = connection.execute("select count(*) from trials where state = ?", (state,)).fetchone()
    except sqlite3.OperationalError:  # not made yet
        return 0
    return int(found[0])


def test_without_optuna_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd import plugins
    from edgekd.choosing import study

    monkeypatch.setattr(plugins, "missing", lambda requires: requires)

    with pytest.raises(UsageError, match=r"edgekd sweep needs optuna, tomlkit.*pip install 'edgekd\[sweep\]'"):
        study.require_optuna()


def test_a_sweep_goes_to_other_processes_without_what_was_loaded(tmp_path: Path) -> None:
    import pickle

    asked = Sweep(workspace(tmp_path).recipe, "kd", 3, (0, 1), {"temperature": Knob((1.0,))}, 2)
    assert asked.work.splits.labels == ("0", "1")
    sent = pickle.loads(pickle.dumps(dataclasses.replace(asked)))

    assert sent.recipe == asked.recipe
    assert sent.recipe.folder == asked.recipe.folder
    assert "work" not in vars(sent)
    assert (sent.trial_seed, sent.own) == (2, Settings(1e-3 / 10, 2.0, 0.3))
