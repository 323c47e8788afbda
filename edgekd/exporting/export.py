"""Program to proven file. The exporter translates; here the file is hashed, run, compared and described.

An export is unfinished until the file was loaded by its own runtime and compared with the program it came from.
"""

from __future__ import annotations

import functools
import importlib.metadata
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import edgekd
from edgekd import plugins
from edgekd.collector import collector_paused
from edgekd.compression.compress import choose_int8
from edgekd.compression.compressed import notes_of
from edgekd.distillation.perplexity import JudgedWindows, judge_decoder
from edgekd.errors import ExportError, ParityError, UsageError
from edgekd.exporting.lint import lint
from edgekd.exporting.parity import compare, first_overflow, run_file
from edgekd.metrics import accuracy, agreement
from edgekd.programs.decoder import TOKENS
from edgekd.programs.models import bind_inputs, example_inputs, input_specs, program_bytes, run_program
from edgekd.protocols import Arrays, Decoding, Exporter, Options, Progress, Runner, WritingCaches
from edgekd.quiet import collected
from edgekd.store import MANIFEST, hash_path, load_artifact, replace_folder, size_of, staging_folder, write_json
from edgekd.types import Artifact, Parity, Precision, Student, TensorSpec, Tolerance

__all__ = [
    "Proof",
    "Request",
    "export_student",
    "requests_of",
    "resolve_precision",
    "synthetic_samples",
    "toolchain",
    "verify_artifact",
    "write_file",
    "write_request",
]


@dataclass(frozen=True)
class Proof:
    """What a file is held against.

    Attributes:
        samples: Held-out inputs for parity, by name, samples on the first axis.
        task: Inputs of the task's test split; None when there is none.
        labels: Classes of ``task``, (samples,).
        teacher: The teacher's logits of ``task``, (samples, classes); None without a teacher.
        note: What limits the proof, for the manifest.
        windows: What a language model with caches is judged on, token by token; None where there is nothing.
    """

    samples: Arrays
    task: Arrays | None = None
    labels: np.ndarray | None = None
    teacher: np.ndarray | None = None
    note: str = ""
    windows: JudgedWindows | None = None


@dataclass(frozen=True)
class Request:
    """One file to write.

    Attributes:
        note: Why ``int8`` became this precision; empty otherwise.
        is_asked: Whether the user named it; else it is only measured against.
        is_candidate: Whether it is one of the forms that ``int8`` may take, to be measured.
    """

    target: str
    precision: Precision
    note: str = ""
    is_asked: bool = True
    is_candidate: bool = False


def requests_of(
    words: Mapping[str, Sequence[str]], student: Student, candidates: Sequence[Precision] = ()
) -> list[Request]:
    """What to write, without repeats, from what the user wrote.

    Args:
        words: Precisions by target; ``int8`` may be among them.
        student: In fp32.
        candidates: Forms of ``int8`` that will be measured beside fp32; without them, a rule decides.

    Raises:
        UsageError: A target lacks a precision, or does not write language models with caches in it.
    """
    if candidates and student.card.decoder is not None:
        raise UsageError("--tune measures no language models with caches; name a precision, or int8 without --tune")
    found: dict[tuple[str, Precision], Request] = {}

    def add(request: Request) -> None:
        key = request.target, request.precision
        before = found.get(key, request)
        found[key] = Request(
            *key,
            before.note or request.note,
            before.is_asked or request.is_asked,
            before.is_candidate or request.is_candidate,
        )

    for target, asked in words.items():
        exporter = plugins.load_exporter(target)
        for word in asked:
            if word == "int8" and candidates:
                add(Request(target, "fp32", is_asked=False))
                for precision in candidates:
                    if precision in exporter.precisions:
                        add(Request(target, precision, is_asked=False, is_candidate=True))
                continue
            precision, why = resolve_precision(word, target, exporter, student)
            add(Request(target, precision, f"int8 is {precision} here: {why}" if why else ""))
    return list(found.values())


def _written_of(student: Student, target: str, exporter: Exporter) -> Collection[Precision]:
    """Precisions in which a target writes this student.

    Raises:
        UsageError: It is a language model with caches, and the target writes none.
    """
    if student.card.decoder is None:
        return exporter.precisions
    if isinstance(exporter, WritingCaches):
        return exporter.cached_precisions
    names = [n for n in plugins.exporter_names() if isinstance(plugins.load_exporter(n), WritingCaches)]
    raise UsageError(f"{target} writes no language models with caches; there are {', '.join(names)}")


