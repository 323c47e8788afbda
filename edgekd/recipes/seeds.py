"""How many seeds: those of the recipe, or as many as a command last asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from edgekd.recipes.recipe import Recipe
from edgekd.store import RunFolder

__all__ = ["first_seeds", "keep_count", "with_seeds"]

_STAGE = "seeds"


def first_seeds(own: Sequence[int], count: int) -> tuple[int, ...]:
    """So many seeds: the recipe's own first, then 0, 1, 2 … that are not among them.

    The first stays the first, since the views of the teacher cache come from it, and what is trained stays trained.
    """
    more = (seed for seed in itertools.count() if seed not in own)
    return tuple(itertools.islice(itertools.chain(own, more), count))


def with_seeds(recipe: Recipe, count: int | None = None) -> Recipe:
    """The recipe with ``count`` seeds; None for what was last asked for in its run folder, else what it says itself."""
    count = count or RunFolder(recipe.run_folder).done_with(_STAGE).get("count")
    if count is None:
        return recipe
    distill = recipe.distill.model_copy(update={"seeds": first_seeds(recipe.distill.seeds, count)})
    return recipe.model_copy(update={"distill": distill})


def keep_count(recipe: Recipe, count: int | None) -> None:
    """Have the commands that follow take as many; None changes nothing. The run folder is held by the caller."""
    if count is not None:
        RunFolder(recipe.run_folder).finish(_STAGE, {"count": count}, [])
