"""Export of a program that edgekd did not make: a ``.pt2`` file, a student's folder, or a transformers folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekd import plugins
from edgekd.compression.compress import compress
from edgekd.compression.compressed import check_observer
from edgekd.compression.mixed import DEFAULT_MAX_DROP, Budget
from edgekd.data.samples import load_arrays
from edgekd.errors import ModelFileError, UsageError
from edgekd.exporting.export import Proof, requests_of, synthetic_samples, write_request
from edgekd.exporting.generation import proof_prompts
from edgekd.exporting.regressions import note_regressions
from edgekd.exporting.tune import CANDIDATES, settle
from edgekd.metrics import check_labels
from edgekd.precisions import STATIC
from edgekd.programs.decoder import TOKENS
from edgekd.programs.hugging_face import generating, hugging_face_example, hugging_face_module
from edgekd.programs.models import bind_inputs, count_macs, count_parameters, input_specs, output_specs
from edgekd.programs.student_files import load_student
from edgekd.programs.tracing import export_program
from edgekd.protocols import Arrays, Options, Progress
from edgekd.quiet import quiet
from edgekd.store import fingerprint, hash_path, read_json
from edgekd.teachers.language_student import configured_ends, context_of, decoder_student
from edgekd.types import LOGITS, Card, Student

__all__ = ["export_external", "language_model", "load_external"]

SYNTHETIC_SAMPLES = 16
TOKENIZER = "tokenizer.json"
HELD_OUT_SHARE = 0.25


def export_external(
    reference: str,
    targets: Sequence[str],
    precisions: Sequence[str],
    out: Path,
    progress: Progress,
    *,
    calibration: Path | None = None,
    samples: Path | None = None,
    observer: str = "minmax",
    corrections: Sequence[str] = ("auto",),
    max_length: int | None = None,
    options: Mapping[str, Options] | None = None,
    tuned: bool = False,
    max_drop: float | None = None,
) -> list[Path]:
    """Export a model by reference; see ``export_student`` for what is proven.

    Args:
        reference: ``model.pt2``, ``pt2:file``, a student's folder, or ``hf:folder``.
        targets: Names of exporters.
        precisions: Of each, or ``int8``.
        out: Gets one folder for each target and precision.
        calibration: ``.npz`` by input name or ``arr_0`` …, samples on the first axis; the scales of ``w8a8``.
        samples: ``.npz`` to prove with; without it, the last quarter of ``calibration`` is held out; without either,
            the samples are random and the manifest says so.
        observer, corrections: Of static int8; see :func:`edgekd.compression.compress.compress`.
        max_length: Tokens, for a text model from a folder: of a text, by default 128; of prompt and answer together for
            a language model, by default 1024 or what it was made for.
        options: By target.
        tuned: Choose ``int8`` by measuring all that it may become, beside fp32; see :mod:`edgekd.exporting.tune`.
        max_drop: Budget of ``auto``; half a point by default. Measured on the calibration samples: on their ``label``
            where the file has it, else as agreement with the fp32 program.

    Returns:
        Folders of the artifacts that were asked for.

    Raises:
        UsageError: A target lacks a precision, ``w8a8`` has no calibration, or there is no such observer.
        DataError: The samples do not fit, or ``auto`` is judged on labels that are no classes of the model.
    """
    check_observer(observer)
    exporters = {target: plugins.load_exporter(target) for target in targets}
    for target, exporter in exporters.items():
        plugins.require(target, exporter)
    student, assets = load_external(reference, max_length)
    if student.card.decoder is None:
        calibrating, proof = _samples(student, calibration, samples)
    else:
        calibrating, proof = None, _prompts(student, assets, samples)
    requests = requests_of(dict.fromkeys(targets, precisions), student, CANDIDATES if tuned else ())
    sources = {request: exporters[request.target].precisions[request.precision].source for request in requests}
    if calibrating is None:
        # A candidate that cannot be made is none; what was asked for is missed.
        requests = [r for r in requests if sources[r] not in STATIC or r.is_asked]
        if missed := [sources[request] for request in requests if sources[request] in STATIC]:
            raise UsageError(f"{missed[0]} takes its scales from real samples; give them with --calibration data.npz")
    budget = None
    if "auto" in sources.values():
        budget = _budget(student, calibration, calibrating, DEFAULT_MAX_DROP if max_drop is None else max_drop)
    programs = {"fp32": student}
    written = {}
    for request in requests:
        progress.start(f"export {request.target} {request.precision}", 1)
        source, folder = sources[request], out / f"{request.target}-{request.precision}"
        if source not in programs:
            programs[source] = compress(student, source, calibrating, observer, corrections, budget)
        told = (options or {}).get(request.target)
        if write_request(request, programs[source], assets, folder, proof, told, progress):
            written[request] = folder
        progress.advance()
        progress.finish()
    note_regressions(list(written.values()))
    return settle(requests, written, student, proof, progress)


def load_external(reference: str, max_length: int | None = None) -> tuple[Student, dict[str, bytes]]:
    """A program, its card and its assets, by reference.

    Raises:
        ModelFileError: The file or folder is damaged, foreign or unsafe.
    """
    prefix, _, rest = reference.partition(":")
    if prefix == "hf":
        return _from_hugging_face(Path(rest), max_length)
    return load_student(Path(rest if prefix == "pt2" else reference))


def _from_hugging_face(folder: Path, max_length: int | None) -> tuple[Student, dict[str, bytes]]:
    module = hugging_face_module(folder)
    model = generating(module)
    if model is not None:
        return language_model(model, folder, max_length)
    max_length = max_length or 128
    program = export_program(module, hugging_face_example(folder, module, max_length))
    config = read_json(folder / "config.json")
    names = config.get("id2label", {})
    classifies = "Classification" in str(config.get("architectures"))
    labels = tuple(names[key] for key in sorted(names, key=int)) if classifies else ()
    tokenizer = folder / TOKENIZER
    assets = {tokenizer.name: tokenizer.read_bytes()} if tokenizer.is_file() else {}
    preprocessing = {"kind": "text", "tokenizer": tokenizer.name, "max_length": max_length} if assets else {}
    if (folder / "preprocessor_config.json").is_file():
        preprocessing = {"kind": "image", **read_json(folder / "preprocessor_config.json")}
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelFileError(f"{folder} has no .safetensors; pickled weights are never loaded")
    card = Card(
        name=folder.resolve().name,
        inputs=input_specs(program),
        outputs=tuple(replace(spec, meaning=LOGITS if classifies else "") for spec in output_specs(program)),
        labels=labels,
        preprocessing=preprocessing,
        parameters=count_parameters(program),
        macs=count_macs(program),
        lineage=(f"file: {fingerprint([hash_path(path) for path in weights])}",),
        assets=tuple(assets),
    )
    return Student(program, card), assets


def language_model(model: Any, folder: Path, context: int | None) -> tuple[Student, dict[str, bytes]]:
    """A causal language model of transformers as a program with caches; its tokenizer is the one in the folder."""
    tokenizer = _tokenizer(folder)
    files = sorted((*folder.glob("*.safetensors"), *folder.glob("*.gguf")))
    lineage = (f"file: {fingerprint([hash_path(path) for path in files])}",)
    name, told = folder.resolve().name, TOKENIZER if tokenizer else ""
    student = decoder_student(model, context_of(model, context), name, lineage, configured_ends(model), told)
    return student, {TOKENIZER: tokenizer} if tokenizer else {}


def _tokenizer(folder: Path) -> bytes | None:
    """Content of the folder's ``tokenizer.json``, or that of the one which its GGUF file holds."""
    if (folder / TOKENIZER).is_file():
        return (folder / TOKENIZER).read_bytes()
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return None
    with quiet():
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name, local_files_only=True)
    content: str = found.backend_tokenizer.to_str(pretty=True)
    return content.encode()


