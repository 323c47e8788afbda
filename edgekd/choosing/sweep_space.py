"""What a sweep tries: temperature, weight of the labels, learning rate of an arm, as far as the cache serves them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgekd.distillation.arms import CONTROL
from edgekd.errors import UsageError
from edgekd.recipes.recipe import TAIL_TEMPERATURES, ArmOptions, Recipe
from edgekd.types import JsonMixin

__all__ = ["Knob", "Settings", "own_settings", "parse_knob", "space_of", "tidy", "with_settings"]


@dataclass(frozen=True)
class Settings(JsonMixin):
    """How one arm is mixed and trained.

    Attributes:
        temperature, label_weight: None of the control, which has neither.
    """

    learning_rate: float
    temperature: float | None = None
    label_weight: float | None = None

    def words(self) -> str:
        """For people, and as a recipe spells them."""
        return ", ".join(f"{name} = {value:g}" for name, value in self.said().items())

    def said(self) -> dict[str, float]:
        """What a recipe must say, by key, in the order of its table."""
        values = {key: getattr(self, key) for key in ("temperature", "label_weight", "learning_rate")}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Knob(JsonMixin):
    """What one setting may be: some values, or all from ``low`` to ``high``.

    Attributes:
        values: In rising order; empty for a range.
        is_log: Whether a range is searched by factors and not by differences.
    """

    values: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False

    def words(self) -> str:
        return ", ".join(f"{value:g}" for value in self.values) or f"{self.low:g} to {self.high:g}"


LIMITS = {"temperature": (0.0, math.inf), "label_weight": (0.0, 1.0), "learning_rate": (0.0, math.inf)}
"""Of each setting; temperature and learning rate are above 0."""


def parse_knob(name: str, text: str) -> Knob:
    """``1:8`` is a range, ``1,2,4`` are values, ``2`` is one: the setting is then held fixed.

    Raises:
        UsageError: It is none of these, or out of the setting's limits.
    """
    flag = f"--{name.replace('_', '-')}"
    low, high = LIMITS[name]
    try:
        ends = [float(part) for part in text.replace(":", ",").split(",")]
    except ValueError:
        ends = []
    if not ends or (":" in text and (len(ends) != 2 or "," in text or ends[0] >= ends[1])):
        raise UsageError(f"{flag} {text!r} is none of 1:8 (a range), 1,2,4 (values) and 2 (one value)")
    if min(ends) < low or max(ends) > high or (name != "label_weight" and min(ends) == 0):
        allowed = "from 0 to 1" if name == "label_weight" else "above 0"
        raise UsageError(f"{flag} {text!r}: {name.replace('_', ' ')} is {allowed}")
    if ":" not in text:
        return Knob(tuple(sorted(set(ends))))
    return Knob(low=ends[0], high=ends[1], is_log=name != "label_weight")


def own_settings(recipe: Recipe, arm: str) -> Settings:
    """What the recipe itself says of an arm."""
    rate = recipe.distill.for_arm(arm).learning_rate
    if arm == CONTROL:
        return Settings(rate)
    mix = recipe.distill.mix(arm)
    return Settings(rate, mix.temperature, mix.label_weight)


def with_settings(recipe: Recipe, arm: str, settings: Settings) -> Recipe:
    """The recipe as if the arm's table said so."""
    own = recipe.distill.overrides.get(arm, ArmOptions())
    overrides = {**recipe.distill.overrides, arm: own.model_copy(update=settings.said())}
    distill = recipe.distill.model_copy(update={"overrides": overrides})
    return recipe.model_copy(update={"distill": distill})


def space_of(
    recipe: Recipe, arm: str, codec: str, asked: Mapping[str, Knob]
) -> tuple[dict[str, Knob], tuple[str, ...]]:
    """What is tried of each setting of an arm, and in a sentence each what is not, and why.

    Without being asked: temperatures 1 to 8, weights of the labels 0 to 0.9, a fifth to five times the learning rate; a
    range is widened to what the recipe says.

    Args:
        codec: Of the cache: one of the top classes is exact at some temperatures only, one of draws at T = 1.
        asked: In place of these.

    Raises:
        UsageError: There is no such arm, or the cache serves none of the temperatures.
    """
    arms = list(dict.fromkeys((CONTROL, *recipe.distill.arms)))
    if arm not in arms:
        raise UsageError(f"no arm {arm!r} is trained; distill.arms has {', '.join(arms)}")
    own, notes = own_settings(recipe, arm), []
    space = {"learning_rate": asked.get("learning_rate") or _around(own.learning_rate)}
    if arm == CONTROL:
        if wrong := sorted(set(asked) - set(space)):
            raise UsageError(f"the control has no {wrong[0].replace('_', ' ')}: it learns from labels alone")
        return space, ()
    assert own.label_weight is not None
    assert own.temperature is not None
    space["label_weight"] = asked.get("label_weight") or Knob(low=0.0, high=max(0.9, own.label_weight))
    knob = asked.get("temperature")
    if reason := _no_temperature(recipe, arm):
        if knob is not None:
            raise UsageError(f"{arm}: {reason}; leave out --temperature")
        notes.append(f"Temperature is left as it is: {reason}.")
        return space, tuple(notes)
    exact = () if codec.startswith("dense") else TAIL_TEMPERATURES if codec.startswith("top") else (1.0,)
    if exact:
        knob, note = _served(knob, exact, codec)
        notes.append(note)
    else:
        knob = knob or Knob(low=min(1.0, own.temperature), high=max(8.0, own.temperature), is_log=True)
    space["temperature"] = knob
    return space, tuple(notes)


def _around(rate: float) -> Knob:
    return Knob(low=rate / 5, high=rate * 5, is_log=True)


def _no_temperature(recipe: Recipe, arm: str) -> str:
    """Why an arm's temperature changes nothing; empty when it does."""
    losses = recipe.distill.mix(arm).losses.keys() - recipe.distill.features
    if losses - {"hard"}:
        return ""
    return "hard looks at the top class alone" if losses else "features have none"


def _served(asked: Knob | None, exact: Sequence[float], codec: str) -> tuple[Knob, str]:
    """Temperatures that a cache serves exactly, and what is said of the others."""
    served = ", ".join(f"{value:g}" for value in exact)
    knows = f"this {codec} cache is exact at T = {served} alone"
    more = '[teacher] codec = "dense-f16" serves all'
    if asked is None:
        return Knob(tuple(exact)), f"Temperatures: {knows}, so only these are tried; {more}."
    if asked.values:
        good = tuple(value for value in asked.values if value in exact)
        bad = [f"{value:g}" for value in asked.values if value not in exact]
    else:
        good, bad = (
            tuple(value for value in exact if asked.low <= value <= asked.high),
            [f"the rest of {asked.words()}"],
        )
    if not good:
        raise UsageError(f"--temperature {asked.words()}: {knows}; take these, or {more}")
    left_out = f" {', '.join(bad)} is left out;" if bad else ""
    return Knob(good), f"Temperatures: {knows};{left_out} {more}."


def tidy(settings: Settings) -> Settings:
    """Rounded as a person would write them: two digits; what else would a recipe look like."""
    rounded = replace(settings, learning_rate=_two_digits(settings.learning_rate))
    if rounded.temperature is not None:
        rounded = replace(rounded, temperature=_two_digits(rounded.temperature))
    if rounded.label_weight is not None:
        rounded = replace(rounded, label_weight=round(rounded.label_weight, 2))
    return rounded


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
