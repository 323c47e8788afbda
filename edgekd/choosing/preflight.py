"""What a run will cost, from a probe of the real thing: 20 batches of the capture, 20 steps of each arm's training.

Nothing is estimated from counts of operations: the probe captures some samples with the recipe's teacher, views and
codec into a folder that is thrown away, trains the recipe's student on them, exports and judges it, each by the code
that does it in the run. What is not in it: reading the data, loading the models, and the files for devices.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd.console import SilentProgress
from edgekd.data.split import Split
from edgekd.data.windows import positions_of
from edgekd.distillation.arms import objective_of, plan_of, threads_of
from edgekd.distillation.distill import fresh_student
from edgekd.distillation.train import steps_of, train
from edgekd.programs.tracing import export_program
from edgekd.stages.workspace import Workspace
from edgekd.teachers.capture import capture
from edgekd.teachers.shards import BATCH, at_once
from edgekd.teachers.teacher_cache import TeacherCache
from edgekd.types import Json, JsonMixin

__all__ = ["ArmCost", "Preflight", "duration", "preflight"]

BATCHES = 20
WARM_UP = 2
"""Steps before the timed ones: the first pays for what is set up once."""

MOST_S = 20.0
"""What a probe of the teacher, or of one arm, may take; it then looks at fewer batches."""


@dataclass(frozen=True)
class ArmCost(JsonMixin):
    """One arm, with one seed.

    Attributes:
        steps: Of the whole training.
        step_s: Seconds of one, mean over ``probed``.
        start_s: What the first steps take beyond that (compiling, for example).
        finish_s: Export, and judging on validation and test.
    """

    arm: str
    steps: int
    step_s: float
    start_s: float
    finish_s: float
    probed: int

    @property
    def training_s(self) -> float:
        return self.start_s + self.steps * self.step_s + self.finish_s


@dataclass(frozen=True)
class Preflight(JsonMixin):
    """What a run will cost.

    Attributes:
        passes: Views that the teacher will look at.
        pass_s: Seconds of one: making the view, the teacher, and the record; mean over ``probed``.
        students: Trainings of each arm: the seeds.
        probe_s: What finding this out took.
    """

    passes: int
    pass_s: float
    probed: int
    arms: tuple[ArmCost, ...]
    students: int
    probe_s: float

    @property
    def capture_s(self) -> float:
        return self.passes * self.pass_s

    @property
    def training_s(self) -> float:
        return self.students * sum(arm.training_s for arm in self.arms)

    def facts(self) -> dict[str, str]:
        """For people."""
        steps = ", ".join(f"{arm.arm} {arm.steps:,} of {arm.step_s * 1e3:.3g} ms" for arm in self.arms)
        probed = min(arm.probed for arm in self.arms)
        return {
            "capture": f"{self.passes:,} passes of the teacher, about {duration(self.capture_s)} "
            f"({self.pass_s * 1e3:.3g} ms each, probed on {self.probed:,})",
            "training": f"{len(self.arms) * self.students} students, about {duration(self.training_s)} "
            f"(steps: {steps}; probed on {probed})",
            "probe": f"took {duration(self.probe_s)}",
        }

    def to_json(self) -> Json:
        return {**super().to_json(), "capture_s": self.capture_s, "training_s": self.training_s}


def duration(seconds: float) -> str:
    """0.53 as ``0.5 s``, 95 as ``95 s``, 600 as ``10 min``, 9000 as ``2.5 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def preflight(work: Workspace) -> Preflight:
    """Probe capture and training.

    Raises:
        DataError: Student, teacher and labels do not fit.
        NumericalError: The teacher gives NaN or infinity, or a loss does.
    """
    began = time.monotonic()
    recipe, splits, threads = work.recipe, work.splits, torch.get_num_threads()
    plain = len(splits.validation) + len(splits.test)
    with tempfile.TemporaryDirectory(prefix="edgekd-preflight-") as folder:
        part = _probed_samples(work)
        key = replace(work.capture_key("train"), data=part.fingerprint)
        started = time.monotonic()
        cache = capture(Path(folder) / "cache", part, work.teacher, key, work.views_of("train"), SilentProgress())
        pass_s = (time.monotonic() - started) / (len(part) * cache.views)
        torch.set_num_threads(threads_of(recipe))
        try:
            arms = tuple(_arm_cost(work, arm, part, cache, plain, Path(folder)) for arm in work.arms)
        finally:
            torch.set_num_threads(threads)
    passes = len(splits.train) * recipe.data.views + plain
    return Preflight(passes, pass_s, len(part) * cache.views, arms, len(recipe.distill.seeds), time.monotonic() - began)


