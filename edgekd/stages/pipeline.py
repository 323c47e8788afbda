"""The stages of a recipe, each alone from what the stage before wrote. ``run`` is all of them in order.

A stage whose inputs' fingerprint is unchanged, and whose outputs are still as it left them, is not done again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import edgekd
from edgekd import plugins, processes
from edgekd.compression.prune import parse_pruning
from edgekd.data.windows import positions_of
from edgekd.distillation.distill import (
    ArmResult,
    EmbeddingResult,
    Trained,
    arm_inputs,
    choose_arm,
    load_embedding_result,
    load_result,
    threads_of,
    train_arm,
)
from edgekd.errors import UsageError
from edgekd.exporting.export import Proof, Request, requests_of, toolchain, write_request
from edgekd.exporting.generation import PROMPTS
from edgekd.exporting.regressions import note_regressions
from edgekd.exporting.tune import CANDIDATES, settle
from edgekd.measurement import Measurement, Plan, Profile
from edgekd.precisions import PORTABLE, WEIGHT_BITS
from edgekd.profiles import device_of, load_profile
from edgekd.programs.decoder import TOKENS
from edgekd.programs.student_files import load_student, save_student
from edgekd.protocols import Options, Progress
from edgekd.stages.keeping import keep, measurements_of
from edgekd.stages.proofs import prompts_of, windows_proof
from edgekd.stages.recovery import Settings, calibration_split, compressed, pruned, settings_of, training_inputs
from edgekd.stages.workers import Crew
from edgekd.stages.workspace import SPLITS, Workspace
from edgekd.store import MANIFEST, hash_path, load_artifact, write_json
from edgekd.teachers.capture import capture
from edgekd.teachers.language_student import trained_decoder
from edgekd.types import Artifact, Json, Precision, Student

__all__ = [
    "base_folder",
    "bench_stage",
    "capture_stage",
    "compress_stage",
    "decoder_stage",
    "distill_stage",
    "embedding_results_of",
    "export_stage",
    "finished",
    "is_language_model",
    "proof_of",
    "prune_stage",
    "results_of",
    "shipped",
    "source_folder",
    "trained_of",
    "watch_stage",
]


def capture_stage(work: Workspace, progress: Progress, force: bool = False, crew: Crew | None = None) -> None:
    """Teacher outputs of all three splits.

    Args:
        crew: Workers that run the teacher, in place of this process.

    Raises:
        NumericalError: The teacher gives NaN or infinity.
        DataError: Data that does not fit.
    """
    keys = {name: work.capture_key(name) for name in SPLITS}  # loads all data: a fault of it comes before the hours
    for name in SPLITS:
        key, folder = keys[name], work.folder.cache(name)

        def make(name: str = name, folder: Path = folder) -> list[Path]:
            maker = None if crew is None else crew.maker(work.recipe, name, keys[name])
            capture(folder, work.split(name), work.teacher, keys[name], work.views_of(name), progress, maker)
            return [folder]

        _once(work, f"capture-{name}", key.to_json(), make, progress, force)


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

            _once(work, f"distill-{work.folder.arm(arm, seed).name}", inputs, make, progress, force)
    return processes.found_by_main(lambda: trained_of(work))


def trained_of(work: Workspace) -> Sequence[Trained]:
    """Results of all arms and seeds, whatever the students give.

    Raises:
        UsageError: An arm has not been trained yet.
    """
    return embedding_results_of(work) if work.recipe.teacher.embeds else results_of(work)


def embedding_results_of(work: Workspace) -> list[EmbeddingResult]:
    """See :func:`results_of`."""
    return [load_embedding_result(work.recipe, arm, seed) for seed in work.recipe.distill.seeds for arm in work.arms]


def results_of(work: Workspace) -> list[ArmResult]:
    """Results of all arms and seeds of the recipe.

    Raises:
        UsageError: An arm has not been trained yet.
    """
    return [load_result(work.recipe, arm, seed) for seed in work.recipe.distill.seeds for arm in work.arms]


def shipped(work: Workspace) -> tuple[Trained, Path]:
    """The student to ship and its folder, chosen on validation."""
    ship = work.recipe.distill.ship
    chosen: Trained
    if work.recipe.teacher.embeds:
        chosen = choose_arm(embedding_results_of(work), ship)
    else:
        chosen = choose_arm(results_of(work), ship)
    return chosen, work.folder.arm(chosen.arm, chosen.seed)


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
        "edgekd": edgekd.__version__,
    }

    def make() -> list[Path]:
        student, assets = load_student(folder)
        smaller, record = pruned(work, student, result, parse_pruning(word), progress)
        save_student(work.folder.pruned, smaller, assets, record)
        return [work.folder.pruned]

    _once(work, "prune", inputs, make, progress, force)


def decoder_stage(work: Workspace, progress: Progress, force: bool = False) -> None:
    """The shipped student with caches, if it is a language model: what all that follows is made from.

    Raises:
        UsageError: There is no student yet, or no caches can be made of it.
        ModelFileError: Its architecture is one that caches do not serve.
    """
    if not is_language_model(work):
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

    _once(work, "decoder", inputs, make, progress, force)


def is_language_model(work: Workspace) -> bool:
    """Whether samples are windows of tokens."""
    return positions_of(work.splits.train.labels) > 0


def base_folder(work: Workspace) -> Path:
    """Where the ``fp32`` program lies that files are made from: the pruned student, else the shipped one; of a language
    model the one with caches.

    Raises:
        UsageError: It is not there yet.
    """
    if is_language_model(work):
        return work.folder.require(work.folder.decoder, "export")
    if work.recipe.compress.prune is None:
        return shipped(work)[1]
    return work.folder.require(work.folder.pruned, "compress")


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
            "edgekd": edgekd.__version__,
        }

        def make(precision: Precision = precision, settings: Settings = settings) -> list[Path]:
            progress.start(f"compress {precision}", 1)
            smaller, record = compressed(work, student, result, settings, progress)
            save_student(work.folder.compressed(precision), smaller, assets, record)
            progress.advance(1)
            progress.finish()
            return [work.folder.compressed(precision)]

        _once(work, stage, inputs, make, progress, force)


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
        if _once(work, f"export-{request.target}-{request.precision}", inputs, make, progress, again):
            written[request] = folder
    note_regressions(work.folder.artifacts(), measurements_of(work.folder))
    return settle(wanted, written, student, proof, progress)


def source_folder(work: Workspace, target: str, precision: Precision) -> Path:
    """Where the program lies that a file is written from."""
    source = plugins.load_exporter(target).precisions[precision].source
    return base_folder(work) if source == "fp32" else work.folder.compressed(source)


def proof_of(work: Workspace) -> Proof:
    """Held-out samples from the test split, with labels and the teacher's logits."""
    test = work.splits.test
    order = np.argsort(test.ids)  # by id: a stable random choice
    if is_language_model(work):
        return windows_proof(test.take(order), work.cache("test"), work.recipe.export)
    parity = test.arrays(order[: work.recipe.export.samples])
    task = test.take(order[: work.recipe.export.accuracy_samples])
    if work.recipe.teacher.embeds:
        return Proof(parity, task.arrays())
    return Proof(parity, task.arrays(), task.labels, work.cache("test").logits(task.ids))