def resolve_precision(word: str, target: str, exporter: Exporter, student: Student) -> tuple[Precision, str]:
    """A precision of this target from what the user wrote; ``int8`` is chosen by rule.

    Returns:
        The precision, and why ``int8`` became it (else empty).

    Raises:
        UsageError: The target lacks it; the message has those it has.
    """
    written = _written_of(student, target, exporter)
    if word == "int8":
        return choose_int8(student.program, written)
    if word not in exporter.precisions:
        raise UsageError(f"{target} has no precision {word!r}; it has {', '.join(exporter.precisions)}, and int8")
    if word not in written:
        raise UsageError(f"{target} writes no language models with caches in {word}; there are {', '.join(written)}")
    return word, ""


def export_student(
    student: Student,
    assets: Mapping[str, bytes],
    target: str,
    precision: Precision,
    folder: Path,
    proof: Proof,
    notes: Sequence[str] = (),
    options: Options | None = None,
) -> Artifact:
    """Write, run, compare, describe; ``folder`` then holds the model and its manifest, or is untouched.

    Args:
        student: Its program already has ``precision`` where that is portable, else fp32.
        assets: Files that belong beside the model.
        folder: Of the artifact; replaced as a whole.
        options: Of the exporter; its defaults when None.

    Raises:
        ParityError: The file computes something else; it is kept in ``<folder>.failed`` with its manifest.
        ExportError: The converter refused.
        MissingToolchainError: The target's toolchain is not installed.
    """
    exporter = plugins.load_exporter(target)
    plugins.require(target, exporter)
    name = "model" + exporter.suffix
    failed = folder.with_name(folder.name + ".failed")
    conversion, options = exporter.precisions[precision], options or exporter.options()
    with staging_folder(folder) as part:
        warnings = write_file(exporter, student, part / name, precision, options)
        runner = exporter.load(part / name)
        parity = _prove(student, runner, proof.samples, conversion.tolerance, options)
        task = quality = None
        if proof.task is not None and parity.status == "passed":
            task = run_file(runner, options.applied(student, proof.task)[1])[0]
        if proof.windows is not None and parity.status == "passed" and isinstance(runner, Decoding):
            quality = judge_decoder(runner, proof.windows)
        artifact = Artifact(
            target=target,
            precision=precision,
            path=name,
            sha256=hash_path(part / name),
            size_bytes=size_of(part / name),
            card=replace(student.card, precision=precision),
            inputs=_described(runner.inputs, student.card.inputs),
            outputs=_described(runner.outputs, student.card.outputs),
            toolchain=toolchain(exporter),
            source=program_hash(student),
            parity=parity,
            accuracy=_accuracy(task, proof) if quality is None else quality.accuracy,
            teacher_agreement=_agreement(task, proof) if quality is None else quality.teacher_agreement,
            perplexity=None if quality is None else quality.perplexity,
            options=options.model_dump(mode="json"),
            notes=tuple(note for note in (*notes, *notes_of(student.card), proof.note) if note),
            warnings=tuple(warnings),
            findings=lint(exporter.contents(part / name), precision, student.program),
        )
        for asset, content in assets.items():
            (part / asset).write_bytes(content)
        write_json(part / MANIFEST, artifact.to_json())
        replace_folder(part, folder if parity.status == "passed" else failed)
    if parity.status != "passed":
        raise ParityError(f"{target} {precision} failed its proof and is kept in {failed}: {parity.reason}")
    shutil.rmtree(failed, ignore_errors=True)
    return artifact


def write_file(
    exporter: Exporter, student: Student, path: Path, precision: Precision, options: Options
) -> Sequence[str]:
    """Have an exporter write a file, as it is before its proof; what its toolchain complained of, line by line.

    Raises:
        ExportError: The converter refused.
    """
    with collected() as complaints, collector_paused():
        exporter.write(student, path, precision, options)
    return complaints


def _accuracy(task: np.ndarray | None, proof: Proof) -> float | None:
    return None if task is None or proof.labels is None else accuracy(task, proof.labels)


