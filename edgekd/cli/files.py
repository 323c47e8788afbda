"""The commands about model files: export, lint, verify, targets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli.common import (
    ForceOption,
    JsonOption,
    MaxDropOption,
    PrecisionOption,
    RecipeOption,
    drop_of,
    progress_bar,
    require_capture,
    require_model,
    require_path,
    say,
    show,
    show_json,
    workspace,
)
from edgekd.errors import RecipeError, UsageError
from edgekd.types import Parity

if TYPE_CHECKING:
    from edgekd.protocols import Options

__all__ = ["export", "lint", "targets", "verify"]

TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="onnx, coreml, tflite, coreai, executorch, ort …; repeat it, or 'all' for every installed one.",
    ),
]


FOR_A_MODEL_FILE = ("calibration", "samples", "observer", "corrections", "max_length", "out")
"""Parameters of ``export`` that a recipe has its own word for."""


def export(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="model.pt2 or hf:folder; by default the student of the recipe.", show_default=False),
    ] = None,
    target: TargetOption = None,
    precision: PrecisionOption = None,
    calibration: Annotated[Path | None, typer.Option(help="data.npz that static int8 takes its scales from.")] = None,
    samples: Annotated[Path | None, typer.Option(help="data.npz to prove the files with.")] = None,
    observer: Annotated[str, typer.Option(help="How static int8 takes a range: minmax, percentile or mse.")] = "minmax",
    corrections: Annotated[
        str,
        typer.Option(help="What makes static int8 more accurate: auto, none, or a list of equalize,smooth,bias."),
    ] = "auto",
    max_drop: MaxDropOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens, for hf:folder: of a text (128), or of prompt and answer together (1024).", min=1),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the artifacts of a model file.")] = Path(
        "artifacts"
    ),
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="What a target alone can be told: key=value or target.key=value; repeat it."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose int8 by measuring its forms on this machine, not by rule.")
    ] = False,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write the model for each target and prove each file against the program it came from."""
    from edgekd.store import load_artifact

    targets = _targets(target)
    if model is not None:
        from edgekd.compression.corrections import parse_corrections
        from edgekd.exporting.external import export_external

        if recipe is not None:
            raise UsageError(f"either the model file {model} or --recipe {recipe}: a recipe exports its own student")
        if not targets:
            raise UsageError("which target? --target onnx, coreml, tflite, or all")
        require_model(model)
        require_path(calibration, "data file")
        require_path(samples, "data file")
        folders = export_external(
            model,
            targets,
            precision or ["fp32"],
            out,
            progress_bar(),
            calibration=calibration,
            samples=samples,
            observer=observer,
            corrections=parse_corrections(corrections),
            max_length=max_length,
            options=_options(option, targets),
            tuned=tune,
            max_drop=drop_of(max_drop),
        )
    else:
        from edgekd.stages.pipeline import export_stage

        for name in FOR_A_MODEL_FILE:
            if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE":
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is for a model file; a recipe says such things in its tables")
        work = workspace(recipe)
        options = _options(option, targets or work.recipe.export.targets)
        with work.folder.locked():
            folders = export_stage(
                work, progress_bar(), targets, precision or (), force, options, tune, drop_of(max_drop)
            )
    artifacts = [(load_artifact(folder), folder) for folder in folders]
    if json:
        show_json([_artifact_json(artifact, folder) for artifact, folder in artifacts])
        return
    for artifact, folder in artifacts:
        parity = artifact.parity
        same = _same(parity)
        show(
            f"{folder / artifact.path}  {artifact.size_bytes:,} bytes  parity {parity.status} on {parity.samples} "
            f"samples: max error {parity.max_abs:.3g}, cosine {parity.cosine:.6f}{same}"
        )
        for note in artifact.notes:
            say(f"  {note}")
        for line in artifact.regressions:
            say(f"  worse than fp32: {line}")
        for finding in artifact.findings:
            say(f"  {finding.message}")
        if artifact.warnings:
            say(f"  the toolchain complained {len(artifact.warnings)} times; manifest.json has the lines")


