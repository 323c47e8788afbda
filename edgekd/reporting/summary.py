"""What a run found, gathered into the ledger: the rows, the classes, and the verdicts in words."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import edgekd
from edgekd import plugins
from edgekd.compression.compressed import notes_of
from edgekd.data.windows import positions_of
from edgekd.distillation.arms import CONTROL
from edgekd.distillation.distill import ArmResult, Trained
from edgekd.distillation.embeddings import Likeness, own_likeness
from edgekd.measurement import Measurement
from edgekd.metrics import ClassCount, Quality
from edgekd.precisions import PORTABLE
from edgekd.reporting.answers import Answers, answers_of
from edgekd.reporting.embedding_verdict import embedding_sentences
from edgekd.reporting.ledger import ArmRow, ClassRow, Ledger, Row, Stage
from edgekd.reporting.verdict import (
    arm_rows,
    gain_sentence,
    inheritance_sentence,
    kept_sentence,
    perplexity_sentence,
    start_sentences,
)
from edgekd.stages.keeping import measurements_of
from edgekd.stages.members import teacher_quality, teacher_sentences
from edgekd.stages.results import results_of, shipped, trained_of
from edgekd.stages.workspace import Workspace
from edgekd.store import atomic_write, load_artifact, load_card, read_json, size_of, write_json
from edgekd.types import Artifact, Card, Json

__all__ = ["collect", "write_report"]

WEAK_CLASS_MARGIN = 0.05
"""A teacher is called weak in a class whose share of right answers is this far under its accuracy over all."""

UNREADABLE_VIEWS_MARGIN = 0.05
"""Views are told of when the teacher's accuracy on them is this much and two standard errors under that on samples."""


@dataclass(frozen=True)
class _Told:
    """What a report says by what its students are judged by.

    Attributes:
        teacher: Itself, on the test split.
        sentences: In order.
        arms, classes: None of embeddings.
    """

    teacher: Quality | Likeness
    sentences: tuple[str, ...]
    arms: tuple[ArmRow, ...] = ()
    classes: tuple[ClassRow, ...] = ()


def collect(work: Workspace) -> tuple[Ledger, list[Measurement]]:
    """The ledger of everything that has been done so far.

    Raises:
        UsageError: No student has been trained yet.
    """
    chosen, folder = shipped(work)
    card, measurements = load_card(folder), measurements_of(work.folder)
    artifacts = [(load_artifact(path), path) for path in work.folder.artifacts()]
    tell = _tell_embeddings if work.recipe.teacher.embeds else _tell_classes
    told = tell(work, chosen.arm, chosen.seed, card)
    rows = (
        _teacher_row(work, told.teacher),
        *(_student_row(work, one, one == chosen) for one in trained_of(work) if one.seed == chosen.seed),
        *_compressed_rows(work),
        *(_artifact_row(artifact, path.name, measurements) for artifact, path in artifacts),
    )
    ledger = Ledger(
        name=work.recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sentences=(
            *told.sentences,
            *_shared_sentences(work),
            *_artifact_sentences([artifact for artifact, _ in artifacts], measurements),
        ),
        rows=rows,
        classes=told.classes,
        lineage=card.lineage,
        environment=_environment(),
        gain=next((row.gain for row in told.arms if row.is_shipped), None),
        arms=told.arms,
    )
    return ledger, measurements


def _tell_classes(work: Workspace, arm: str, seed: int, card: Card) -> _Told:
    """Of classes, or tokens.

    Args:
        arm, seed, card: Of the shipped student.
    """
    results, teacher, answers = results_of(work, Quality), teacher_quality(work), _answers(work)
    arms = arm_rows(results, arm, answers)
    control, student = (next(r.test for r in results if (r.arm, r.seed) == (name, seed)) for name in (CONTROL, arm))
    classes = _class_rows(work.splits.labels, teacher, control, student)
    sentences = (
        *_distillation_sentences(results, arms, teacher, card, _share_of_parameters(work, card), answers),
        *_joined_sentences(work),
        *teacher_sentences(work, teacher.accuracy),
        *_view_sentences(work),
        *_weakness_sentences(classes),
    )
    return _Told(teacher, sentences, arms, classes)


