"""torchdistill's KD on a task of :mod:`edgekd.benchmarks.distill`: the same models, data, views, loss and schedule.

    PYTHONPATH=DIR python -m edgekd.benchmarks.distill_peer fashion-15 --epochs 3    # torchdistill lies in DIR

Its teacher runs at every step, so fewer epochs fit into the hours of an arm of edgekd; how many, ``--epochs`` says, and
the result has the hours of both. The result of each seed goes into ``benchmarks/results/distill.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd import plugins
from edgekd.console import progress_for
from edgekd.data.samples import load_splits
from edgekd.data.split import Split
from edgekd.distillation.arms import plan_of
from edgekd.distillation.train import learning_rate_at
from edgekd.metrics import accuracy
from edgekd.protocols import Progress
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe import Recipe
from edgekd.store import read_json, write_json
from edgekd.teachers.sources import fresh_module, trainable_module
from edgekd.types import Json

from .distill import RESULTS, ROOT, TASKS
from .distill_steps import Samples, Unstacked, import_torchdistill, stacked, torchdistill_box

ARM = "kd"


def trained(recipe: Recipe, seed: int, epochs: int, progress: Progress) -> Json:
    """One student of a live teacher; its test accuracy and what it took."""
    splits, mix = load_splits(recipe), recipe.distill.mix(ARM)
    plan = replace(plan_of(recipe, ARM, seed), epochs=epochs)
    assert recipe.teacher.model is not None
    teacher = trainable_module(recipe.teacher.model, recipe.folder, labels=recipe.labels).eval()
    student = fresh_module(recipe, seed)
    if len(splits.train.inputs) > 1:
        teacher, student = Unstacked(teacher), Unstacked(student)
    augment = plugins.load_function(recipe.data.augment, recipe.folder) if recipe.data.augment else None
    samples = Samples(splits.train, augment)
    label_all(samples, splits.train, teacher)
    torch.manual_seed(seed)  # of the loader's order
    samples.generator.manual_seed(seed)
    box = torchdistill_box(teacher, student, samples, plan, mix.temperature, mix.label_weight)
    steps = epochs * (len(samples) // plan.batch_size)
    progress.start(f"torchdistill {ARM}, seed {seed}", steps)
    processor, clock, step = time.process_time(), time.monotonic(), 0
    for epoch in range(epochs):
        box.pre_epoch_process(epoch=epoch)
        for inputs, targets, supplements in box.train_data_loader:
            for group in box.optimizer.param_groups:
                group["lr"] = learning_rate_at(step, steps, plan)
            loss = box.forward_process(inputs, targets, supplements)
            box.post_forward_process(loss)
            step += 1
            progress.advance(1, f"loss {loss.item():.3f}")
    progress.finish()
    spent = {"cpu_hours": (time.process_time() - processor) / 3600, "hours": (time.monotonic() - clock) / 3600}
    assert splits.test.labels is not None
    logits = logits_of(student, splits.test)
    found = {"test": accuracy(logits, splits.test.labels), "epochs": epochs}
    return found | {name: round(value, 4) for name, value in spent.items()}


def label_all(samples: Samples, split: Split, teacher: nn.Module) -> None:
    """Give samples without a label the teacher's own, in place: torchdistill's loss wants one of each."""
    unlabelled = [index for index, label in enumerate(samples.labels) if label < 0]
    if unlabelled:
        for index, label in zip(unlabelled, logits_of(teacher, split)[unlabelled].argmax(1), strict=True):
            samples.labels[index] = int(label)


@torch.no_grad()
def logits_of(module: nn.Module, split: Split) -> np.ndarray:
    """Of every sample as it is, (samples, classes)."""
    inputs = stacked([torch.from_numpy(array) for array in split.arrays().values()], axis=1)
    return torch.cat([module.eval()(part) for part in inputs.split(500)]).numpy()


def main() -> None:
    """Train one student for each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    import_torchdistill()
    recipe = load_recipe(ROOT / TASKS[options.task].recipe)
    torch.set_num_threads(recipe.distill.threads or 1)
    for seed in options.seeds:
        result = trained(recipe, seed, options.epochs, progress_for())
        report = read_json(options.out)
        peer = report["tasks"].setdefault(options.task, {}).setdefault("torchdistill", {"seeds": {}})
        peer["version"] = importlib.metadata.version("torchdistill")
        peer["seeds"][str(seed)] = result
        write_json(options.out, report)


if __name__ == "__main__":
    main()