def _same(parity: Parity) -> str:
    """How often the most likely answer is the same; of a language model, how far."""
    told = parity.generation
    if told is None:
        return "" if parity.agreement is None else f", same top class {parity.agreement:.2%}"
    differ = "" if told.first_difference is None else f", the first other one at {told.first_difference}"
    return (
        f"; {told.same} of {told.prompts} answers of {told.new_tokens} tokens are the same, "
        f"{told.agreement:.2%} of their tokens{differ}"
    )


def lint(
    file: Annotated[Path, typer.Argument(help="A model file, whoever made it, or the folder of an artifact.")],
    precision: Annotated[
        str | None,
        typer.Option("--precision", "-p", help="What it claims; by default what its manifest says, or w8."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what a file holds in float and what its converter added, each with its cost."""
    from edgekd.exporting.lint import lint_file

    require_path(file, "model file")
    contents, findings = lint_file(file, precision)
    if json:
        show_json({"findings": [finding.to_json() for finding in findings], "contents": contents.to_json()})
        return
    by_type: dict[str, int] = {}
    for weight in contents.weights:
        by_type[weight.dtype] = by_type.get(weight.dtype, 0) + weight.size_bytes
    show("weights: " + ", ".join(f"{size:,} bytes of {dtype}" for dtype, size in sorted(by_type.items())))
    show(f"operators: {len(contents.operators)}")
    for finding in findings:
        show(finding.message)


def verify(
    cache: Annotated[
        bool, typer.Option("--cache", help="The teacher caches: run the teacher again on a sample.")
    ] = False,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Prove again what is on disk: every artifact, or with --cache the teacher's outputs."""
    from edgekd.stages.verify import verify_artifacts, verify_caches

    work = workspace(recipe)
    if cache:
        require_capture(work)
        found = verify_caches(work, progress_bar())
        if json:
            show_json([{"split": split, **asdict(numbers)} for split, numbers in found.items()])
        else:
            show("good")
        return
    artifacts = verify_artifacts(work, progress_bar())
    if json:
        show_json([_artifact_json(a, work.folder.artifact(a.target, a.precision)) for a in artifacts])
    else:
        show(f"good: {len(artifacts)} files")


def targets(json: JsonOption = False) -> None:
    """List the targets, and whether their toolchains are installed."""
    from edgekd.cli.doctor import target_facts

    facts = target_facts()
    if json:
        show_json(facts)
        return
    for fact in facts:
        state = "ready" if fact["ready"] else fact["reason"]
        show(f"{fact['target']:<10} {', '.join(fact['precisions']):<30} {state}")


def _targets(names: list[str] | None) -> list[str]:
    """``all`` is every target whose toolchain is installed."""
    from edgekd import plugins

    if names and "all" in names:
        return [n for n in plugins.exporter_names() if not plugins.missing(plugins.load_exporter(n).requires)]
    return list(dict.fromkeys(names or []))


def _options(words: list[str] | None, targets: list[str] | tuple[str, ...]) -> dict[str, Options]:
    """What targets are told; what is wrong is said by the option that was typed, not by a recipe's key."""
    from edgekd.recipes.reading import parse_options

    try:
        return parse_options(words or (), targets)
    except RecipeError as error:
        raise RecipeError([f"--option {fault.removeprefix('export.')}" for fault in error.faults]) from None


def _artifact_json(artifact: Any, folder: Path) -> dict[str, Any]:
    parity = artifact.parity
    return {
        "target": artifact.target,
        "precision": artifact.precision,
        "path": str(folder / artifact.path),
        "sha256": artifact.sha256,
        "size_bytes": artifact.size_bytes,
        "parity": {
            "status": parity.status,
            "max_abs": parity.max_abs,
            "cosine": parity.cosine,
            "agreement": parity.agreement,
            "samples": parity.samples,
            "generation": None if parity.generation is None else parity.generation.to_json(),
        },
        "accuracy": artifact.accuracy,
        "toolchain": artifact.toolchain,
        "options": artifact.options,
        "notes": list(artifact.notes),
        "warnings": list(artifact.warnings),
        "regressions": list(artifact.regressions),
        "findings": [finding.to_json() for finding in artifact.findings],
    }