def _probed_samples(work: Workspace) -> Split:
    """Enough samples for the batches of capture and training, fewer where the teacher is slow."""
    train, views = work.splits.train, work.recipe.data.views
    batch = max(work.recipe.distill.for_arm(arm).batch_size for arm in work.arms)
    in_batch = at_once(BATCH, positions_of(train.labels))
    order = _labelled_first(train, batch)
    few = train.arrays(order[: min(in_batch, 16)])
    work.teacher.outputs(few)  # the first call pays for set-up
    started = time.monotonic()
    work.teacher.outputs(few)
    affordable = int(MOST_S / max(1e-9, time.monotonic() - started) * min(in_batch, 16, len(order)))
    records = max(min(BATCHES * in_batch, affordable), 2)
    samples = min(len(train), max(records // views, 2))
    if samples > batch:
        samples -= samples % batch  # whole batches, as nearly all of a training are
    return train.take(order[:samples])


def _labelled_first(train: Split, count: int) -> np.ndarray:
    """Positions of training samples in an order of no meaning, some with a label in front: the control needs them."""
    order = np.argsort(train.ids)
    front = order[train.labelled[order]][:count]
    return np.concatenate([front, order[~np.isin(order, front)]])


def _arm_cost(work: Workspace, arm: str, part: Split, cache: TeacherCache, plain: int, folder: Path) -> ArmCost:
    recipe, seed = work.recipe, work.recipe.distill.seeds[0]
    module, learner = fresh_student(recipe, work.splits, cache, arm, seed)
    plan = plan_of(recipe, arm, seed)
    wanted = BATCHES + WARM_UP
    steps = steps_of(len(part), plan.batch_size)
    short = replace(plan, epochs=math.ceil(wanted / steps), shard=False)
    clock = _Clock(wanted)
    objective, checkpoint = objective_of(recipe, arm, labelled=bool(work.splits.labels)), folder / f"{arm}.pt"
    with contextlib.suppress(_EnoughError):
        train(learner, part, cache, work.views_of("train"), objective, short, checkpoint, clock, f"probe of {arm}")
    warm = min(WARM_UP, len(clock.seconds) - 1)
    timed = clock.seconds[warm:]
    step_s = sum(timed) / len(timed)
    module.to("cpu").eval().requires_grad_(False)
    return ArmCost(
        arm,
        plan.epochs * steps_of(len(work.splits.train), plan.batch_size),
        step_s,
        max(0.0, sum(clock.seconds[:warm]) - warm * step_s),
        _finish_s(work, module, plain),
        len(timed),
    )


def _finish_s(work: Workspace, module: nn.Module, plain: int) -> float:
    """Export, and judging of ``plain`` samples."""
    validation = work.splits.validation
    some = min(len(validation), at_once(2 * BATCH, positions_of(validation.labels)))
    started = time.monotonic()
    few = [torch.from_numpy(x) for x in validation.arrays(np.arange(some)).values()]
    with torch.no_grad():
        module(*few)
    judged = time.monotonic()
    export_program(module, [x[:2] for x in few])
    return time.monotonic() - judged + (judged - started) / some * plain


class _EnoughError(Exception):
    """Ends a training that was only probed."""


class _Clock(SilentProgress):
    """Takes the time of each step; ends the work after some, or after ``MOST_S``."""

    def __init__(self, steps: int) -> None:
        self.seconds: list[float] = []
        self._steps = steps
        self._began = self._last = time.monotonic()

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._began = self._last = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        now = time.monotonic()
        self.seconds.append(now - self._last)
        self._last = now
        if len(self.seconds) >= self._steps or (now - self._began > MOST_S and len(self.seconds) > WARM_UP):
            raise _EnoughError
