"""The command line: one small function per subcommand. Results go to stdout, talk and progress to stderr.

Exit codes: 0 good, 1 it failed, 2 you asked wrongly, 3 inconclusive (``edgekd.errors``).
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd import processes
from edgekd.cli.choosing import suggest, sweep
from edgekd.cli.common import (
    ForceOption,
    JsonOption,
    MaxDropOption,
    PrecisionOption,
    RecipeOption,
    SeedsOption,
    drop_of,
    progress_bar,
    require_capture,
    show,
    show_json,
    workspace,
)
from edgekd.cli.devices import bench_app, devices_app
from edgekd.cli.files import export, lint, targets, verify
from edgekd.cli.gate import calibrate, compare, history
from edgekd.cli.generate import generate
from edgekd.cli.on_policy import on_policy
from edgekd.errors import EdgekdError, RecipeError, UsageError

if TYPE_CHECKING:
    from edgekd.stages.workspace import Workspace

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


def init(
    template: Annotated[str, typer.Option("--template", help="image or text.")] = "image",
    folder: Annotated[Path, typer.Argument(help="Where; created if need be.")] = Path(),
) -> None:
    """Write a recipe that runs, with a comment at every knob."""
    from edgekd.cli.scaffold import write_template

    for path in write_template(template, folder):
        show(f"wrote {path}")
    show(
        f"next: cd {folder} && edgekd check && edgekd run" if str(folder) != "." else "next: edgekd check && edgekd run"
    )


def check(
    recipe: RecipeOption = None,
    shift: Annotated[
        str | None, typer.Option(help="Instead: have these samples of the app drifted (exit 1)? As of data.train.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check that recipe, data, teacher and student fit, and probe what the run will cost, before hours are spent."""
    from edgekd.choosing.preflight import preflight
    from edgekd.stages.check import check_workspace

    work = workspace(recipe)
    if shift is not None:
        _check_shift(work, shift, json)
        return
    facts = check_workspace(work)
    cost = preflight(work)
    if json:
        show_json({**facts, **cost.facts(), "preflight": cost.to_json()})
        return
    for key, value in {**facts, **cost.facts()}.items():
        show(f"{key:<22} {value}")
    show("good")


def capture(
    recipe: RecipeOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Run the teacher in so many processes, by Ray; they share the cores.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Run them on the Ray cluster at host:port; by default one on each machine.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Run the teacher once over every sample and view, and keep what it says."""
    from edgekd.stages.pipeline import capture_stage
    from edgekd.stages.workers import hired

    work = workspace(recipe)
    with work.folder.locked(), hired(workers, cluster) if workers or cluster else nullcontext() as crew:
        capture_stage(work, progress_bar(), force, crew)


def distill(recipe: RecipeOption = None, seeds: SeedsOption = None, force: ForceOption = False) -> None:
    """Train the students and, always, the control without a teacher."""
    from edgekd.recipes.seeds import keep_count
    from edgekd.stages.pipeline import distill_stage

    with processes.joined():
        work = workspace(recipe, seeds)
        require_capture(work)
        with work.folder.locked() if processes.is_main() else nullcontext():
            if processes.is_main():
                keep_count(work.recipe, seeds)
            results = distill_stage(work, progress_bar(), force)
    for result in results if processes.is_main() else ():
        show(
            f"{result.arm:<12} seed {result.seed}  validation {result.validation.share:.2%}  test {result.test.words()}"
        )


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
    """Quantize the chosen student, once for all targets (w8, w8a8, w4a8, w8a16, auto)."""
    from edgekd.precisions import PORTABLE
    from edgekd.stages.pipeline import compress_stage

    wrong = [word for word in precision or [] if word not in PORTABLE]
    if wrong:
        raise UsageError(
            f"compress has no precision {wrong[0]!r}; it has {', '.join(PORTABLE)}; exporters make the others"
        )
    work = workspace(recipe)
    with work.folder.locked():
        wanted = [p for p in PORTABLE if p in (precision or [])]
        compress_stage(work, progress_bar(), wanted, force, qat, drop_of(max_drop))


def report(recipe: RecipeOption = None, json: JsonOption = False) -> None:
    """Tell what was found: the table here, report.json and report.html in the run folder."""
    _report(workspace(recipe), json)


def run(
    recipe: RecipeOption = None, seeds: SeedsOption = None, force: ForceOption = False, json: JsonOption = False
) -> None:
    """Do all stages in order; what is unchanged is not done again, and a killed run goes on where it was."""
    from edgekd.recipes.seeds import keep_count
    from edgekd.stages.bench import bench_stage
    from edgekd.stages.pipeline import capture_stage, distill_stage, export_stage

    work, progress = workspace(recipe, seeds), progress_bar()
    with work.folder.locked():
        keep_count(work.recipe, seeds)
        capture_stage(work, progress, force)
        distill_stage(work, progress, force)
        export_stage(work, progress, force=force)
        bench_stage(work, progress, force=force)
        _report(work, json)


def doctor(json: JsonOption = False) -> None:
    """Say what this machine can do, what it cannot, and the line that mends it."""
    from edgekd.cli.doctor import diagnose

    findings = diagnose()
    if json:
        show_json(findings)
        return
    for finding in findings:
        show(f"{finding['state']:<5} {finding['what']}: {finding['found']}")
        if finding["mend"]:
            show(f"      {finding['mend']}")


def schema() -> None:
    """Print the JSON Schema of edgekd.toml, for editors."""
    from edgekd.recipes.recipe import json_schema

    show_json(json_schema())


def _check_shift(work: Workspace, served: str, json: bool) -> None:
    from edgekd.recipes.reading import source_faults
    from edgekd.stages.served import check_shift

    if faults := source_faults("--shift", served, work.recipe.data.model_dump(), work.recipe.folder):
        raise UsageError(faults[0])
    found = check_shift(work, served)
    if json:
        show_json({"drifted": found.drifted, "sentences": found.sentences(), **found.to_json()})
    else:
        for sentence in found.sentences():
            show(sentence)
    if found.drifted:
        raise typer.Exit(1)


def _report(work: Workspace, json: bool) -> None:
    from edgekd.reporting.ledger import arm_table, table
    from edgekd.reporting.summary import write_report
    from edgekd.store import read_json

    ledger = write_report(work)
    if json:
        show_json(read_json(work.folder.report_json))
        return
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table(ledger))
    if any(row.seeds > 1 for row in ledger.arms):
        console.print(arm_table(ledger.arms))
    for sentence in ledger.sentences:
        console.print(f"• {sentence}", markup=False)
    console.print(f"report: {work.folder.report_html}", markup=False, soft_wrap=True)


def _fail(line: str) -> None:
    if processes.fails_first():
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


STAGES = (
    init,
    check,
    suggest,
    capture,
    sweep,
    distill,
    compress,
    export,
    lint,
    verify,
    compare,
    calibrate,
    history,
    report,
    run,
)
for command in (*STAGES, generate, on_policy, targets, doctor, schema):  # as the help lists them
    app.command()(command)
app.add_typer(bench_app, name="bench")
app.add_typer(devices_app, name="devices")


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    processes.require_one(context.invoked_subcommand)
    if version:
        import edgekd

        show(edgekd.__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
