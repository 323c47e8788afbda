"""What a run found, gathered into the ledger: the rows, the classes, and the verdicts in words."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgekd
from edgekd import plugins
from edgekd.compression.compress import notes_of
from edgekd.data.truth import NO_LABEL
from edgekd.distillation.distill import CONTROL, ArmResult
from edgekd.distillation.embeddings import Likeness
from edgekd.distillation.perplexity import judge_teacher
from edgekd.measurement import Measurement
from edgekd.metrics import ClassCount, Quality, quality
from edgekd.precisions import PORTABLE
from edgekd.reporting.answers import Answers, answers_of
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
from edgekd.stages.results import embedding_results_of, results_of, shipped, trained_of
from edgekd.stages.workspace import Workspace
from edgekd.store import atomic_write, load_artifact, load_card, read_json, size_of, write_json
from edgekd.teachers.ensemble import teacher_sentences
from edgekd.types import Artifact, Card, Json

__all__ = ["collect", "write_report"]

WEAK_CLASS_MARGIN = 0.05
"""A teacher is called weak in a class whose share of right answers is this far under its accuracy over all."""

UNREADABLE_VIEWS_MARGIN = 0.05
"""Views are told of when the teacher's accuracy on them is this far under that on plain samples."""


def collect(work: Workspace) -> tuple[Ledger, list[Measurement]]:
    """The ledger of everything that has been done so far.

    Raises:
        UsageError: No student has been trained yet.
    """
    if work.recipe.teacher.embeds:
        return _collect_embeddings(work)
    results = results_of(work)
    chosen, folder = shipped(work)
    assert isinstance(chosen, ArmResult)
    card = load_card(folder)
    teacher = _teacher_quality(work)
    measurements = measurements_of(work.folder)
    artifacts = [(load_artifact(path), path) for path in work.folder.artifacts()]
    control = next(r for r in results if r.arm == CONTROL and r.seed == chosen.seed)
    rows = [
        _teacher_row(work, teacher),
        _program_row("control", "no teacher", control.test, work.folder.arm(CONTROL, chosen.seed)),
        *(
            _program_row("student", r.arm, r.test, work.folder.arm(r.arm, r.seed), is_shipped=r == chosen)
            for r in results
            if r.seed == chosen.seed and r.arm != CONTROL
        ),
        *_compressed_rows(work),
        *(_artifact_row(artifact, path.name, measurements) for artifact, path in artifacts),
    ]
    answers = _answers(work)
    arms = arm_rows(results, chosen.arm, answers)
    classes = _class_rows(work.splits.labels, teacher, control.test, chosen.test)
    sentences = (
        *_distillation_sentences(results, arms, teacher, card, work.teacher.parameters, answers),
        *([] if work.splits.joined is None else [work.splits.joined.sentence()]),
        *teacher_sentences(work, teacher.accuracy),
        *_view_sentences(work),
        *_weakness_sentences(classes),
        *_artifact_sentences([artifact for artifact, _ in artifacts], measurements),
    )
    ledger = Ledger(
        name=work.recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sentences=sentences,
        rows=tuple(rows),
        classes=classes,
        lineage=card.lineage,
        environment=_environment(),
        gain=next(row.gain for row in arms if row.is_shipped),
        arms=arms,
    )
    return ledger, measurements


def _collect_embeddings(work: Workspace) -> tuple[Ledger, list[Measurement]]:
    """As :func:`collect`, of students that learn no classes."""
    from edgekd.distillation.embeddings import own_likeness
    from edgekd.reporting.embedding_verdict import embedding_sentences

    results, (chosen, folder) = embedding_results_of(work), shipped(work)
    card, test = load_card(folder), work.splits.test
    assert test.labels is not None
    teacher = own_likeness(work.cache("test").vectors(test.ids), test.labels)
    measurements = measurements_of(work.folder)
    artifacts = [(load_artifact(path), path) for path in work.folder.artifacts()]
    of_seed = [result for result in results if result.seed == chosen.seed]
    rows = [
        Row(
            stage="teacher",
            name=work.recipe.teacher.name,
            **_numbers(teacher),
            size_bytes=work.teacher.size_bytes or None,
            parameters=work.teacher.parameters,
            macs=work.teacher.macs,
        ),
        *(
            _program_row(
                "control" if r.arm == CONTROL else "student",
                "no teacher" if r.arm == CONTROL else r.arm,
                r.test,
                work.folder.arm(r.arm, r.seed),
                is_shipped=r == chosen,
            )
            for r in of_seed
        ),
        *_compressed_rows(work),
        *(_artifact_row(artifact, path.name, measurements) for artifact, path in artifacts),
    ]
    share = card.parameters / work.teacher.parameters if work.teacher.parameters else None
    sentences = (
        *embedding_sentences(results, chosen.arm, teacher, share),
        *([] if work.splits.joined is None else [work.splits.joined.sentence()]),
        *_artifact_sentences([artifact for artifact, _ in artifacts], measurements),
    )
    ledger = Ledger(
        name=work.recipe.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sentences=sentences,
        rows=tuple(rows),
        lineage=card.lineage,
        environment=_environment(),
    )
    return ledger, measurements


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


