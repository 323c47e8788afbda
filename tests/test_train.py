"""Training: it learns, and it resumes bit for bit."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekd.distillation.train
from edgekd.console import SilentProgress
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.truth import NO_LABEL, Truth
from edgekd.data.views import Views
from edgekd.distillation.losses import Term, soft_target_kl, weighted
from edgekd.distillation.train import TrainingPlan, learning_rate_at, steps_of, train
from edgekd.errors import CacheError, NumericalError
from edgekd.teachers.capture import capture
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.sources import module_fingerprint
from edgekd.teachers.targets import DenseTargets
from edgekd.teachers.teacher_cache import CaptureKey, TeacherCache
from edgekd.teaching import Answer, Teacher

PLAN = TrainingPlan(epochs=3, batch_size=16, learning_rate=1e-2, weight_decay=1e-4, warmup_share=0.1, seed=3)


class Interrupting(SilentProgress):
    """A progress that stops the work after some steps, as a kill would."""

    def __init__(self, after: int | None = None) -> None:
        self.after, self.steps = after, 0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.done_before = done

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps += steps
        if self.after is not None and self.steps >= self.after:
            raise KeyboardInterrupt


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
    assert isinstance(teacher.classes, DenseTargets)
    fit = nn.functional.mse_loss(student.logits, teacher.classes.logits)
    return {"labels": nn.functional.cross_entropy(student.logits, truth.classes), "teacher": 0.01 * fit}


@pytest.fixture
def material(tmp_path: Path) -> tuple[Split, TeacherCache]:
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    split = split_from_arrays({"x": x, "label": (x[:, 0] * x[:, 1] > 0).astype(int)}, labels=("no", "yes"))
    teacher = Teacher(lambda arrays: Answer(arrays["x"][:, :2].copy()), "t", 0, None, 0)
    return split, capture(tmp_path / "cache", split, teacher, CaptureKey("t", "d", "", 1, 0), Views(), Interrupting())


def test_training_learns(tmp_path: Path, material: tuple[Split, TeacherCache]) -> None:
    split, cache = material
    plan = dataclasses.replace(PLAN, epochs=30)
    history = train(network(), split, cache, Views(), objective, plan, tmp_path / "c.pt", Interrupting(), "x")

    assert len(history) == 30
    assert history[0]["loss"] == pytest.approx(history[0]["labels"] + history[0]["teacher"], rel=1e-5)
    shares = [history[-1][f"gradient share of {name}"] for name in ("labels", "teacher")]
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1)
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


@pytest.mark.parametrize(
    ("after", "how"),
    [(1, {}), (13, {}), (20, {}), (38, {}), (13, {"precision": "bf16"}), (9, {"precision": "fp16", "accumulate": 2})],
)
def test_a_broken_off_training_resumes_bit_for_bit(
    tmp_path: Path,
    material: tuple[Split, TeacherCache],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    how: dict[str, Any],
) -> None:
    """Mid-epoch and at its edges, with dropout and batch norm; in fp16 while the scale of the loss is looked for."""
    monkeypatch.setattr(edgekd.distillation.train, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(edgekd.distillation.train, "FIRST_SCALE", 2.0**30)
    split, cache = material
    whole, plan = network(), dataclasses.replace(PLAN, **how)
    history = train(whole, split, cache, Views(), objective, plan, tmp_path / "whole.pt", Interrupting(), "x")
    with pytest.raises(KeyboardInterrupt):
        train(network(), split, cache, Views(), objective, plan, tmp_path / "c.pt", Interrupting(after), "x")
    torch.rand(7)  # another process would have another generator
    resumed, progress = network(), Interrupting()
    again = train(resumed, split, cache, Views(), objective, plan, tmp_path / "c.pt", progress, "x")

    assert progress.done_before == after - 1  # the step that was cut off is done again
    assert again == history
    assert module_fingerprint(resumed) == module_fingerprint(whole)


def test_a_batch_in_pieces_is_the_same_batch(tmp_path: Path, material: tuple[Split, TeacherCache]) -> None:
    """Also where some samples have no label, and the last batch does not divide."""
    split, cache = material
    assert split.labels is not None
    some = dataclasses.replace(split, labels=np.where(np.arange(200) < 9, NO_LABEL, split.labels))
    found = []
    for pieces in (1, 3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
        plan = dataclasses.replace(PLAN, batch_size=48, accumulate=pieces)
        train(net, some, cache, Views(), distilled, plan, tmp_path / f"{pieces}.pt", Interrupting(), "x")
        found.append(nn.utils.parameters_to_vector(net.parameters()).detach())

    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("batch", "pieces"), [(199, 1), (195, 4)], ids=["batch", "piece"])
def test_no_batch_and_no_piece_has_a_lone_sample_which_a_batch_norm_cannot_take(
    tmp_path: Path, material: tuple[Split, TeacherCache], batch: int, pieces: int
) -> None:
    split, cache = material
    progress = Interrupting()
    plan = dataclasses.replace(PLAN, batch_size=batch, accumulate=pieces, epochs=2)
    history = train(network(), split, cache, Views(), objective, plan, tmp_path / "c.pt", progress, "x")

    assert len(history) == 2
    assert progress.steps == 2 * steps_of(200, batch)
    assert [steps_of(200, batch) for batch in (199, 49, 195, 50, 1)] == [1, 5, 2, 4, 200]


def distilled(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
    return weighted(student.logits, teacher.classes, truth, [Term("kd", 1.0, soft_target_kl)], 2.0, 0.3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fewer_bits_follow_the_curve_of_fp32(
    tmp_path: Path, material: tuple[Split, TeacherCache], precision: Literal["bf16", "fp16"]
) -> None:
    split, cache = material
    found, words = {}, list[Literal["fp32", "bf16", "fp16"]](["fp32", precision])
    for word in words:
        plan = dataclasses.replace(PLAN, precision=word)
        found[word] = train(network(), split, cache, Views(), objective, plan, tmp_path / word, Interrupting(), "x")
    losses = {word: [epoch["loss"] for epoch in history] for word, history in found.items()}

    assert losses[precision] != losses["fp32"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.02)


def test_a_student_is_compiled_once_for_each_size_of_a_batch(
    tmp_path: Path, material: tuple[Split, TeacherCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An nn.Sequential, which Module.compile would leave as it is; its graphs are run as they are."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    split, cache = material
    plain = train(network(), split, cache, Views(), objective, PLAN, tmp_path / "p.pt", Interrupting(), "x")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plan, student = dataclasses.replace(PLAN, compile=True), network()
    compiled = train(student, split, cache, Views(), objective, plan, tmp_path / "c.pt", Interrupting(), "x")

    assert len(graphs) == 2  # batches of 16, the last of 8
    assert [epoch["loss"] for epoch in compiled] == pytest.approx([epoch["loss"] for epoch in plain], rel=1e-4)
    assert list(student.state_dict()) == list(network().state_dict())


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, material: tuple[Split, TeacherCache]) -> None:
    split, cache = material
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04")

    with pytest.raises(CacheError, match=r"c\.pt is damaged; remove it"):
        train(network(), split, cache, Views(), objective, PLAN, tmp_path / "c.pt", Interrupting(), "x")


def test_a_loss_that_is_not_finite_names_the_step_and_the_knob(
    tmp_path: Path, material: tuple[Split, TeacherCache]
) -> None:
    split, cache = material

    def sick(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
        return {"sick": student.logits.sum() * float("nan")}

    with pytest.raises(NumericalError, match=r"kd: the loss is nan in epoch 1, step 1; a lower distill\.learning_rate"):
        train(network(), split, cache, Views(), sick, PLAN, tmp_path / "c.pt", Interrupting(), "kd")


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [learning_rate_at(step, 100, PLAN) for step in range(101)]

    assert rates[9] == max(rates) == PLAN.learning_rate
    assert rates[0] == pytest.approx(PLAN.learning_rate / 10)
    assert rates[100] == pytest.approx(0.0)


def test_each_epoch_is_told_and_what_hears_of_it_may_end_the_training(
    tmp_path: Path, material: tuple[Split, TeacherCache]
) -> None:
    split, cache = material
    told: list[tuple[int, float]] = []

    def listen(epochs: int, means: Mapping[str, float]) -> None:
        told.append((epochs, means["loss"]))
        if epochs == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), split, cache, Views(), objective, PLAN, tmp_path / "c.pt", Interrupting(), "x", listen)
    history = train(network(), split, cache, Views(), objective, PLAN, tmp_path / "d.pt", Interrupting(), "x")

    assert told == [(1, history[0]["loss"]), (2, history[1]["loss"])]
