"""What all commands share: their options, the recipe at hand, and where words go.

Results go to stdout, talk and progress to stderr.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.errors import UsageError

if TYPE_CHECKING:
    from edgekd.protocols import Progress
    from edgekd.stages.workspace import Workspace

__all__ = [
    "ForceOption",
    "JsonOption",
    "MaxDropOption",
    "PrecisionOption",
    "RecipeOption",
    "ReleaseOption",
    "SeedsOption",
    "drop_of",
    "progress_bar",
    "require_capture",
    "require_model",
    "require_path",
    "say",
    "show",
    "show_json",
    "workspace",
]

RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", help="edgekd.toml; by default the one here or in the nearest folder above."),
]
ReleaseOption = Annotated[str, typer.Option(help="What the history calls these files: v1.4, a commit …")]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it again even if nothing changed.")]
SeedsOption = Annotated[
    int | None,
    typer.Option(
        "--seeds", min=1, help="Train each arm so many times: the recipe's seeds first, then 0, 1, 2 …; kept for later."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
PrecisionOption = Annotated[
    list[str] | None,
    typer.Option("--precision", "-p", help="fp32, int8 (chosen by rule), or another that edgekd targets lists."),
]
MaxDropOption = Annotated[
    str | None,
    typer.Option("--max-drop", help="What precision auto may lose: 0.5pt (half a point of accuracy) or 0.005."),
]


def workspace(recipe: Path | None, seeds: int | None = None) -> Workspace:
    """The recipe that was named, or the nearest one, at work; with as many seeds as are or were last asked for."""
    from edgekd.recipes.reading import find_recipe, load_recipe
    from edgekd.recipes.seeds import with_seeds
    from edgekd.stages.workspace import Workspace

    return Workspace(with_seeds(load_recipe(recipe or find_recipe(Path.cwd())), seeds))


def require_path(path: Path | None, what: str) -> None:
    """Refuse a file or folder that was named and is not there; None was not named.

    Raises:
        UsageError: It is not there.
    """
    if path is not None and not path.exists():
        raise UsageError(f"no {what} at {path}")


def require_model(reference: str) -> None:
    """The same of ``model.pt2``, ``pt2:file``, a student's folder, or ``hf:folder``."""
    prefix, _, rest = reference.partition(":")
    if prefix == "hf":
        require_path(Path(rest), "model folder")
    else:
        require_path(Path(rest if prefix == "pt2" else reference), "model file")


def require_capture(work: Workspace, *splits: str) -> None:
    """Refuse to go on before the teacher was run.

    Args:
        splits: Whose caches are needed; all by default.

    Raises:
        UsageError: A cache is not there yet.
    """
    from edgekd.stages.workspace import SPLITS

    for name in splits or SPLITS:
        work.folder.require(work.folder.cache(name), "capture")


def progress_bar() -> Progress:
    """How far a command is, on stderr."""
    from edgekd.console import progress_for

    return progress_for()


def drop_of(text: str | None) -> float | None:
    """A budget as it is typed, as a share."""
    from edgekd.recipes.recipe import parse_drop

    try:
        found: float | None = parse_drop(text)
    except ValueError as error:
        raise UsageError(f"--max-drop {error}") from None
    if found is not None and not 0 <= found < 1:
        raise UsageError(f"--max-drop {text} is no budget; 0.5pt (half a point) or 0.005 works")
    return found


def show(line: str) -> None:
    """A line of the result."""
    typer.echo(line)


def say(line: str) -> None:
    """A line of talk."""
    typer.echo(line, err=True)


def show_json(value: Any) -> None:
    """The result as one JSON document."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
