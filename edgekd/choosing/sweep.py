"""A sweep: many short trainings off one teacher cache, then what the best of them is worth, and for how sure.

Trials are judged on samples that they do not learn from, and the best is judged again, with several seeds, beside the
recipe's own settings and the control, on samples that chose nothing (:mod:`edgekd.choosing.judging`). The test
split is not read.
"""

from __future__ import annotations

import io
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd.choosing.judging import HeldOut, hold_out, judge, judge_in_training
from edgekd.choosing.study import Finished, Study, Taken, TrialPruned, require_optuna
from edgekd.choosing.sweep_space import Knob, Settings, own_settings, space_of, with_settings
from edgekd.console import SilentProgress
from edgekd.distillation.arms import CONTROL, arm_inputs, objective_of, plan_of, threads_of
from edgekd.distillation.distill import fresh_student
from edgekd.distillation.train import OnEpoch, train
from edgekd.errors import NumericalError, UsageError
from edgekd.programs.student_files import load_student
from edgekd.protocols import Progress
from edgekd.recipes.recipe import Recipe
from edgekd.recipes.seeds import first_seeds
from edgekd.reporting.pairing import Paired, paired
from edgekd.stages.workspace import Workspace
from edgekd.store import atomic_write, fingerprint
from edgekd.types import Json

__all__ = ["Contestant", "Sweep", "Swept", "sweep"]


