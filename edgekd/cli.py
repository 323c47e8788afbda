"""The command line: one small function per subcommand. Results go to stdout, talk and progress to stderr.

Exit codes: 0 good, 1 it failed, 2 you asked wrongly, 3 inconclusive (``edgekd.errors``).
"""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli_gate import app as gate_app
from edgekd.errors import EdgekdError, RecipeError, UsageError

if TYPE_CHECKING:
    from edgekd.workspace import Workspace

__all__ = ["app", "main"]

app = typer.Typer(
    name="edgekd",
    help="Distill a teacher into a student, export it, prove every file, measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", help="edgekd.toml; by default the one here or in the nearest folder above."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Do it again even if nothing changed.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="onnx, coreml, tflite, coreai, executorch, ort …; repeat it, or 'all' for every installed one.",
    ),
]
PrecisionOption = Annotated[
    list[str] | None,
    typer.Option("--precision", "-p", help="fp32, int8 (chosen by rule), or another that edgekd targets lists."),
]
MaxDropOption = Annotated[
    str | None,
    typer.Option("--max-drop", help="What precision auto may lose: 0.5pt (half a point of accuracy) or 0.005."),
]


def main() -> None:
    """Run the command line; every foreseen error is one line on stderr and its documented exit code."""
    import errno
    import os

    # OpenMP's threads spin at every barrier by default: on a shared machine a training step then takes ten times as
    # long (measured: 82 ms a batch norm against 0.1). Read when torch is first imported, so it is set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except RecipeError as error:
        for fault in error.faults:
            _fail(fault)
        raise SystemExit(error.exit_code) from None
    except EdgekdError as error:
        _fail(str(error))
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from here")
        raise SystemExit(130) from None
    except Exception as error:  # the user's own code, or a fault of ours: one line, and where to look
        if os.environ.get("EDGEKD_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _fail(f"the disk is full: {error.filename or 'a file'} was not written; what was there before is unchanged")
        else:
            what = f"{type(error).__name__} at {_place(error)}: {_one_line(error)}"
            _fail(f"{what}; EDGEKD_TRACEBACK=1 shows the way there")
        raise SystemExit(1) from None


@app.command()
def init(
    template: Annotated[str, typer.Option("--template", help="image or text.")] = "image",
    folder: Annotated[Path, typer.Argument(help="Where; created if need be.")] = Path(),
) -> None:
    """Write a recipe that runs, with a comment at every knob."""
    from edgekd.scaffold import write_template

    for path in write_template(template, folder):
        _out(f"wrote {path}")
    _out(
        f"next: cd {folder} && edgekd check && edgekd run" if str(folder) != "." else "next: edgekd check && edgekd run"
    )


@app.command()
def check(recipe: RecipeOption = None, json: JsonOption = False) -> None:
    """Check the recipe, the data, and that teacher and student fit, before hours are spent."""
    from edgekd.check import check_workspace

    facts = check_workspace(_workspace(recipe))
    if json:
        _json(facts)
        return
    for key, value in facts.items():
        _out(f"{key:<22} {value}")
    _out("good")


@app.command()
def capture(recipe: RecipeOption = None, force: ForceOption = False) -> None:
    """Run the teacher once over every sample and view, and keep what it says."""
    from edgekd.pipeline import capture_stage

    work = _workspace(recipe)
    with work.folder.locked():
        capture_stage(work, _progress(), force)


@app.command()
def distill(recipe: RecipeOption = None, force: ForceOption = False) -> None:
    """Train the students and, always, the control without a teacher."""
    from edgekd.pipeline import distill_stage

    work = _workspace(recipe)
    with work.folder.locked():
        results = distill_stage(work, _progress(), force)
    for result in results:
        _out(
            f"{result.arm:<12} seed {result.seed}  validation {result.validation.accuracy:.2%}  "
            f"test {result.test.accuracy:.2%}  agrees with the teacher {result.test.teacher_agreement:.2%}"
        )


@app.command()
def compress(
    recipe: RecipeOption = None,
    precision: PrecisionOption = None,
    qat: Annotated[
        bool | None,
        typer.Option("--qat/--no-qat", help="Train w8a8 or w4a8 with their rounding, from the teacher's outputs."),
    ] = None,
    max_drop: MaxDropOption = None,
    force: ForceOption = False,
) -> None:
    """Quantize the chosen student, once for all targets (w8, w8a8, w4a8, auto)."""
    from edgekd.compress import PORTABLE
    from edgekd.pipeline import compress_stage

    wrong = [word for word in precision or [] if word not in PORTABLE]
    if wrong:
        raise UsageError(
            f"compress has no precision {wrong[0]!r}; it has {', '.join(PORTABLE)}; exporters make the others"
        )
    work = _workspace(recipe)
    with work.folder.locked():
        wanted = [p for p in PORTABLE if p in (precision or [])]
        compress_stage(work, _progress(), wanted, force, qat, _share(max_drop))


@app.command()
def export(
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
        str | None,
        typer.Option(help="What makes static int8 more accurate: auto, none, or a list of equalize,smooth,bias."),
    ] = None,
    max_drop: MaxDropOption = None,
    max_length: Annotated[int, typer.Option(help="Tokens, for a text model from hf:folder.", min=1)] = 128,
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
    from edgekd.reading import parse_options
    from edgekd.store import load_artifact

    targets = _targets(target)
    if model is not None:
        from edgekd.corrections import parse_corrections
        from edgekd.external import export_external

        if not targets:
            raise UsageError("which target? --target onnx, coreml, tflite, or all")
        folders = export_external(
            model,
            targets,
            precision or ["fp32"],
            out,
            _progress(),
            calibration=calibration,
            samples=samples,
            observer=observer,
            corrections=parse_corrections("auto" if corrections is None else corrections),
            max_length=max_length,
            options=parse_options(option or (), targets),
            tuned=tune,
            max_drop=_share(max_drop),
        )
    else:
        from edgekd.pipeline import export_stage

        if corrections is not None:
            raise UsageError(f"--corrections {corrections} is for a model file; a recipe says it under [compress]")
        work = _workspace(recipe)
        options = parse_options(option or (), targets or work.recipe.export.targets)
        with work.folder.locked():
            folders = export_stage(work, _progress(), targets, precision or (), force, options, tune, _share(max_drop))
    artifacts = [(load_artifact(folder), folder) for folder in folders]
    if json:
        _json([_artifact_json(artifact, folder) for artifact, folder in artifacts])
        return
    for artifact, folder in artifacts:
        parity = artifact.parity
        same = "" if parity.agreement is None else f", same top class {parity.agreement:.2%}"
        _out(
            f"{folder / artifact.path}  {artifact.size_bytes:,} bytes  parity {parity.status} on {parity.samples} "
            f"samples: max error {parity.max_abs:.3g}, cosine {parity.cosine:.6f}{same}"
        )
        for note in artifact.notes:
            _say(f"  {note}")
        for line in artifact.regressions:
            _say(f"  worse than fp32: {line}")
        for finding in artifact.findings:
            _say(f"  {finding.message}")
        if artifact.warnings:
            _say(f"  the toolchain complained {len(artifact.warnings)} times; manifest.json has the lines")


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="A model file, whoever made it, or the folder of an artifact.")],
    precision: Annotated[
        str | None,
        typer.Option("--precision", "-p", help="What it claims; by default what its manifest says, or w8."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what a file holds in float and what its converter added, each with its cost."""
    from edgekd.lint import lint_file

    contents, findings = lint_file(file, precision)
    if json:
        _json({"findings": [finding.to_json() for finding in findings], "contents": contents.to_json()})
        return
    by_type: dict[str, int] = {}
    for weight in contents.weights:
        by_type[weight.dtype] = by_type.get(weight.dtype, 0) + weight.size_bytes
    _out("weights: " + ", ".join(f"{size:,} bytes of {dtype}" for dtype, size in sorted(by_type.items())))
    _out(f"operators: {len(contents.operators)}")
    for finding in findings:
        _out(finding.message)


@app.command()
def verify(
    cache: Annotated[
        bool, typer.Option("--cache", help="The teacher caches: run the teacher again on a sample.")
    ] = False,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Prove again what is on disk: every artifact, or with --cache the teacher's outputs."""
    from edgekd.pipeline import verify_artifacts, verify_caches

    work = _workspace(recipe)
    if cache:
        verify_caches(work, _progress())
        _out("good")
        return
    artifacts = verify_artifacts(work, _progress())
    if json:
        _json([_artifact_json(a, work.folder.artifact(a.target, a.precision)) for a in artifacts])
    else:
        _out(f"good: {len(artifacts)} files")


bench_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    device: Annotated[
        list[str] | None, typer.Option("--device", "-d", help="Name of a device, or the path of its .toml; repeat it.")
    ] = None,
    release: Annotated[str, typer.Option(help="What the history calls these files: v1.4, a commit …")] = "",
    sustained: Annotated[
        float | None,
        typer.Option(help="Run each file for so many minutes without a pause, and show each minute.", min=0.01),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the slowest operators of each file.")] = False,
    recipe: RecipeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Measure every artifact on a device: latency, memory, accuracy and agreement in one session."""
    if context.invoked_subcommand:
        return
    from edgekd import plugins
    from edgekd.pipeline import bench_stage

    work = _workspace(recipe)
    if sustained is not None or profile:
        from edgekd.watching import profiled, sustained_for

        with work.folder.locked():
            told = (
                sustained_for(work, _progress(), device or (), sustained)
                if sustained is not None
                else profiled(work, _progress(), device or ())
            )
        for line in told:
            _out(line)
        return
    with work.folder.locked():
        measured = bench_stage(work, _progress(), device or (), force, release)
    if json:
        _json([measurement.to_json() for measurement in measured])
        return
    stats = plugins.load_module("edgekd.benchmarks.stats")
    for item in measured:
        what = f"{item.target} {item.precision}"
        if item.status == "not_run":
            _out(f"{what:<14} not run: {item.reason}")
        else:
            flags = f"  [{', '.join(item.flags)}]" if item.flags else ""
            _out(f"{what:<14} p50 {stats.summarize(item).p50_ms:.3f} ms on {item.device}{flags}")


@bench_app.command("import")
def bench_import(
    file: Annotated[Path, typer.Argument(help="JSON; docs/devices.md has its fields.")], recipe: RecipeOption = None
) -> None:
    """Keep a measurement that was taken elsewhere: in Xcode, in an app. It is flagged, and nothing is gated on it."""
    from edgekd.imported import import_measurement

    work = _workspace(recipe)
    with work.folder.locked():
        path, measurement = import_measurement(file, work.folder)
    _out(f"{measurement.target} {measurement.precision} on {measurement.device}: {path}")


@app.command()
def report(recipe: RecipeOption = None, json: JsonOption = False) -> None:
    """Tell what was found: the table here, report.json and report.html in the run folder."""
    _report(_workspace(recipe), json)


@app.command()
def run(recipe: RecipeOption = None, force: ForceOption = False, json: JsonOption = False) -> None:
    """Do all stages in order; what is unchanged is not done again, and a killed run goes on where it was."""
    from edgekd import pipeline

    work, progress = _workspace(recipe), _progress()
    with work.folder.locked():
        pipeline.capture_stage(work, progress, force)
        pipeline.distill_stage(work, progress, force)
        pipeline.export_stage(work, progress, force=force)
        pipeline.bench_stage(work, progress, force=force)
        _report(work, json)


@app.command()
def targets(json: JsonOption = False) -> None:
    """List the targets, and whether their toolchains are installed."""
    from edgekd.doctor import target_facts

    facts = target_facts()
    if json:
        _json(facts)
        return
    for fact in facts:
        state = "ready" if fact["ready"] else fact["reason"]
        _out(f"{fact['target']:<10} {', '.join(fact['precisions']):<30} {state}")


app.add_typer(gate_app)

devices_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(devices_app, name="devices")


@devices_app.callback()
def devices(context: typer.Context, json: JsonOption = False) -> None:
    """List the devices that are reachable now, and why the others are not."""
    if context.invoked_subcommand:
        return
    from edgekd.doctor import device_facts

    facts = device_facts()
    if json:
        _json(facts)
        return
    width = max(len(fact["device"]) for fact in facts) + 1
    for fact in sorted(facts, key=lambda fact: not fact["reachable"]):
        runs = f"runs {', '.join(fact['targets']) or 'nothing'} {fact['facts'].get('opens', '')}"
        state = runs.rstrip() if fact["reachable"] else f"not now: {fact['reason']}"
        _out(f"{fact['device']:<{width}} {state}")
        if fact["reachable"]:
            for target, reason in fact["not_run"].items():
                _out(f"{'':<{width}} not {target}: {reason}")


@devices_app.command()
def prepare(name: Annotated[str, typer.Argument(help="Name of a device, or the path of its .toml.")]) -> None:
    """Install on a device what measuring needs there; says what it installs and where. Nothing else ever does."""
    from edgekd.profiles import load_device
    from edgekd.protocols import Preparable

    device = load_device(name)
    if not isinstance(device, Preparable):
        raise UsageError(f"device {name} needs no preparing; edgekd devices says what it runs")
    try:
        device.prepare(_progress())
    finally:
        device.close()
    _out(f"{name} is ready")


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Say what this machine can do, what it cannot, and the line that mends it."""
    from edgekd.doctor import diagnose

    findings = diagnose()
    if json:
        _json(findings)
        return
    for finding in findings:
        _out(f"{finding['state']:<5} {finding['what']}: {finding['found']}")
        if finding["mend"]:
            _out(f"      {finding['mend']}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of edgekd.toml, for editors."""
    from edgekd.recipe import json_schema

    _json(json_schema())


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import edgekd

        _out(edgekd.__version__)
        raise typer.Exit


def _share(text: str | None) -> float | None:
    """A budget as it is typed, as a share."""
    from edgekd.recipe import parse_drop

    try:
        share: float | None = parse_drop(text)
    except ValueError as error:
        raise UsageError(f"--max-drop {error}") from None
    if share is not None and not 0 <= share < 1:
        raise UsageError(f"--max-drop {text} is no budget; 0.5pt (half a point) or 0.005 works")
    return share


def _workspace(recipe: Path | None) -> Workspace:
    from edgekd.reading import find_recipe, load_recipe
    from edgekd.workspace import Workspace

    return Workspace(load_recipe(recipe or find_recipe(Path.cwd())))


def _targets(names: list[str] | None) -> list[str]:
    """``all`` is every target whose toolchain is installed."""
    from edgekd import plugins

    if names and "all" in names:
        return [n for n in plugins.exporter_names() if not plugins.missing(plugins.load_exporter(n).requires)]
    return list(dict.fromkeys(names or []))


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
        },
        "accuracy": artifact.accuracy,
        "toolchain": artifact.toolchain,
        "options": artifact.options,
        "notes": list(artifact.notes),
        "warnings": list(artifact.warnings),
        "regressions": list(artifact.regressions),
        "findings": [finding.to_json() for finding in artifact.findings],
    }


def _report(work: Workspace, json: bool) -> None:
    from edgekd.ledger import table
    from edgekd.store import read_json
    from edgekd.summary import write_report

    ledger = write_report(work)
    if json:
        _json(read_json(work.folder.report_json))
        return
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table(ledger))
    for sentence in ledger.sentences:
        console.print(f"• {sentence}", markup=False)
    console.print(f"report: {work.folder.report_html}", markup=False, soft_wrap=True)


def _progress() -> Any:
    from edgekd.console import progress_for

    return progress_for()


def _out(line: str) -> None:
    typer.echo(line)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _fail(line: str) -> None:
    typer.echo(f"edgekd: {line}", err=True)


def _place(error: BaseException) -> str:
    """The innermost line that belongs to no installed package: the user's code, or ours."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "<frozen" not in frame.filename]
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _json(value: Any) -> None:
    typer.echo(jsonlib.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    main()