def _agreement(task: np.ndarray | None, proof: Proof) -> float | None:
    return None if task is None or proof.teacher is None else agreement(task, proof.teacher)


def write_request(
    request: Request,
    student: Student,
    assets: Mapping[str, bytes],
    folder: Path,
    proof: Proof,
    options: Options | None,
    progress: Progress,
) -> bool:
    """Write one file; a candidate for ``int8`` that the target refuses, or that fails its proof, is said and left out.

    Returns:
        Whether it was written.
    """
    try:
        export_student(student, assets, request.target, request.precision, folder, proof, [request.note], options)
    except (ExportError, ParityError) as error:
        if request.is_asked or not request.is_candidate:
            raise
        progress.say(f"{request.target} {request.precision} is no candidate for int8: {error}")
        return False
    return True


def verify_artifact(folder: Path, student: Student, proof: Proof) -> Artifact:
    """Prove a finished artifact again: the file's hash, then its parity with the program.

    Raises:
        ParityError: The file is not the one that the manifest describes, or computes something else.
    """
    artifact = load_artifact(folder)
    exporter = plugins.load_exporter(artifact.target)
    plugins.require(artifact.target, exporter)
    path = folder / artifact.path
    if hash_path(path) != artifact.sha256:
        raise ParityError(f"{path} is not the file that its manifest describes: its sha256 differs")
    if program_hash(student) != artifact.source:
        raise ParityError(f"{path} was exported from another program than the one at hand; run: edgekd export")
    runner = exporter.load(path)
    tolerance = exporter.precisions[artifact.precision].tolerance
    options = exporter.options.model_validate(artifact.options)
    parity = _prove(student, runner, proof.samples, tolerance, options)
    if parity.status != "passed":
        raise ParityError(f"{path} failed its proof: {parity.reason}")
    return replace(artifact, parity=parity)


def _prove(student: Student, runner: Runner, samples: Arrays, tolerance: Tolerance, options: Options) -> Parity:
    """The file's outputs against the program's; a file that fails is asked where it first went too far."""
    if student.card.decoder is not None:
        from edgekd.exporting.generation import prove_generation

        return prove_generation(student, runner, samples[TOKENS], tolerance)
    student, samples = options.applied(student, samples)
    reference = list(run_program(student.program, samples).values())
    parity = compare(student.card.outputs, reference, run_file(runner, samples), tolerance, runner.runtime)
    overflow = first_overflow(runner, samples) if parity.status == "failed" else ""
    return replace(parity, reason=f"{parity.reason}; {overflow}") if overflow else parity


def toolchain(exporter: Exporter) -> dict[str, str]:
    """Versions of the packages that write and prove the files of a target."""
    owners = _owners()
    names = {owners[module][0] for module in exporter.requires if module in owners} | {"torch", "torchao", "numpy"}
    versions = {name: importlib.metadata.version(name) for name in sorted(names)}
    return {"edgekd": edgekd.__version__, **versions}


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """Packages by the modules that they install: a second of work for a large environment."""
    return importlib.metadata.packages_distributions()


def program_hash(student: Student) -> str:
    """sha256 of a program, as its ``.pt2`` file would have it."""
    import hashlib

    return hashlib.sha256(program_bytes(student.program)).hexdigest()


def synthetic_samples(student: Student, count: int) -> dict[str, np.ndarray]:
    """Random inputs for a program without data: floats normal, integers 0 or 1 (safe as ids, masks and types)."""
    generator = np.random.default_rng(0)
    samples = {}
    for spec, example in zip(input_specs(student.program), example_inputs(student.program), strict=True):
        shape = (count * max(1, example.shape[0]), *example.shape[1:])
        floating = spec.dtype.startswith(("float", "bfloat"))
        values = generator.standard_normal(shape) if floating else generator.integers(0, 2, shape)
        samples[spec.name] = values.astype(spec.dtype)
    return bind_inputs(input_specs(student.program), samples)


def _described(file: Sequence[TensorSpec], card: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What the file declares, with the meaning that the card knows; a file that keeps its caches has fewer."""
    if len(file) == len(card):
        return tuple(replace(f, meaning=c.meaning) for f, c in zip(file, card, strict=True))
    meanings = {spec.name: spec.meaning for spec in card}
    return tuple(replace(spec, meaning=meanings.get(spec.name, "")) for spec in file)