def _tell_embeddings(work: Workspace, arm: str, seed: int, card: Card) -> _Told:
    """See :func:`_tell_classes`; all seeds count alike."""
    test = work.splits.test
    assert test.labels is not None
    teacher = own_likeness(work.cache("test").vectors(test.ids), test.labels)
    sentences = embedding_sentences(results_of(work, Likeness), arm, teacher, _share_of_parameters(work, card))
    return _Told(teacher, (*sentences, *_joined_sentences(work)))


def write_report(work: Workspace) -> Ledger:
    """Write ``report.json`` and ``report.html``; returns what they tell."""
    ledger, measurements = collect(work)
    seeds = [
        {"arm": r.arm, "seed": r.seed, "validation": r.validation.to_json(), "test": r.test.to_json()}
        for r in trained_of(work)
    ]
    artifacts = [load_artifact(path).to_json() for path in work.folder.artifacts()]
    content = {
        "ledger": ledger.to_json(),
        "arms": seeds,
        "artifacts": artifacts,
        "measurements": [_measurement_summary(measurement) for measurement in measurements],
    }
    write_json(work.folder.report_json, content)
    report = plugins.load_module("edgekd.benchmarks.report")
    atomic_write(work.folder.report_html, report.html(ledger, measurements).encode())
    return ledger


def _measurement_summary(measurement: Measurement) -> Json:
    """Statistics instead of raw samples, which stay in ``measurements/``."""
    stats = plugins.load_module("edgekd.benchmarks.stats")
    summary = stats.summarize(measurement)
    told = {key: value for key, value in measurement.to_json().items() if key != "blocks"}
    conditions = measurement.blocks[-1].conditions if measurement.blocks else {}
    return {**told, "summary": None if summary is None else summary.to_json(), "conditions": conditions}


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _answers(work: Workspace) -> Answers | None:
    """None where a sample has no single class, as a window of tokens."""
    labels = work.splits.test.labels
    if labels is None or labels.ndim != 1:
        return None
    return answers_of(work, work.arms, work.recipe.distill.seeds)


_BESIDE_THE_TEACHER = ("teacher_agreement", "kl", "cosine", "neighbours")
"""Columns that would compare the teacher with itself."""


def _teacher_row(work: Workspace, teacher: Quality | Likeness) -> Row:
    return Row(
        stage="teacher",
        name=work.recipe.teacher.name,
        **{name: value for name, value in _numbers(teacher).items() if name not in _BESIDE_THE_TEACHER},
        size_bytes=work.teacher.size_bytes or None,
        parameters=work.teacher.parameters,
        macs=_macs_of_one(work, work.teacher.macs),
    )


def _macs_of_one(work: Workspace, macs: int | None) -> int | None:
    """Of a sample; of a language model that reads whole windows, of a token, as of its files."""
    return None if macs is None else macs // max(1, positions_of(work.splits.train.labels))


def _student_row(work: Workspace, result: Trained, is_shipped: bool) -> Row:
    folder = work.folder.arm(result.arm, result.seed)
    stage: Stage = "control" if result.arm == CONTROL else "student"
    name = "no teacher" if result.arm == CONTROL else result.arm
    row = _program_row(stage, name, result.test, folder, is_shipped)
    return replace(row, macs=_macs_of_one(work, row.macs))


def _program_row(stage: Stage, name: str, test: Quality | Likeness, folder: Path, is_shipped: bool = False) -> Row:
    card = load_card(folder)
    return Row(
        stage=stage,
        name=name,
        precision=card.precision,
        **_numbers(test),
        size_bytes=size_of(folder / "student.pt2"),
        parameters=card.parameters,
        macs=card.macs,
        note=" ".join(notes_of(card)),
        is_shipped=is_shipped,
    )


def _numbers(test: Quality | Likeness) -> dict[str, Any]:
    """What a row has a column for."""
    return {name: value for name, value in vars(test).items() if name in Row.__dataclass_fields__}


