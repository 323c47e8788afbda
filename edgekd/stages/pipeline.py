"""The stages that make what is shipped, in order, each alone from what the stage before wrote."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import edgekd
from edgekd import plugins, processes
from edgekd.compression.prune import parse_pruning
from edgekd.distillation.arms import arm_inputs, threads_of
from edgekd.distillation.distill import Trained, train_arm
from edgekd.errors import UsageError
from edgekd.exporting.export import Request, requests_of, toolchain, write_request
from edgekd.exporting.regressions import note_regressions
from edgekd.exporting.tune import CANDIDATES, settle
from edgekd.precisions import PORTABLE, WEIGHT_BITS
from edgekd.programs.student_files import load_student, save_student
from edgekd.protocols import Options, Progress
from edgekd.stages.keeping import measurements_of
from edgekd.stages.once import once
from edgekd.stages.proofs import proof_of
from edgekd.stages.recovery import Settings, calibration_split, compressed, pruned, settings_of, training_inputs
from edgekd.stages.results import base_folder, shipped, source_folder, trained_of
from edgekd.stages.verify import confirm_teacher
from edgekd.stages.workers import Crew
from edgekd.stages.workspace import SPLITS, Workspace
from edgekd.store import MANIFEST, hash_path, load_artifact
from edgekd.teachers.capture import capture, whole_cache
from edgekd.teachers.language_student import trained_decoder
from edgekd.types import Json, Precision, Student

__all__ = [
    "capture_stage",
    "compress_stage",
    "decoder_stage",
    "distill_stage",
    "export_stage",
    "prune_stage",
]


def capture_stage(work: Workspace, progress: Progress, force: bool = False, crew: Crew | None = None) -> None:
    """Teacher outputs of all three splits.

    Args:
        crew: Workers that run the teacher, in place of this process.

    Raises:
        NumericalError: The teacher gives NaN or infinity.
        DataError: Data that does not fit.
        CacheError: What is captured already is not what the teacher says now.
    """
    keys = {name: work.capture_key(name) for name in SPLITS}  # loads all data: a fault of it comes before the hours
    if not force and processes.is_main():
        confirm_teacher(work, whole_cache(work.folder.cache("validation"), keys["validation"]))
    for name in SPLITS:
        key, folder = keys[name], work.folder.cache(name)

        def make(name: str = name, folder: Path = folder) -> list[Path]:
            if not force and whole_cache(folder, keys[name]) is not None:
                return [folder]
            maker = None if crew is None else crew.maker(work.recipe, name, keys[name])
            capture(folder, work.split(name), work.teacher, keys[name], work.views_of(name), progress, maker)
            return [folder]

        once(work, f"capture-{name}", key.to_json(), make, progress, force)


def distill_stage(work: Workspace, progress: Progress, force: bool = False) -> Sequence[Trained]:
    """Every arm with every seed; of several processes all call this (:mod:`edgekd.processes`).

    Raises:
        CacheError: Nothing, or something else, has been captured.
    """
    recipe = work.recipe
    torch.set_num_threads(threads_of(recipe))  # before any student is made: another number adds up in another order
    caches = {name: work.cache(name) for name in SPLITS}
    data = {name: work.capture_key(name).to_json() for name in SPLITS}
    for seed in recipe.distill.seeds:
        for arm in work.arms:
            inputs = arm_inputs(recipe, work.splits, arm, seed, data)

            def make(arm: str = arm, seed: int = seed, inputs: Json = inputs) -> list[Path]:
                train_arm(recipe, work.splits, caches, work.views_of("train"), arm, seed, inputs, progress)
                return [work.folder.arm(arm, seed)]

            once(work, f"distill-{work.folder.arm(arm, seed).name}", inputs, make, progress, force)
    return processes.found_by_main(lambda: trained_of(work))


def prune_stage(work: Workspace, progress: Progress, force: bool = False) -> None:
    """The shipped student with fewer weights, if the recipe prunes: what all that follows is made from.

    Raises:
        UsageError: There is no student yet, or it has nothing that can be pruned so.
    """
    word, epochs = work.recipe.compress.prune, work.recipe.compress.prune_epochs
    if word is None:
        return
    result, folder = shipped(work)
    inputs: Json = {
        "student": hash_path(folder / "student.pt2"),
        "prune": word,
        "epochs": epochs,
        "training": training_inputs(work, result.arm, result.seed) if epochs else None,
        "test": work.capture_key("test").to_json(),
        "edgekd": edgekd.__version__,
    }

    def make() -> list[Path]:
        student, assets = load_student(folder)
        smaller, record = pruned(work, student, result, parse_pruning(word), progress)
        save_student(work.folder.pruned, smaller, assets, record)
        return [work.folder.pruned]

    once(work, "prune", inputs, make, progress, force)


def decoder_stage(work: Workspace, progress: Progress, force: bool = False) -> None:
    """The shipped student with caches, if it is a language model: what all that follows is made from.

    Raises:
        UsageError: There is no student yet, or no caches can be made of it.
        ModelFileError: Its architecture is one that caches do not serve.
    """
    if not work.is_language_model:
        return
    folder = shipped(work)[1]
    inputs: Json = {
        "student": hash_path(folder / "student.pt2"),
        "card": hash_path(folder / "card.json"),
        "context": work.recipe.export.context,
        "edgekd": edgekd.__version__,
        "torch": torch.__version__,
    }

    def make() -> list[Path]:
        save_student(work.folder.decoder, *trained_decoder(work, folder))
        return [work.folder.decoder]

    once(work, "decoder", inputs, make, progress, force)


def compress_stage(
    work: Workspace,
    progress: Progress,
    precisions: Sequence[Precision] = (),
    force: bool = False,
    qat: bool | None = None,
    max_drop: float | None = None,
) -> None:
    """The shipped student in every portable precision that the exports need (or in those that are named).

    Args:
        qat: Train with quantization, or do not; None leaves it to the recipe, or to what was said last.
        max_drop: Budget of ``auto``; None as above.

    Raises:
        UsageError: There is no student yet, or a precision is not portable or cannot be trained.
        BudgetError: ``auto`` finds no mix within its budget.
    """
    prune_stage(work, progress, force)
    decoder_stage(work, progress, force)
    result, folder = shipped(work)[0], base_folder(work)
    student, assets = load_student(folder)
    if student.card.decoder is not None and (wrong := [word for word in precisions if word != "w8"]):
        raise UsageError(f"a language model with caches is compressed to w8; {wrong[0]} was asked")
    wanted = precisions or _programs(requests(work, student))
    if not wanted:
        progress.say("compress: no precision of this recipe needs it")
    if qat and not set(wanted) & set(WEIGHT_BITS):
        raise UsageError(
            f"quantization-aware training is for {', '.join(WEIGHT_BITS)}; asked was {', '.join(wanted) or 'none'}"
        )
    for precision in wanted:
        stage, spec = f"compress-{precision}", work.recipe.compress
        settings = settings_of(work, precision, work.folder.done_with(stage), qat, max_drop)
        static = precision != "w8"
        inputs: Json = {
            "student": hash_path(folder / "student.pt2"),
            "precision": precision,
            "calibration": calibration_split(work, spec.samples).fingerprint if static else None,
            "observer": spec.observer if static else None,
            "corrections": list(spec.corrections) if static else None,
            "validation": work.splits.validation.fingerprint if precision == "auto" else None,
            "training": training_inputs(work, result.arm, result.seed) if settings.qat_epochs else None,
            "settings": vars(settings),
            "test": work.capture_key("test").to_json(),
            "edgekd": edgekd.__version__,
        }

        def make(precision: Precision = precision, settings: Settings = settings) -> list[Path]:
            progress.start(f"compress {precision}", 1)
            smaller, record = compressed(work, student, result, settings, progress)
            save_student(work.folder.compressed(precision), smaller, assets, record)
            progress.advance(1)
            progress.finish()
            return [work.folder.compressed(precision)]

        once(work, stage, inputs, make, progress, force)


def _programs(wanted: Sequence[Request]) -> list[Precision]:
    """The compressed programs that files are written from."""
    sources = {plugins.load_exporter(request.target).precisions[request.precision].source for request in wanted}
    return [precision for precision in PORTABLE if precision in sources]


def requests(
    work: Workspace,
    student: Student,
    targets: Sequence[str] = (),
    precisions: Sequence[str] = (),
    candidates: Sequence[Precision] = (),
) -> list[Request]:
    """Every file that the recipe (or the call) asks for, without repeats.

    Raises:
        UsageError: A target lacks a precision.
    """
    export = work.recipe.export
    words = {target: tuple(precisions) or export.precisions_of(target) for target in targets or export.targets}
    return requests_of(words, student, candidates)


def export_stage(
    work: Workspace,
    progress: Progress,
    targets: Sequence[str] = (),
    precisions: Sequence[str] = (),
    force: bool = False,
    options: Mapping[str, Options] | None = None,
    tuned: bool = False,
    max_drop: float | None = None,
) -> list[Path]:
    """Every target in every precision, each proven; returns the artifact folders that were asked for.

    Args:
        options: By target, in place of the recipe's.
        tuned: Choose ``int8`` by measuring all that it may become, beside fp32; see :mod:`edgekd.exporting.tune`.

    Raises:
        ParityError: A file computes something else than its program.
        UsageError: There is no student yet, or a target lacks a precision.
    """
    prune_stage(work, progress)
    decoder_stage(work, progress)
    student, _ = load_student(base_folder(work))
    proof = proof_of(work)
    wanted = requests(work, student, targets, precisions, CANDIDATES if tuned else ())
    needed = _programs(wanted)
    if needed:
        compress_stage(work, progress, needed, max_drop=max_drop)
    told = {request.target: work.recipe.export.options_of(request.target) for request in wanted} | dict(options or {})
    load, digest = functools.cache(load_student), functools.cache(hash_path)  # one program serves several targets
    written = {}
    for request in wanted:
        exporter = plugins.load_exporter(request.target)
        plugins.require(request.target, exporter)
        source = source_folder(work, request.target, request.precision)
        folder = work.folder.artifact(request.target, request.precision)
        inputs: Json = {
            "source": digest(source / "student.pt2"),
            "card": digest(source / "card.json"),
            "precision": request.precision,
            "options": told[request.target].model_dump(mode="json"),
            "toolchain": toolchain(exporter),
            "samples": work.recipe.export.samples,
            "accuracy_samples": work.recipe.export.accuracy_samples,
            "test": work.splits.test.fingerprint,
            "teacher": work.teacher.fingerprint,
        }

        def make(request: Request = request, source: Path = source, folder: Path = folder) -> list[Path]:
            progress.start(f"export {request.target} {request.precision}", 1)
            program, assets = load(source)
            made = write_request(request, program, assets, folder, proof, told[request.target], progress)
            progress.advance()
            progress.finish()
            # Without the manifest, to which what is measured later is added.
            return [folder / name for name in (load_artifact(folder).path, *assets)] if made else []

        again = force or not (folder / MANIFEST).is_file()
        if once(work, f"export-{request.target}-{request.precision}", inputs, make, progress, again):
            written[request] = folder
    note_regressions(work.folder.artifacts(), measurements_of(work.folder))
    return settle(wanted, written, student, proof, progress)
