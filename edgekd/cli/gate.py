"""The commands that judge measurements: compare, calibrate and history."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from edgekd.cli.common import (
    JsonOption,
    RecipeOption,
    ReleaseOption,
    progress_bar,
    require_capture,
    require_path,
    show,
    show_json,
)
from edgekd.errors import InconclusiveError, UsageError

__all__ = ["calibrate", "compare", "history"]

DeviceOption = Annotated[str, typer.Option("--device", "-d", help="Name of a device, or the path of its .toml.")]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        help="data.npz: arrays by input name or arr_0 …, and label, teacher where known; by default the recipe's test "
        "split.",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of every random order.")]
ThreadsOption = Annotated[int, typer.Option(help="Of the runtime.", min=1)]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="The device's calibration; by default where edgekd calibrate keeps it.")
]


def compare(
    old: Annotated[Path, typer.Argument(help="The released artifact: its folder, a folder of them, or a model file.")],
    new: Annotated[Path, typer.Argument(help="What shall take its place, in the same form.")],
    device: DeviceOption = "host",
    inputs: InputsOption = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(
            "--margin",
            "-m",
            help="How much worse it may be: 3% (of latency), cold_start=15%, accuracy=0.5% …; repeat it.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Timed metric to judge: latency, first_token, cold_start, peak_memory; all by default; repeat it."
        ),
    ] = None,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    calibration: CalibrationOption = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table for a pull request here.")] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Annotations of GitHub Actions; also when GITHUB_ACTIONS is set.")
    ] = False,
    release: ReleaseOption = "",
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure an old file and a new one side by side: pass, regression (exit 1) or inconclusive (exit 3)."""
    from edgekd import plugins
    from edgekd.profiles import device_of, load_profile
    from edgekd.store import atomic_write

    gate = plugins.load_module("edgekd.benchmarks.gate")
    report = plugins.load_module("edgekd.benchmarks.gate_report")
    margins = parse_margins(margin or ())
    profile = load_profile(device)
    pairs = plugins.load_module("edgekd.benchmarks.sides").read_pairs(old, new, progress_bar())
    comparison, measured = gate.compare(
        pairs,
        profile.name,
        device_of(profile),
        _samples(inputs, recipe),
        margins=margins,
        plan=replace(gate.GATE_PLAN, threads=threads),
        seed=seed,
        progress=progress_bar(),
        resolution=_resolution(calibration, profile.name),
        metrics=_metrics(metric),
    )
    names = {file.sha256: file.card.name for pair in pairs for file in (pair.old, pair.new)}
    newer = [(names[one.artifact_sha256], one) for one in measured[1::2]]  # the old ones are a release of their own
    plugins.load_module("edgekd.benchmarks.history").keep(newer, release, "compare", progress_bar())
    if junit is not None:
        atomic_write(junit, report.junit(comparison).encode())
    if markdown is not None:
        atomic_write(markdown, report.markdown(comparison).encode())
    if json:
        show_json(comparison.to_json())
    else:
        for line in report.lines(comparison):
            show(line)
    if github or os.environ.get("GITHUB_ACTIONS"):
        for line in report.github(comparison):
            typer.echo(line, err=json)  # the runner reads both streams; --json promises one document on stdout
    if comparison.verdict != "pass":
        raise typer.Exit({"regression": 1, "inconclusive": InconclusiveError.exit_code}[comparison.verdict])


def calibrate(
    model: Annotated[Path, typer.Argument(help="An artifact's folder, or a model file: it is compared with itself.")],
    device: DeviceOption = "host",
    inputs: InputsOption = None,
    pairs: Annotated[int, typer.Option(help="Of fresh processes, at least 20.")] = 30,
    threads: ThreadsOption = 1,
    seed: SeedOption = 0,
    calibration: CalibrationOption = None,
    recipe: RecipeOption = None,
    json: JsonOption = False,
) -> None:
    """Find the smallest change that a device can tell; compare refuses smaller margins on it from then on."""
    from edgekd import plugins
    from edgekd.profiles import device_of, load_profile

    calibrating = plugins.load_module("edgekd.benchmarks.calibrate")
    gate = plugins.load_module("edgekd.benchmarks.gate")
    found = plugins.load_module("edgekd.benchmarks.sides").read_artifacts(model)
    if len(found) > 1:
        raise UsageError(f"{model} holds {', '.join(found)}; a calibration takes one of them")
    ((name, (artifact, folder)),) = found.items()
    profile = load_profile(device)
    resolution = calibrating.calibrate(
        name,
        artifact,
        folder,
        profile.name,
        device_of(profile),
        _samples(inputs, recipe),
        pairs=pairs,
        plan=replace(gate.GATE_PLAN, threads=threads),
        seed=seed,
        progress=progress_bar(),
    )
    path = calibration or calibrating.resolution_path(profile.name)
    calibrating.save_resolution(resolution, path)
    if json:
        show_json(resolution.to_json())
        return
    for metric, smallest in resolution.smallest.items():
        show(f"{metric:<12} a change of {smallest:.1%} can be told apart")
    show(f"{resolution.pairs} pairs of {resolution.label} on {resolution.device}: {path}")