def finished(work: Workspace) -> list[tuple[Artifact, Path]]:
    """Every artifact that is there, with its folder.

    Raises:
        UsageError: Nothing has been exported yet.
    """
    folders = work.folder.artifacts()
    if not folders:
        raise UsageError("nothing has been exported yet; run: edgekd export")
    return [(load_artifact(folder), folder) for folder in folders]


def bench_stage(
    work: Workspace, progress: Progress, devices: Sequence[str] = (), force: bool = False, release: str = ""
) -> list[Measurement]:
    """Every finished artifact on every device, interleaved, with accuracy and agreement from the same session.

    Args:
        release: What the history calls them.

    Raises:
        UsageError: Nothing has been exported yet.
        DeviceError: A device went away.
    """
    artifacts = finished(work)
    session = plugins.load_module("edgekd.benchmarks.session")
    spec = work.recipe.bench
    plan = Plan(threads=spec.threads, blocks=spec.blocks, warmup_s=spec.warmup_s, min_s=spec.min_s)
    proof, asked_of = proof_of(work), None
    if is_language_model(work):
        plan = replace(plan, prompt_tokens=spec.prompt_tokens, new_tokens=spec.new_tokens)
        asked_of = prompts_of(work.splits.test, PROMPTS, spec.prompt_tokens)
    for asked in devices or _recipe_devices(work):
        profile = load_profile(asked)
        name = profile.name
        inputs: Json = {
            "artifacts": {folder.name: artifact.sha256 for artifact, folder in artifacts},
            "plan": plan.to_json(),
            "test": work.splits.test.fingerprint,
            "samples": work.recipe.export.accuracy_samples,
        }

        def make(profile: Profile = profile, name: str = name) -> list[Path]:
            teacher_top = None if proof.teacher is None else proof.teacher.argmax(axis=1)
            inputs = proof.task if asked_of is None else {TOKENS: asked_of}
            measured = session.measure_many(
                artifacts, name, device_of(profile), inputs, proof.labels, teacher_top, plan, progress
            )
            told = [(artifact, folder, one) for (artifact, folder), one in zip(artifacts, measured, strict=True)]
            return keep(work.folder, name, told, release, "bench", progress)

        _once(work, f"bench-{name}", inputs, make, progress, force)
    measurements = measurements_of(work.folder)
    note_regressions(work.folder.artifacts(), measurements)
    return measurements


def watch_stage(
    work: Workspace, progress: Progress, devices: Sequence[str], plan: Plan, kind: str
) -> list[Measurement]:
    """Every finished artifact on its own with a plan of the caller's; kept beside the measurements, under ``kind``.

    Raises:
        UsageError: Nothing has been exported yet.
        DeviceError: A device went away.
    """
    artifacts = finished(work)
    session, proof = plugins.load_module("edgekd.benchmarks.session"), proof_of(work)
    if plan.profile and is_language_model(work):
        raise UsageError("operators of language models with caches are not timed; edgekd bench without --profile works")
    one = {name: array[:1] for name, array in (proof.task or proof.samples).items()}
    found = []
    for asked in devices or _recipe_devices(work):
        profile = load_profile(asked)
        for artifact, folder in artifacts:
            measured = session.measure(
                artifact, folder, profile.name, device_of(profile), one, None, None, plan, progress
            )
            write_json(work.folder.measurement(profile.name, f"{kind}/{folder.name}"), measured.to_json(), indent=None)
            found.append(measured)
    return found


def _recipe_devices(work: Workspace) -> list[str]:
    """Those of the recipe: names, or paths relative to it."""
    folder = work.recipe.folder
    return [str(folder / name) if name.endswith(".toml") else name for name in work.recipe.bench.devices]


def _once(
    work: Workspace, stage: str, inputs: Json, make: Callable[[], list[Path]], progress: Progress, force: bool
) -> bool:
    """Do a stage unless it is done; one that wrote nothing is tried again the next time.

    Returns:
        Whether what it writes is there, for these inputs.
    """
    if processes.found_by_main(lambda: not force and work.folder.is_done(stage, inputs)):
        progress.say(f"{stage}: unchanged, not done again")
        return True
    outputs = make()
    if outputs and processes.is_main():
        work.folder.finish(stage, inputs, outputs)
    return bool(outputs)
