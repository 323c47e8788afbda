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

import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.console import progress_for
from edgekd.data.samples import load_splits
from edgekd.data.split import Split
from edgekd.data.windows import positions_of
from edgekd.distillation.arms import plan_of
from edgekd.distillation.distill import evaluate, student_of
from edgekd.distillation.train import learning_rate_at
from edgekd.protocols import Progress
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe import Recipe
from edgekd.stages.workspace import Workspace
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
    module = student
    if positions_of(splits.train.labels):
        teacher, student = ReadTokens(teacher), ReadTokens(student)
    elif len(splits.train.inputs) > 1:
        teacher, student = Unstacked(teacher), Unstacked(student)
    augment = plugins.load_function(recipe.data.augment, recipe.folder) if recipe.data.augment else None
    samples = Samples(splits.train, augment)
    if positions_of(splits.train.labels) == 0:
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
            if targets.ndim > 1:
                targets = next_tokens(inputs, targets)
            loss = box.forward_process(inputs, targets, supplements)
            box.post_forward_process(loss)
            step += 1
            progress.advance(1, f"loss {loss.item():.3f}")
    progress.finish()
    spent = {"cpu_hours": (time.process_time() - processor) / 3600, "hours": (time.monotonic() - clock) / 3600}
    test = evaluate(student_of(recipe, splits, module.eval(), ()), splits.test, Workspace(recipe).cache("test"))
    found = {"test": test.accuracy, "teacher_agreement": test.teacher_agreement, "epochs": epochs}
    if test.perplexity is not None:
        found["perplexity"] = test.perplexity
    return found | {name: round(value, 4) for name, value in spent.items()}


class ReadTokens(nn.Module):
    """A language model with tokens as samples: ids and mask (batch, 2, positions) to (tokens read, classes)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        ids, mask = inputs.unbind(1)
        return self.module(ids, mask)[mask.bool()]


def next_tokens(inputs: Tensor, labels: Tensor) -> Tensor:
    """The labels of :class:`ReadTokens`, (tokens that are read,); the last of a document has none."""
    read = labels[inputs[:, 1].bool()]
    return read.masked_fill(read < 0, -100)  # what torch's cross-entropy leaves out


def label_all(samples: Samples, split: Split, teacher: nn.Module) -> None:
    """Give samples without a label the teacher's own, in place: torchdistill's loss wants one of each."""
    without = (samples.labels < 0).nonzero().flatten()
    inputs = stacked([torch.from_numpy(array) for array in split.arrays(without.numpy()).values()], axis=1)
    with torch.no_grad():
        for rows, part in zip(without.split(500), inputs.split(500), strict=True):
            samples.labels[rows] = teacher.eval()(part).argmax(1)


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
