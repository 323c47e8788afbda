"""Whether data, teacher and student fit, before hours are spent; :mod:`edgekd.choosing.preflight` says how many."""

from __future__ import annotations

import numpy as np
import torch

from edgekd.data.views import view_batch, view_partners, view_seeds
from edgekd.data.windows import counted_positions, positions_of
from edgekd.distillation.distill import check_output
from edgekd.distillation.features import with_features
from edgekd.errors import NumericalError, UsageError
from edgekd.exporting.export import requests_of
from edgekd.plugins import load_exporter, require
from edgekd.programs.models import count_parameters
from edgekd.programs.tracing import export_program
from edgekd.stages.members import teacher_accuracy
from edgekd.stages.workspace import Workspace
from edgekd.teachers.blocks import started_from
from edgekd.teachers.feature_records import layout_of
from edgekd.teachers.language_student import NoCachesError, untrained_decoder
from edgekd.teachers.records import record_bytes
from edgekd.teachers.sources import fresh_module
from edgekd.teachers.targets import codec_of

__all__ = ["check_workspace"]


def check_workspace(work: Workspace) -> dict[str, str]:
    """Load everything once, run one batch, and say what was found.

    Raises:
        EdgekdError: The first thing that does not fit.
    """
    recipe, splits = work.recipe, work.splits
    for target in recipe.export.targets:
        require(target, load_exporter(target))
    positions = positions_of(splits.train.labels)
    rows = np.arange(min(max(2, 256 // positions) if positions else 32, len(splits.train)))
    seeds = view_seeds(splits.train.ids[rows], np.zeros(len(rows)), recipe.distill.seeds[0])
    partners = view_partners(seeds, len(splits.train))
    inputs = view_batch(splits.train, rows, seeds, work.views_of("train"), partners).inputs
    batch = dict(zip(splits.train.inputs, (x.numpy() for x in inputs), strict=True))
    answer = work.teacher.outputs(batch)
    logits, layout = answer.logits, layout_of(answer.features)
    if not np.isfinite(logits).all():
        raise NumericalError("the teacher gives NaN or infinity on the first training samples")
    student = fresh_module(recipe, 0).eval()
    classes = logits.shape[-1]
    check_output(recipe, splits, student(*inputs), classes)
    for arm in work.arms:
        shapes = {name: shape for name, (_, shape) in layout.items()}
        with_features(student, recipe.distill.features_of(arm), shapes, dict(zip(batch, inputs, strict=True)), 0)
    export_program(student, list(inputs))
    views, plain = len(splits.train) * recipe.data.views, len(splits.validation) + len(splits.test)
    key = work.capture_key("train")
    codec, kept = codec_of(key.codec), {name: layout[name] for name in key.features}
    record = record_bytes(codec, classes, positions, recipe.data.mix is not None, kept)
    judged_by = codec_of(work.capture_key("validation").codec)
    size = views * record + plain * record_bytes(judged_by, classes, positions)
    facts = {
        "recipe": f"{recipe.name} ({recipe.folder})",
        "samples": f"train {len(splits.train)}, validation {len(splits.validation)}, test {len(splits.test)}",
        "inputs": ", ".join(
            f"{name} {tuple(x.shape[1:])}" for name, x in zip(splits.train.inputs, inputs, strict=True)
        ),
        **(
            {"embedding": f"{classes} numbers", "control": _control_words(work)}
            if recipe.teacher.embeds
            else {"classes": f"{classes}", "teacher": teacher_accuracy(work)}
        ),
        "teacher cache": f"{size / 1e6:.1f} MB ({codec.name}, {record} bytes a view)",
        "students": f"{len(work.arms) * len(recipe.distill.seeds)} to train: "
        f"{', '.join(work.arms)}; {len(recipe.distill.seeds)} seeds",
        "student parameters": f"{count_parameters(student):,}",
        "torch": torch.__version__,
    }
    if positions:
        labels = [split.labels for split in (splits.train, splits.validation, splits.test)]
        counts = [0 if label is None else int(counted_positions(label).sum()) for label in labels]
        facts["tokens that count"] = "train {}, validation {}, test {}".format(*counts)
        facts["files"] = _files(work)
    if work.teacher.parameters:
        share = count_parameters(student) / work.teacher.parameters
        facts["student parameters"] += f", {share:.1%} of the teacher's (10 to 20 % is a sane start)"
    if start := started_from(student):
        facts["student starts from"] = f"{start}; the control too"
    if splits.validation_in_train:
        facts["validation in train"] = f"{splits.validation_in_train} of {len(splits.validation)} samples"
    if splits.test_in_others:
        facts["test in train or validation"] = f"{splits.test_in_others} of {len(splits.test)} samples"
    if splits.joined is not None:
        facts["unlabeled"] = splits.joined.sentence()
    return facts


def _control_words(work: Workspace) -> str:
    """What a student of embeddings without a teacher learns from."""
    labels = work.splits.labels
    return f"from {len(labels)} labels alone, by a head that is left behind" if labels else "none: there are no labels"


def _files(work: Workspace) -> str:
    """What the files of a language model will be.

    Raises:
        UsageError: The recipe asks for what cannot be written or judged.
    """
    export = work.recipe.export
    try:
        student = untrained_decoder(work)
    except NoCachesError as error:
        return f"none, edgekd run stops after distill: {error}"
    requests_of({target: export.precisions_of(target) for target in export.targets}, student)
    assert student.card.decoder is not None
    context, length = student.card.decoder.context, positions_of(work.splits.test.labels)
    if context < length:
        raise UsageError(f"export.context: {context} slots do not hold a window of {length}, which files are judged on")
    return f"keep keys and values; prompt and answer have {context} tokens together"
