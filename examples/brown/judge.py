"""Perplexity, right next tokens and agreement with the teacher, on the test split, of transformers folders.

``python judge.py student=runs/brown/students/kd-0 better``: a folder, or a folder with what an arm has learned in it.
The teacher is not run: ``edgekd capture`` has kept what it says of the test split.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from edgekd.data.windows import counted_positions
from edgekd.distillation.perplexity import Tokens, quality_of_tokens, tokens_of
from edgekd.metrics import Quality
from edgekd.programs.hugging_face import hugging_face_module
from edgekd.recipes.reading import load_recipe
from edgekd.stages.workspace import Workspace
from edgekd.teachers.language_student import put_weights

HERE = Path(__file__).parent
WINDOWS = 8


def main() -> None:
    """Judge each of the folders that were named."""
    torch.set_num_threads(1)
    work = Workspace(load_recipe(HERE / "edgekd.toml"))
    for named in sys.argv[1:] or sys.exit("usage: python judge.py FOLDER[=runs/brown/students/ARM-SEED] …"):
        found = judged(work, *map(Path, named.split("=")))
        print(
            f"{named}: perplexity {found.perplexity:.1f}, right {found.accuracy:.2%}, the teacher's own "
            f"{found.teacher_agreement:.2%}, KL(teacher ‖ student) {found.kl:.3f} on {found.samples:,} tokens"
        )


def judged(work: Workspace, folder: Path, weights: Path | None = None) -> Quality:
    """A causal language model on the windows of the test split."""
    module = hugging_face_module(folder)
    if weights is not None:
        put_weights(module, weights, str(folder))
    split, cache, parts = work.splits.test, work.cache("test"), []
    assert split.labels is not None
    for start in range(0, len(split), WINDOWS):
        rows = np.arange(start, min(start + WINDOWS, len(split)))
        counted = counted_positions(split.labels[rows])
        arrays = [torch.from_numpy(array) for array in split.arrays(rows).values()]
        with torch.no_grad():
            logits = module(*arrays)[torch.from_numpy(counted)]
        said = cache.read(cache.rows(split.ids[rows]), np.zeros(len(rows), np.int64), counted).outputs.classes
        parts.append(tokens_of(logits, torch.from_numpy(split.labels[rows][counted]), said))
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Tokens.__annotations__}
    return quality_of_tokens(Tokens(**columns), counted_positions(split.labels).sum(axis=1))


if __name__ == "__main__":
    main()