@dataclass(frozen=True)
class Sweep:
    """What a sweep is asked for; goes to every process that works on it.

    Attributes:
        recipe: With the arm's own settings.
        trials: How many, those that were done before counted.
        seeds: That the best is compared with the others over; trials are trained with one that is not among them.
        workers: Processes.
    """

    recipe: Recipe
    arm: str
    trials: int
    seeds: tuple[int, ...]
    asked: Mapping[str, Knob]
    workers: int = 1

    @cached_property
    def work(self) -> Workspace:
        return Workspace(self.recipe)

    @cached_property
    def held(self) -> HeldOut:
        return hold_out(self.work)

    @cached_property
    def trial_seed(self) -> int:
        return first_seeds(self.seeds, len(self.seeds) + 1)[-1]

    @cached_property
    def space(self) -> tuple[dict[str, Knob], tuple[str, ...]]:
        return space_of(self.recipe, self.arm, self.work.cache("train").codec.name, self.asked)

    @cached_property
    def own(self) -> Settings:
        return own_settings(self.recipe, self.arm)

    def study(self) -> Study:
        """The study of these trials; another recipe, cache or space has another."""
        what = [
            _inputs(self.recipe, self.work, self.arm, self.trial_seed),
            self.held.chosen_on.fingerprint,
            {key: knob.to_json() for key, knob in self.space[0].items()},
        ]
        epochs = self.recipe.distill.for_arm(self.arm).epochs
        path = self.work.folder.study(self.arm)
        return Study(path, fingerprint(what), self.space[0], self.own, epochs, self.recipe.distill.seeds[0])

    def threads(self) -> int:
        return max(1, threads_of(self.recipe) // self.workers)


@dataclass(frozen=True)
class Contestant:
    """Settings that the best is compared with.

    Attributes:
        name: For people.
        scores: On samples that chose nothing, (seeds, samples); see :class:`edgekd.choosing.judging.Judged`.
        gain: Of the best over it; None of the best itself.
    """

    name: str
    arm: str
    settings: Settings
    scores: np.ndarray
    gain: Paired | None

    @property
    def score(self) -> float:
        return float(self.scores.mean(dtype=np.float64))

    @property
    def deviation(self) -> float | None:
        """Over the seeds."""
        means = self.scores.mean(axis=1, dtype=np.float64).tolist()
        return statistics.stdev(means) if len(means) > 1 else None


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
        trials: All that are done.
        best: Of them.
        contestants: The best first, then the recipe's own settings and the control; without the recipe's own where
            these are the best.
        chosen_on, judged_on: How many samples chose, and how many compared.
        chosen_words: Where those are from.
        notes: What was not tried, and why.
    """

    arm: str
    trials: tuple[Finished, ...]
    best: Finished
    contestants: tuple[Contestant, ...]
    seeds: tuple[int, ...]
    chosen_on: int
    judged_on: int
    chosen_words: str
    is_tokens: bool
    notes: tuple[str, ...] = ()


def sweep(asked: Sweep, progress: Progress) -> Swept:
    """Do what is left of a sweep; the caller holds the run folder.

    Raises:
        CacheError: Nothing, or something else, has been captured.
        UsageError: There is no such arm, the cache serves none of the temperatures, or every trial came to nothing.
        MissingToolchainError: Optuna is not installed.
    """
    require_optuna()
    if asked.recipe.teacher.embeds:
        raise UsageError("edgekd sweep judges classes and tokens; this recipe's teacher gives embeddings")
    space, notes = asked.space
    for note in notes:
        progress.say(note)
    progress.say(f"sweep {asked.arm}: " + "; ".join(f"{key} {knob.words()}" for key, knob in space.items()))
    study = asked.study()
    again = study.take_up_again()
    done = len(study.finished())
    if done or again:
        progress.say(f"sweep {asked.arm}: {done} trials are done already, {again} are taken up again")
    if asked.workers == 1:
        work_on(asked, progress)
    else:
        _in_processes(asked, [(work_on, ())] * asked.workers, progress, lambda: len(study.finished()), asked.trials)
    finished = study.finished()
    complete = [trial for trial in finished if trial.rank is not None]
    if not complete:
        faults = next((trial.fault for trial in finished if trial.fault), "all were pruned")
        raise UsageError(f"none of {len(finished)} trials came to an end: {faults}")
    best = max(complete, key=lambda trial: (trial.rank or 0.0, -trial.number))
    return Swept(
        asked.arm,
        tuple(finished),
        best,
        _compared(asked, best.settings, progress),
        asked.seeds,
        len(asked.held.chosen_on),
        len(asked.held.judged_on),
        asked.held.words,
        bool(asked.work.cache("train").positions),
        notes,
    )


def work_on(asked: Sweep, progress: Progress) -> None:
    """Take trials until there are enough."""
    study = asked.study()
    while (taken := study.take(asked.trials)) is not None:
        _do_trial(asked, study, taken, progress)


def _do_trial(asked: Sweep, study: Study, taken: Taken, progress: Progress) -> None:
    number, words = taken.trial.number, taken.settings.words()
    if taken.known is not None:
        study.done(taken, taken.known)
        return
    recipe = with_settings(asked.recipe, asked.arm, taken.settings)
    epochs = recipe.distill.for_arm(asked.arm).epochs
    held = asked.held.chosen_on
    module, learner = fresh_student(recipe, asked.work.splits, asked.work.cache("train"), asked.arm, asked.trial_seed)

    def on_epoch(epoch: int, means: Mapping[str, float]) -> None:
        if epoch < epochs:
            taken.report(judge_in_training(module, held).rank, epoch)

    checkpoint = asked.work.folder.checkpoint(f"sweep-{asked.arm}-{fingerprint(_trial_inputs(asked, recipe))}", 0)
    rank, told, fault = None, "pruned", ""
    try:
        name = f"{asked.arm}, trial {number}"
        _train(asked, recipe, asked.arm, asked.trial_seed, learner, checkpoint, progress, name, on_epoch, True)
        judged = judge(module.eval(), held)
        rank, told = judged.rank, f"{judged.score:.4f}"
    except TrialPruned:
        pass
    except NumericalError as error:
        told = fault = str(error)
    study.done(taken, rank, fault)
    checkpoint.unlink(missing_ok=True)
    progress.say(f"{asked.arm}, trial {number}: {words}: {told}")


def _trial_inputs(asked: Sweep, recipe: Recipe) -> Json:
    inputs = _inputs(recipe, asked.work, asked.arm, asked.trial_seed)
    return {"trial": inputs, "learned_from": asked.held.chosen_on.fingerprint, "threads": asked.threads()}


def _inputs(recipe: Recipe, work: Workspace, arm: str, seed: int) -> Json:
    """What a training depends on, as :func:`edgekd.distillation.arms.arm_inputs` has it, without the test split."""
    data = {name: work.capture_key(name).to_json() for name in ("train", "validation")}
    return arm_inputs(recipe, work.splits, arm, seed, data)


def _train(
    asked: Sweep,
    recipe: Recipe,
    arm: str,
    seed: int,
    learner: nn.Module,
    checkpoint: Path,
    progress: Progress,
    name: str,
    on_epoch: OnEpoch | None = None,
    is_trial: bool = False,
) -> None:
    work = asked.work
    torch.set_num_threads(asked.threads())
    train(
        learner,
        work.splits.train,
        work.cache("train"),
        work.views_of("train"),
        objective_of(recipe, arm),
        plan_of(recipe, arm, seed),
        checkpoint,
        progress,
        name,
        on_epoch,
        asked.held.learned_from if is_trial else None,
    )


# ── what the best is worth ────────────────────────────────────────────────────────────────────────────────────────────


def _compared(asked: Sweep, best: Settings, progress: Progress) -> tuple[Contestant, ...]:
    """The best, the recipe's own, the control, and the control at the learning rate that was found; on all of train."""
    named = [("best", asked.arm, best)]
    if best != asked.own:
        named.append(("the recipe's own", asked.arm, asked.own))
    if asked.arm != CONTROL:
        control = own_settings(asked.recipe, CONTROL)
        named.append(("control", CONTROL, control))
        if control.learning_rate != best.learning_rate:
            named.append(("control at this learning rate", CONTROL, Settings(best.learning_rate)))
    tasks = [(arm, settings, seed) for _, arm, settings in named for seed in asked.seeds]
    if asked.workers == 1:
        for task in tasks:
            scores_of(asked, progress, *task)
    else:
        _in_processes(asked, [(scores_of, task) for task in tasks], progress, None, len(tasks))
    silent = SilentProgress()
    found = [np.stack([scores_of(asked, silent, arm, s, seed) for seed in asked.seeds]) for _, arm, s in named]
    return tuple(
        Contestant(name, arm, settings, scores, None if scores is found[0] else paired(found[0], scores))
        for (name, arm, settings), scores in zip(named, found, strict=True)
    )


def scores_of(asked: Sweep, progress: Progress, arm: str, settings: Settings, seed: int) -> np.ndarray:
    """Of one training on the samples that chose nothing; kept, and those of the run's own student where it has one."""
    work, held = asked.work, asked.held.judged_on
    recipe = with_settings(asked.recipe, arm, settings)
    inputs = _inputs(recipe, work, arm, seed)
    key = fingerprint([inputs, held.fingerprint])
    path = work.folder.scores(arm, key)
    if path.is_file():
        kept: np.ndarray = np.load(path, allow_pickle=False)
        return kept
    trained = _trained_before(work, recipe, arm, seed, inputs)
    if trained is not None:
        scores = judge(load_student(trained)[0].program.module(), held).scores
    else:
        module, learner = fresh_student(recipe, work.splits, work.cache("train"), arm, seed)
        checkpoint = work.folder.checkpoint(f"sweep-{arm}-{key}-{asked.threads()}", seed)
        _train(asked, recipe, arm, seed, learner, checkpoint, progress, f"{arm} ({settings.words()}), seed {seed}")
        scores = judge(module.eval(), held).scores
        checkpoint.unlink(missing_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, scores)
    atomic_write(path, buffer.getvalue())
    return scores


def _trained_before(work: Workspace, recipe: Recipe, arm: str, seed: int, inputs: Json) -> Path | None:
    """The run's own student of the same training; its key of the test split is taken on trust, not looked at."""
    folder = work.folder.arm(arm, seed)
    stage = f"distill-{folder.name}"
    test = work.folder.done_with(stage).get("data", {}).get("test")
    same = {**inputs, "data": {**inputs["data"], "test": test}}
    return folder if work.folder.is_done(stage, same) else None


# ── many processes ────────────────────────────────────────────────────────────────────────────────────────────────────


def _in_processes(
    asked: Sweep,
    tasks: Sequence[tuple[Callable[..., object], tuple[object, ...]]],
    progress: Progress,
    count: Callable[[], int] | None,
    total: int,
) -> None:
    """Do tasks in fresh processes, as many at a time as there are workers; the first error ends them all.

    The others end at their next step, as a kill would end them: their trials are taken up again.
    """
    what = f"sweep {asked.arm}, {asked.workers} workers"
    seen = count() if count else 0
    progress.start(what, total, seen)
    context = get_context("spawn")  # a fork would share the threads of torch and the connections of the study
    stopped = context.Event()
    with ProcessPoolExecutor(asked.workers, context, _begin, (replace(asked), _Orphan(os.getpid(), stopped))) as pool:
        pending = {pool.submit(_task, function, arguments) for function, arguments in tasks}
        try:
            while pending:
                done, pending = wait(pending, timeout=1.0, return_when="FIRST_COMPLETED")
                for future in done:
                    future.result()
                now = count() if count else len(tasks) - len(pending)
                progress.advance(now - seen)
                seen = now
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    progress.finish()


_given: list[tuple[Sweep, _Orphan]] = []


def _begin(asked: Sweep, progress: _Orphan) -> None:
    _given[:] = [(asked, progress)]


def _task(function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    asked, progress = _given[0]
    progress.advance()  # another may have failed while this process began
    function(asked, progress, *arguments)


class _Orphan(SilentProgress):
    """A progress of a process that works for another, and ends when that one was killed or wants no more."""

    def __init__(self, parent: int, stopped: Event) -> None:
        self._of, self._stopped = parent, stopped

    def advance(self, steps: int = 1, note: str = "") -> None:
        if os.getppid() != self._of:
            os._exit(1)
        if self._stopped.is_set():
            raise CancelledError