def _teacher_quality(work: Workspace) -> Quality:
    """The teacher's captured outputs are enough: it is not run again."""
    test, cache = work.splits.test, work.cache("test")
    if cache.positions:
        return judge_teacher(test, cache)
    logits = cache.logits(test.ids)
    assert test.labels is not None
    return quality(logits, test.labels, logits)


def _answers(work: Workspace) -> Answers | None:
    """None where a sample has no single class, as a window of tokens."""
    labels = work.splits.test.labels
    if labels is None or labels.ndim != 1:
        return None
    return answers_of(work, work.arms, work.recipe.distill.seeds)


def _teacher_row(work: Workspace, teacher: Quality) -> Row:
    return Row(
        stage="teacher",
        name=work.recipe.teacher.name,
        accuracy=teacher.accuracy,
        perplexity=teacher.perplexity,
        ece=teacher.ece,
        size_bytes=work.teacher.size_bytes or None,
        parameters=work.teacher.parameters,
        macs=work.teacher.macs,
    )


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
    """How good it is, by the names of a row."""
    if isinstance(test, Likeness):
        return {"cosine": test.cosine, "neighbours": test.neighbours, "same_label": test.same_label}
    names = ("accuracy", "teacher_agreement", "perplexity", "kl", "ece")
    return {name: getattr(test, name) for name in names}


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
    results: Sequence[ArmResult],
    arms: Sequence[ArmRow],
    teacher: Quality,
    card: Card,
    teacher_parameters: int | None,
    answers: Answers | None,
) -> list[str]:
    share = card.parameters / teacher_parameters if teacher_parameters else None
    lines = [kept_sentence(arms, teacher, share), *start_sentences(card.lineage)]
    shipped = next(row.arm for row in arms if row.is_shipped)
    if teacher.perplexity is not None and shipped != CONTROL:
        own, control = ([r.test for r in results if r.arm == arm] for arm in (shipped, CONTROL))
        return [*lines, perplexity_sentence(own, control, teacher)]
    lines.append(gain_sentence(arms))
    if shipped != CONTROL and answers is not None:
        lines.append(inheritance_sentence(shipped, answers))
    return lines


def _view_sentences(work: Workspace) -> list[str]:
    """A warning where the augmentation makes views that the teacher itself cannot read."""
    if not work.splits.labels:
        return []  # windows of tokens are not augmented
    if work.recipe.data.mix is not None:
        return []  # a mix of two samples has no one class that the teacher could be right about
    on_views = _teacher_accuracy(work, "train")
    plain = _teacher_accuracy(work, "validation")
    if plain - on_views <= UNREADABLE_VIEWS_MARGIN:
        return []
    return [
        f"The teacher is right on only {on_views:.1%} of the training views, and on {plain:.1%} of plain held-out "
        "samples: students learn its mistakes on views that it cannot read; a milder data.augment may help."
    ]


def _teacher_accuracy(work: Workspace, split: str) -> float:
    """Over all captured views of a split."""
    cache, samples = work.cache(split), work.split(split)
    assert samples.labels is not None
    labelled = np.flatnonzero(samples.labels != NO_LABEL)
    ids, labels = samples.ids[labelled], samples.labels[labelled]
    right = [cache.top_class(ids, view) == labels for view in range(cache.views)]
    return statistics.fmean(float(view.mean()) for view in right)


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
