"""What can be known before hours are spent: data, teacher and student, and what the run will cost."""

from __future__ import annotations

import time

import numpy as np
import torch

from edgekd.capture import record_bytes
from edgekd.distill import arms_of, check_outputs
from edgekd.errors import NumericalError
from edgekd.models import count_parameters, export_program
from edgekd.plugins import load_exporter, require
from edgekd.sources import load_student_module
from edgekd.targets import PLAIN_CODEC, codec_of
from edgekd.views import view_batch, view_partners, view_seeds
from edgekd.workspace import Workspace

__all__ = ["check_workspace"]


def check_workspace(work: Workspace) -> dict[str, str]:
    """Load everything once, run one batch, and say what was found.

    Raises:
        EdgekdError: The first thing that does not fit.
    """
    recipe, splits = work.recipe, work.splits
    for target in recipe.export.targets:
        require(target, load_exporter(target))
    positions = np.arange(min(32, len(splits.train)))
    seeds = view_seeds(splits.train.ids[positions], np.zeros(len(positions)), recipe.distill.seeds[0])
    partners = view_partners(seeds, len(splits.train))
    inputs = view_batch(splits.train, positions, seeds, work.views_of("train"), partners).inputs
    batch = dict(zip(splits.train.inputs, (x.numpy() for x in inputs), strict=True))
    work.teacher.logits(batch)  # the first call pays for set-up
    began = time.monotonic()
    logits = work.teacher.logits(batch)
    per_sample_s = (time.monotonic() - began) / len(positions)
    if not np.isfinite(logits).all():
        raise NumericalError("the teacher gives NaN or infinity on the first training samples")
    student = load_student_module(recipe.student.model, recipe.folder, 0).eval()
    check_outputs(student(*inputs), logits.shape[1], len(splits.labels))
    export_program(student, list(inputs))
    views, plain = len(splits.train) * recipe.data.views, len(splits.validation) + len(splits.test)
    passes, codec = views + plain, codec_of(recipe.codec(logits.shape[1]))
    record = record_bytes(codec, logits.shape[1], mixed=recipe.data.mix is not None)
    size = views * record + plain * record_bytes(codec_of(PLAIN_CODEC), logits.shape[1])
    facts = {
        "recipe": f"{recipe.name} ({recipe.folder})",
        "samples": f"train {len(splits.train)}, validation {len(splits.validation)}, test {len(splits.test)}",
        "inputs": ", ".join(
            f"{name} {tuple(x.shape[1:])}" for name, x in zip(splits.train.inputs, inputs, strict=True)
        ),
        "classes": f"{len(splits.labels)}",
        "teacher cache": f"{size / 1e6:.1f} MB ({codec.name}, {record} bytes a view), "
        f"about {passes * per_sample_s:.0f} s of the teacher",
        "students": f"{len(arms_of(recipe)) * len(recipe.distill.seeds)} to train: "
        f"{', '.join(arms_of(recipe))}; {len(recipe.distill.seeds)} seeds",
        "student parameters": f"{count_parameters(student):,}",
        "torch": torch.__version__,
    }
    if work.teacher.parameters:
        share = count_parameters(student) / work.teacher.parameters
        facts["student parameters"] += f", {share:.1%} of the teacher's (10 to 20 % is a sane start)"
    return facts
