"""The commands that help to choose: suggest (a student), sweep (its settings)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import JsonOption, RecipeOption, progress_bar, require_capture, say, show, show_json, workspace
from edgekd.errors import UsageError

__all__ = ["suggest", "sweep"]

KNOB_HELP = "What is tried: 1:8 (a range), 1,2,4 (values) or 2 (held fixed)"


def suggest(
    recipe: RecipeOption = None,
    share: Annotated[
        str | None,
        typer.Option(help="Parameters as a share of the teacher's; 10:20% unless another limit is given."),
    ] = None,
    mb: Annotated[float | None, typer.Option(help="Megabytes of the file, at most.")] = None,
    macs: Annotated[float | None, typer.Option(help="Multiply-accumulates for one sample, at most: 5e6.")] = None,
    ms: Annotated[float | None, typer.Option(help="Milliseconds on each device (median), at most.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", "-d", help="Where it is measured; repeat it. By default those of the recipe."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="What is measured, in fp32; by default the recipe's first.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Candidates that are measured, at most.")] = 8,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Without a device: sizes alone.")] = True,
    json: JsonOption = False,
) -> None:
    """Say which students there could be at a budget: parameters, size, work, and latency measured on a device."""
    from edgekd.choosing.candidates import OWN
    from edgekd.choosing.suggest import USUAL_SHARE, Budget, parse_share, table
    from edgekd.choosing.suggest import suggest as look
    from edgekd.stages.bench import devices_of_recipe

    for option, limit in (("--mb", mb), ("--macs", macs), ("--ms", ms)):
        if limit is not None and not limit > 0:  # NaN is not
            raise UsageError(f"{option} {limit:g} is no limit; a number above 0 works")
    others = any(limit is not None for limit in (mb, macs, ms))
    shares = parse_share(share) if share is not None else None if others else USUAL_SHARE
    if ms is not None and not measure:
        raise UsageError("--ms needs a device to measure on; leave out --no-measure")
    work = workspace(recipe)
    devices = (device or devices_of_recipe(work)) if measure else []
    rows, notes = look(work, Budget(shares, mb, macs, ms), devices, target, most, progress_bar())
    if json:
        show_json({"candidates": [row.to_json() for row in rows], "notes": notes})
        return
    from rich.console import Console

    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table(rows))
    best = rows[0]
    told = [warning for row in rows if not row.over or row.name == OWN for warning in row.warnings]
    for line in (*told, *notes):
        show(f"• {line}")
    if best.over:
        show(f"no candidate is within the budget; nearest: {best.name} ({', '.join(best.over)})")
        raise typer.Exit(1)
    show("")
    show(best.lines)


def sweep(
    recipe: RecipeOption = None,
    arm: Annotated[
        str | None, typer.Option(help="Whose settings; by default the first of distill.arms but the control.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trainings in all; those done before count.")] = 24,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train at the same time.")] = 1,
    temperature: Annotated[str | None, typer.Option(help=f"{KNOB_HELP}; 1:8 by default.")] = None,
    label_weight: Annotated[str | None, typer.Option(help="The same; 0:0.9 by default.")] = None,
    learning_rate: Annotated[
        str | None, typer.Option(help="The same; from a fifth to five times the recipe's by default.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Of the comparison at the end; by default those of the recipe, at least 3."),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Write the best settings into the recipe.")] = False,
    json: JsonOption = False,
) -> None:
    """Search temperature, label weight and learning rate off one teacher cache; the test split is not looked at."""
    from edgekd.choosing.study import require_optuna
    from edgekd.choosing.sweep import Sweep
    from edgekd.choosing.sweep import sweep as run_sweep
    from edgekd.choosing.sweep_space import parse_knob
    from edgekd.choosing.sweep_words import is_worse, recipe_lines, sentences, swept_json, write_settings
    from edgekd.distillation.arms import CONTROL
    from edgekd.recipes.reading import find_recipe
    from edgekd.recipes.seeds import first_seeds
    from edgekd.reporting.pairing import FEWEST_SEEDS

    require_optuna()
    said = {"temperature": temperature, "label_weight": label_weight, "learning_rate": learning_rate}
    knobs = {name: parse_knob(name, text) for name, text in said.items() if text is not None}
    path = recipe or find_recipe(Path.cwd())
    work = workspace(path)
    require_capture(work, "train", "validation")
    distill = work.recipe.distill
    chosen = arm or next((name for name in distill.arms if name != CONTROL), CONTROL)
    count = seeds or max(FEWEST_SEEDS, len(distill.seeds))
    asked = Sweep(work.recipe, chosen, trials, first_seeds(distill.seeds, count), knobs, workers)
    with work.folder.locked():
        found = run_sweep(asked, progress_bar())
    if json:
        show_json(swept_json(found))
    else:
        for line in (*found.notes, *sentences(found)):
            show(line)
        show("")
        show(recipe_lines(chosen, found.best.settings))
    if write:
        if is_worse(found):
            raise UsageError(f"{path.name} was not changed: its own settings are better, as far as can be told")
        write_settings(path, chosen, found.best.settings)
        say(f"wrote these into {path}; edgekd distill trains with them")