def _prompts(student: Student, assets: Mapping[str, bytes], samples: Path | None) -> Proof:
    """What a language model is proven with: the user's tokens, else English, else random ones."""
    assert student.card.decoder is not None
    if samples is not None:
        arrays = load_arrays(samples)
        tokens = next(iter(arrays.values())) if len(arrays) == 1 else arrays.get(TOKENS)
        if tokens is None or tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UsageError(
                f"{samples} has {', '.join(arrays)}; a language model is proven with tokens, whole numbers of "
                "(prompts, length)"
            )
        return Proof({TOKENS: tokens.astype(np.int32)})
    vocabulary = next(spec for spec in student.card.outputs if spec.name == LOGITS).shape[-1]
    tokenizer = assets.get(TOKENIZER)
    note = "" if tokenizer else "proven on prompts of random tokens: no samples were given, and there is no tokenizer"
    return Proof({TOKENS: proof_prompts(tokenizer, vocabulary, student.card.decoder.context)}, note=note)


def _budget(student: Student, calibration: Path | None, calibrating: Arrays | None, max_drop: float) -> Budget | None:
    """What ``auto`` may lose, on the samples that calibrate: those that prove the files are never looked at."""
    if calibration is None or calibrating is None:
        return None
    labels = load_arrays(calibration).get("label")
    outputs = [spec.shape for spec in student.card.outputs if spec.meaning in (LOGITS, "")]
    classes = next((shape[1] for shape in outputs if len(shape) == 2 and shape[1] > 1), None)
    if labels is not None and classes is not None:  # an output of another shape is judged by its cosine
        check_labels(labels, classes, f"'label' of {calibration}")
    count = len(next(iter(calibrating.values())))
    return Budget(max_drop, calibrating, None if labels is None else labels[:count])


def _samples(student: Student, calibration: Path | None, samples: Path | None) -> tuple[Arrays | None, Proof]:
    """What calibrates and what proves; the two share no sample where there are enough."""
    specs = input_specs(student.program)
    calibrating = None
    if calibration:
        arrays = {name: array for name, array in load_arrays(calibration).items() if name != "label"}
        calibrating = bind_inputs(specs, arrays)
    if samples:
        return calibrating, Proof(bind_inputs(specs, load_arrays(samples)))
    if calibrating is None:
        note = "proven on random inputs: no samples were given"
        return None, Proof(synthetic_samples(student, SYNTHETIC_SAMPLES), note=note)
    count = len(next(iter(calibrating.values())))
    held = max(1, int(count * HELD_OUT_SHARE))
    if count < 4:
        return calibrating, Proof(
            calibrating, note=f"proven on the {count} samples that calibrated it: too few to hold out"
        )
    first = {name: np.asarray(array[:-held]) for name, array in calibrating.items()}
    last = {name: np.asarray(array[-held:]) for name, array in calibrating.items()}
    return first, Proof(last)