def _compressed_rows(work: Workspace) -> list[Row]:
    rows = []
    folders = {precision: work.folder.compressed(precision) for precision in PORTABLE}
    if word := work.recipe.compress.prune:
        folders = {word: work.folder.pruned, **folders}
    for name, folder in folders.items():
        if (folder / "result.json").is_file():
            kind = Likeness if work.recipe.teacher.embeds else Quality
            test = kind.from_json(read_json(folder / "result.json")["test"])
            rows.append(_program_row("compressed", name, test, folder))
    return rows


def _artifact_row(artifact: Artifact, name: str, measurements: Sequence[Measurement]) -> Row:
    stats = plugins.load_module("edgekd.benchmarks.stats")
    measured = next((m for m in measurements if m.artifact_sha256 == artifact.sha256 and m.status == "measured"), None)
    found = None if measured is None else stats.summarize(measured)
    return Row(
        stage="artifact",
        name=name,
        target=artifact.target,
        precision=artifact.precision,
        accuracy=artifact.accuracy,
        teacher_agreement=artifact.teacher_agreement,
        perplexity=artifact.perplexity,
        size_bytes=artifact.size_bytes,
        parameters=artifact.card.parameters,
        macs=artifact.card.macs,
        latency_ms=None if measured is None else stats.latency_ms(measured),
        latency_device="" if measured is None else measured.device,
        parity=artifact.parity.status,
        first_token_ms=None if found is None else found.first_token_ms,
        tokens_per_second=None if found is None else found.tokens_per_second,
        prompt_tokens=0 if measured is None else measured.plan.prompt_tokens,
        proof=artifact.parity,
        note=" ".join(artifact.notes),
    )


def _class_rows(labels: Sequence[str], teacher: Quality, control: Quality, student: Quality) -> tuple[ClassRow, ...]:
    return tuple(
        ClassRow(
            label=label,
            support=t.support,
            teacher_accuracy=_share(t),
            control_accuracy=_share(c),
            student_accuracy=_share(s),
            teacher_is_weak=t.support > 0 and t.correct / t.support < teacher.accuracy - WEAK_CLASS_MARGIN,
        )
        for label, t, c, s in zip(labels, teacher.classes, control.classes, student.classes, strict=True)
    )


def _share(count: ClassCount) -> float | None:
    return count.correct / count.support if count.support else None


def _environment() -> dict[str, str]:
    packages = ("torch", "torchao", "numpy", "onnxruntime", "coremltools", "ai-edge-litert")
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in packages if name in installed}
    return {
        "edgekd": edgekd.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }


# ── sentences ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _distillation_sentences(
    results: Sequence[ArmResult[Quality]],
    arms: Sequence[ArmRow],
    teacher: Quality,
    card: Card,
    share: float | None,
    answers: Answers | None,
) -> list[str]:
    lines = [kept_sentence(arms, teacher, share), *start_sentences(card.lineage)]
    shipped = next(row.arm for row in arms if row.is_shipped)
    if teacher.perplexity is not None and shipped != CONTROL:
        own, control = ([r.test for r in results if r.arm == arm] for arm in (shipped, CONTROL))
        return [*lines, perplexity_sentence(own, control, teacher)]
    lines.append(gain_sentence(arms))
    if shipped != CONTROL and answers is not None:
        lines.append(inheritance_sentence(shipped, answers))
    return lines


def _share_of_parameters(work: Workspace, card: Card) -> float | None:
    """Of the teacher's; None where these are not known."""
    return card.parameters / work.teacher.parameters if work.teacher.parameters else None


def _joined_sentences(work: Workspace) -> list[str]:
    return [] if work.splits.joined is None else [work.splits.joined.sentence()]


def _shared_sentences(work: Workspace) -> list[str]:
    splits = work.splits
    if not splits.test_in_others:
        return []
    return [
        f"{splits.test_in_others:,} of the {len(splits.test):,} test samples are in train or validation as well; "
        "these can be known by heart."
    ]


