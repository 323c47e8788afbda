"""Students that a recipe could have: wider and deeper ones of its own family, and its teacher with fewer blocks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgekd import plugins
from edgekd.errors import EdgekdError
from edgekd.protocols import Trainable
from edgekd.recipes.recipe import Recipe
from edgekd.recipes.recipe_models import AS_DATA
from edgekd.teachers.blocks import find_stacks
from edgekd.teachers.sources import own_preprocessing, trainable_module
from edgekd.types import Json

__all__ = ["FACTORS", "KNOBS", "OWN", "Candidate", "candidates_of"]

OWN = "the recipe's own"
"""Name of the student that the recipe has."""

KNOBS = ("width", "depth")
"""Arguments of a student's function that make a family, where they have a number as their default."""

FACTORS = (0.25, 0.35, 0.5, 0.7, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
"""What a knob's default is multiplied with: twice the parameters at each step, where these go with the square."""

EVERY = (2, 3, 4, 6, 12)
"""Of a teacher's blocks, one of so many is kept."""


@dataclass(frozen=True)
class Candidate:
    """A student to look at.

    Attributes:
        name: For people.
        model, told: As ``[student]`` of a recipe says them.
    """

    name: str
    model: str
    told: Json

    def lines(self) -> str:
        """What a recipe has to say to train it."""
        return "\n".join(
            [
                "[student]",
                f"model = {json.dumps(self.model)}",
                *(f"{key} = {_toml(value)}" for key, value in self.told.items()),
            ]
        )


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)


def candidates_of(recipe: Recipe) -> tuple[list[Candidate], list[str]]:
    """All of them, the recipe's own student first; and in a sentence each, of what there are none, and why."""
    own = Candidate(OWN, recipe.student.model, recipe.student.told)
    family, no_family = _family(recipe)
    blocks, no_blocks = _blocks(recipe)
    more = [one for one in (*family, *blocks) if (one.model, one.told) != (own.model, own.told)]
    return [own, *more], [why for why in (no_family, no_blocks) if why]


def _family(recipe: Recipe) -> tuple[list[Candidate], str]:
    """The student's own function with other widths and depths."""
    reference, told = recipe.student.model, recipe.student.told
    name, place = plugins.origin_of(reference)
    if name != "function":
        return [], f"No family of {reference}: only a module:function can take width or depth."
    signature = inspect.signature(plugins.load_function(place, recipe.folder))
    said = told.get("arguments", {})
    knobs = {}
    for knob in KNOBS:
        parameter = signature.parameters.get(knob)
        if parameter is not None and _is_number(parameter.default):
            knobs[knob] = said[knob] if _is_number(said.get(knob)) else parameter.default
    if not knobs:
        return [], (
            f"No family of {reference}: it takes neither width nor depth with a number as default "
            "(def student(width: float = 1.0))."
        )
    found = []
    for changed in _changes(knobs):
        words = ", ".join(f"{knob} {value:g}" for knob, value in changed.items())
        found.append(Candidate(f"own, {words}", reference, {**told, "arguments": {**said, **changed}}))
    return found, ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _changes(knobs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each knob alone times each factor; whole numbers stay whole, and what rounding makes equal comes once."""
    seen = set()
    for knob, default in knobs.items():
        for factor in FACTORS:
            value = max(1, round(default * factor)) if isinstance(default, int) else round(default * factor, 4)
            if value != default and (knob, value) not in seen:
                seen.add((knob, value))
                yield {knob: value}


def _blocks(recipe: Recipe) -> tuple[list[Candidate], str]:
    """Each teacher that takes and gives what the student does, with every k-th of its blocks."""
    found, reasons = [], []
    for member in recipe.teacher.members:
        reason, counts = _stack_counts(recipe, member.model)
        own = None if reason else own_preprocessing(member.model, recipe.folder, member.told, recipe.labels)
        if (member.preprocessing or own or AS_DATA) != AS_DATA:
            reason = "it takes other inputs than the data's"
        elif member.gives not in ("logits", "embedding"):
            reason = f"it gives {member.gives}"
        elif member.told and not reason:
            reason = "what the recipe says of it is not said of its blocks"
        if reason:
            reasons.append(f"No student of blocks of {member.model}: {reason}.")
            continue
        kept = set()
        for every in EVERY:
            left = tuple(-(-count // every) for count in counts)
            if left not in kept:
                kept.add(left)
                name = f"{'+'.join(map(str, left))} of {'+'.join(map(str, counts))} blocks"
                found.append(Candidate(f"teacher, {name}", f"blocks_of:{member.model}", {"every": every}))
    return found, " ".join(reasons)


def _stack_counts(recipe: Recipe, reference: str) -> tuple[str, tuple[int, ...]]:
    """How many blocks a teacher has in each stack; or why it has none that a student could take."""
    name, _ = plugins.origin_of(reference)
    if not isinstance(plugins.load_origin(name), Trainable):
        return f"{name}: files cannot be trained", ()
    try:
        module: nn.Module = trainable_module(reference, recipe.folder, labels=recipe.labels)
    except EdgekdError as error:
        return str(error), ()
    counts = tuple(stack.count for stack in find_stacks(module))
    return ("" if counts else "it repeats no block of equal shapes"), counts
