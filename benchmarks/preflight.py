"""How far off ``edgekd check`` is: what it says that a run will cost, and what the run then costs.

``python -m edgekd.benchmarks.preflight edgekd.toml …`` probes each recipe, then captures and trains for real in a
folder that is thrown away, and prints both with their ratio. ``--out`` keeps them as JSON.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from edgekd.choosing.preflight import duration, preflight
from edgekd.console import progress_for
from edgekd.protocols import Progress
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe import Recipe
from edgekd.stages.pipeline import capture_stage, distill_stage
from edgekd.stages.workspace import Workspace
from edgekd.store import write_json
from edgekd.types import Json


def compared(recipe: Recipe, progress: Progress) -> Json:
    """One recipe: said and found, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        work = Workspace(recipe.model_copy(update={"runs": folder}))
        said = preflight(work)
        began = time.monotonic()
        capture_stage(work, progress)
        captured = time.monotonic()
        distill_stage(work, progress)
        trained = time.monotonic()
    found = {"capture_s": captured - began, "training_s": trained - captured}
    wanted = {"capture_s": said.capture_s, "training_s": said.training_s}
    return {
        "recipe": recipe.name,
        "passes": said.passes,
        "students": len(said.arms) * said.students,
        "steps": {arm.arm: arm.steps for arm in said.arms},
        "probe_s": round(said.probe_s, 2),
        "said": {key: round(value, 2) for key, value in wanted.items()},
        "found": {key: round(value, 2) for key, value in found.items()},
        "said_to_found": {key: round(value / found[key], 3) for key, value in wanted.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--epochs", type=int, help="In place of the recipes'.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    for path in options.recipes:
        recipe = load_recipe(path)
        if options.epochs is not None:
            distill = recipe.distill.model_copy(update={"epochs": options.epochs})
            recipe = recipe.model_copy(update={"distill": distill})
        results.append(row := compared(recipe, progress_for()))
        for key, value in row["said_to_found"].items():
            said, found = duration(row["said"][key]), duration(row["found"][key])
            what = key.removesuffix("_s")
            sys.stdout.write(f"{recipe.name}, {what}: said {said}, took {found}, {value:.2f}×\n")
    if options.out is not None:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads; a shared machine"
        write_json(options.out, {"results": results, "torch": torch.__version__, "machine": machine})


if __name__ == "__main__":
    main()