def _view_sentences(work: Workspace) -> list[str]:
    """A warning where the augmentation makes views that the teacher itself cannot read."""
    if not work.splits.labels:
        return []  # windows of tokens are not augmented
    if work.recipe.data.mix is not None:
        return []  # a mix of two samples has no one class that the teacher could be right about
    if not work.splits.train.labelled.any():
        return []
    (on_views, views_error), (plain, plain_error) = (_teacher_accuracy(work, part) for part in ("train", "validation"))
    if plain - on_views <= UNREADABLE_VIEWS_MARGIN + 2 * math.hypot(views_error, plain_error):
        return []
    return [
        f"The teacher is right on only {on_views:.1%} of the training views, and on {plain:.1%} of plain held-out "
        "samples: students learn its mistakes on views that it cannot read; a milder data.augment may help."
    ]


def _teacher_accuracy(work: Workspace, split: str) -> tuple[float, float]:
    """Over all captured views of a split, and its standard error: views of one sample count as one."""
    cache, samples = work.cache(split), work.split(split)
    assert samples.labels is not None
    labelled = np.flatnonzero(samples.labelled)
    ids, labels = samples.ids[labelled], samples.labels[labelled]
    right = [cache.top_class(ids, view) == labels for view in range(cache.views)]
    mean = statistics.fmean(float(view.mean()) for view in right)
    return mean, math.sqrt(mean * (1 - mean) / len(ids))


def _weakness_sentences(classes: Sequence[ClassRow]) -> list[str]:
    if not classes:
        return []
    weak = [row for row in classes if row.teacher_is_weak]
    if not weak:
        return [f"The teacher is weak in no class (none is {WEAK_CLASS_MARGIN:.0%} under its average)."]
    listed = ", ".join(
        f"{row.label} (teacher {row.teacher_accuracy:.0%}, student {row.student_accuracy:.0%})" for row in weak
    )
    return [f"The teacher itself is weak in {listed}: the student cannot learn there what the teacher does not know."]


def _artifact_sentences(artifacts: Sequence[Artifact], measurements: Sequence[Measurement]) -> list[str]:
    if not artifacts:
        return []
    passed = sum(artifact.parity.status == "passed" for artifact in artifacts)
    lines = [f"{passed} of {len(artifacts)} files proved equal to their program on held-out samples."]
    measured = {m.artifact_sha256: m for m in measurements if m.status == "measured"}
    for artifact in artifacts:
        parent = next((a for a in artifacts if a.target == artifact.target and a.precision == "fp32"), None)
        if parent is None or parent is artifact:
            continue
        words = []
        if artifact.accuracy is not None and parent.accuracy is not None:
            words.append(f"{(artifact.accuracy - parent.accuracy) * 100:+.2f} points of accuracy")
        if artifact.perplexity is not None and parent.perplexity is not None:
            words.append(f"perplexity {artifact.perplexity:.1f} in place of {parent.perplexity:.1f}")
        words.append(f"{artifact.size_bytes / parent.size_bytes:.2f}× the size")
        if artifact.sha256 in measured and parent.sha256 in measured:
            words.append(_latency_words(measured[parent.sha256], measured[artifact.sha256]))
        if artifact.parity.generation is not None:
            words.append(f"{artifact.parity.generation.agreement:.1%} of its tokens are those of its program")
        lines.append(f"{artifact.target} {artifact.precision} against fp32: {', '.join(words)}.")
    return lines


def _latency_words(parent: Measurement, child: Measurement) -> str:
    """The ratio of two latencies from one interleaved session, and whether it can be told from 1."""
    stats = plugins.load_module("edgekd.benchmarks.stats")
    ratio = stats.latency_ratio(parent, child)
    latency = "time a token" if child.plan.new_tokens else "latency"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.estimate:.2f}× the {latency} (too few blocks for an interval)"
    word = "faster" if ratio.high < 1 else "slower" if ratio.low > 1 else "no difference that can be told"
    interval = f"{ratio.confidence:.0%} interval {ratio.low:.2f} to {ratio.high:.2f}"
    return f"{ratio.estimate:.2f}× the {latency}, {word} ({interval})"
