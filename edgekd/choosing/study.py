"""The trials of a sweep: an Optuna study (Akiba et al. 2019, arXiv:1907.10902) in SQLite, beside the run.

Processes take trials from the same study, one at a time, under a lock. A trial that was broken off is taken up again,
from its checkpoint, before a new one; one that is finished is never done again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekd import plugins
from edgekd.choosing.sweep_space import Knob, Settings, tidy
from edgekd.errors import MissingToolchainError

__all__ = ["Finished", "Study", "Taken", "TrialPruned", "require_optuna"]

STARTUP = 8
"""Trials at random before the sampler has something to learn from; half of them before anything is pruned."""

_SETTINGS, _OWN, _FAULT = "settings", "own", "fault"


class TrialPruned(Exception):
    """A trial is worse than the median of the others at this epoch."""


def require_optuna() -> None:
    """Check that what a sweep needs is installed.

    Raises:
        MissingToolchainError: With the line that installs it.
    """
    absent = plugins.missing(("optuna", "tomlkit"))
    if absent:
        raise MissingToolchainError("edgekd sweep", ", ".join(absent), "sweep")


@dataclass(frozen=True)
class Finished:
    """A trial that is done.

    Attributes:
        rank: Where it ended; None when it was pruned.
        epochs: That it was judged after.
        fault: Why it came to nothing; empty otherwise.
    """

    number: int
    settings: Settings
    rank: float | None
    epochs: int
    fault: str = ""


@dataclass(frozen=True)
class Taken:
    """A trial at work.

    Attributes:
        settings: To train with.
        known: The rank of another trial with the same settings; None when there is none.
    """

    trial: Any
    settings: Settings
    known: float | None

    def report(self, rank: float, epoch: int) -> None:
        """Tell how far it is.

        Raises:
            TrialPruned: It is not worth going on with.
        """
        if epoch not in self.trial.study.trials[self.trial.number].intermediate_values:  # when it was taken up again
            self.trial.report(rank, epoch)
        if self.trial.should_prune():
            raise TrialPruned


class Study:
    """One study.

    Args:
        path: Of the database.
        name: Of the study in it; another for whatever else the trials depend on.
        space: What is tried.
        own: Settings of the recipe: the first trial, where the space holds them.
        epochs: Of a training.
        seed: Of the sampler.
    """

    def __init__(self, path: Path, name: str, space: Mapping[str, Knob], own: Settings, epochs: int, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._own, self._seed = path, own, seed
        self._fixed = {key: knob.values[0] for key, knob in space.items() if len(knob.values) == 1}
        self._ranges = {key: _distribution(knob) for key, knob in space.items() if len(knob.values) != 1}
        # Early epochs say little: the learning rate is at its highest then.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP // 2, n_warmup_steps=max(1, epochs // 4))
        with self._locked():
            self._study = optuna.create_study(
                storage=optuna.storages.RDBStorage(
                    f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 120}}
                ),
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                pruner=pruner,
            )
            said = own.said()
            inside = all(key in said and _holds(knob, said[key]) for key, knob in space.items())
            if not self._study.trials and inside and self._ranges:
                self._study.enqueue_trial({key: said[key] for key in self._ranges}, user_attrs={_OWN: True})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl

        with self._path.with_suffix(".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def take_up_again(self) -> int:
        """Put broken-off trials back in front; call it when no other process works on the study.

        Returns:
            How many there were.
        """
        import optuna

        states = optuna.trial.TrialState
        broken = [trial for trial in self._study.trials if trial.state == states.RUNNING]
        for trial in broken:
            self._study.tell(trial.number, state=states.FAIL)
            self._study.add_trial(
                optuna.create_trial(
                    state=states.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs=trial.user_attrs,
                    intermediate_values=trial.intermediate_values,
                )
            )
        return len(broken)

    def take(self, trials: int) -> Taken | None:
        """The next trial, or None when so many are done or at work."""
        import optuna

        states = optuna.trial.TrialState
        with self._locked():
            counted = [t for t in self._study.trials if t.state in (states.COMPLETE, states.PRUNED, states.RUNNING)]
            if len(counted) >= trials:
                return None
            # Made anew for each trial, so that a sweep that goes on does not draw again what it drew before.
            seed = (self._seed * 1_000_003 + len(counted)) & 0xFFFFFFFF
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
            trial = self._study.ask(self._ranges)
            if trial.user_attrs.get(_OWN):
                settings = self._own
            else:
                settings = tidy(replace(self._own, **self._fixed, **trial.params))
            known = [f.rank for f in self.finished() if f.settings == settings and f.rank is not None]
            trial.set_user_attr(_SETTINGS, settings.to_json())
        return Taken(trial, settings, known[0] if known else None)

    def done(self, taken: Taken, rank: float | None, fault: str = "") -> None:
        """A trial has ended: with its rank, or pruned, or because its training came to nothing."""
        import optuna

        if fault:
            taken.trial.set_user_attr(_FAULT, fault)
        if rank is None:
            self._study.tell(taken.trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(taken.trial, rank)

    def finished(self) -> list[Finished]:
        """Every trial that is done, in the order of their numbers."""
        import optuna

        states = optuna.trial.TrialState
        return [
            Finished(
                trial.number,
                Settings.from_json(trial.user_attrs[_SETTINGS]),
                trial.value if trial.state == states.COMPLETE else None,
                max(trial.intermediate_values, default=0),
                trial.user_attrs.get(_FAULT, ""),
            )
            for trial in self._study.trials
            if trial.state in (states.COMPLETE, states.PRUNED)
        ]


def _distribution(knob: Knob) -> Any:
    import optuna

    if knob.values:
        return optuna.distributions.CategoricalDistribution(knob.values)
    return optuna.distributions.FloatDistribution(knob.low, knob.high, log=knob.is_log)


def _holds(knob: Knob, value: float) -> bool:
    return value in knob.values if knob.values else knob.low <= value <= knob.high