def history(
    model: Annotated[str, typer.Option(help="Name of a model, as on its card; all by default.")] = "",
    device: Annotated[str, typer.Option("--device", "-d", help="Device whose name begins so; all by default.")] = "",
    html: Annotated[Path | None, typer.Option(help="Write the page with the pictures here.")] = None,
    url: Annotated[
        str | None,
        typer.Option(help="SQLAlchemy URL; by default EDGEKD_HISTORY, else a SQLite file in edgekd's state folder."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show latency, size and accuracy over the releases, and where a level changed for good."""
    from edgekd import plugins
    from edgekd.store import atomic_write

    store = plugins.load_module("edgekd.benchmarks.history").History(url)
    page = plugins.load_module("edgekd.benchmarks.history_page")
    try:
        entries = store.entries(model, device)
    finally:
        store.close()
    if html is not None:
        atomic_write(html, page.html(entries).encode())
    if json:
        found = [
            {
                "created": entry.created.isoformat(),
                "release": entry.release,
                "model": entry.model,
                "device": entry.device,
                "how": entry.how,
                "measurement": entry.measurement.to_json(),
            }
            for entry in entries
        ]
        show_json(found)
        return
    for line in page.lines(entries):
        show(line)


def parse_margins(words: list[str] | tuple[str, ...]) -> Any:
    """``3%`` and ``cold_start=15%`` as ``edgekd.benchmarks.cells.Margins``.

    Raises:
        UsageError: There is no such metric, or it is no share.
    """
    from edgekd import plugins

    margins = plugins.load_module("edgekd.benchmarks.cells").Margins()
    known = [field.name for field in fields(margins)]
    for word in words:
        name, _, text = word.rpartition("=")
        name = name or "latency"
        if name not in known:
            raise UsageError(f"--margin {word}: nothing is called {name!r}; there are {', '.join(known)}")
        try:
            value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise UsageError(f"--margin {word}: {text!r} is no share; 3% or 0.03 works") from None
        if not 0 <= value < (1 if "floor" not in name else float("inf")):
            raise UsageError(f"--margin {word}: a margin lies between 0 % and 100 %; 3% or 0.03 works")
        margins = replace(margins, **{name: value})
    return margins


def _metrics(words: list[str] | None) -> tuple[str, ...]:
    from edgekd import plugins

    known = tuple(plugins.load_module("edgekd.benchmarks.cells").TIMED)
    wrong = [word for word in words or () if word not in known]
    if wrong:
        raise UsageError(f"no timed metric is called {wrong[0]!r}; there are {', '.join(known)}")
    return tuple(words or known)


def _samples(inputs: Path | None, recipe: Path | None) -> Any:
    """Of a file, else of the recipe's test split."""
    from edgekd import plugins

    if inputs is not None:
        require_path(inputs, "data file")
        return plugins.load_module("edgekd.benchmarks.sides").read_samples(inputs)
    from edgekd.recipes.reading import find_recipe, load_recipe
    from edgekd.stages.proofs import proof_of
    from edgekd.stages.workspace import Workspace

    try:
        path = recipe or find_recipe(Path.cwd())
    except UsageError as error:
        raise UsageError(f"which inputs? --inputs data.npz, or a recipe: {error}") from None
    work = Workspace(load_recipe(path))
    if not work.recipe.teacher.embeds:  # what an embedding is proven with needs no teacher
        require_capture(work, "test")
    proof = proof_of(work)
    # A language model is asked the prompts that it was proven with.
    task = proof.samples if proof.windows is not None else proof.task
    return plugins.load_module("edgekd.benchmarks.cells").Samples(task, proof.labels, proof.teacher)


def _resolution(path: Path | None, device_name: str) -> Any:
    from edgekd import plugins

    calibrating = plugins.load_module("edgekd.benchmarks.calibrate")
    if path is not None and not path.is_file():
        raise UsageError(f"no calibration at {path}; edgekd calibrate writes it")
    return calibrating.load_resolution(path or calibrating.resolution_path(device_name))
