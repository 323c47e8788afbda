"""The commands about devices: bench, bench import, devices, devices prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import (
    ForceOption,
    JsonOption,
    RecipeOption,
    ReleaseOption,
    progress_bar,
    show,
    show_json,
    workspace,
)
from edgekd.errors import UsageError

__all__ = ["bench_app", "devices_app"]

bench_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
devices_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@bench_app.callback()
def bench(
    context: typer.Context,
    device: Annotated[
        list[str] | None, typer.Option("--device", "-d", help="Name of a device, or the path of its .toml; repeat it.")
    ] = None,
    release: ReleaseOption = "",
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
    from edgekd.stages.bench import bench_stage

    work = workspace(recipe)
    if sustained is not None or profile:
        from edgekd.stages.watching import profiled, sustained_for

        with work.folder.locked():
            told = (
                sustained_for(work, progress_bar(), device or (), sustained)
                if sustained is not None
                else profiled(work, progress_bar(), device or ())
            )
        for line in told:
            show(line)
        return
    with work.folder.locked():
        measured = bench_stage(work, progress_bar(), device or (), force, release)
    if json:
        show_json([measurement.to_json() for measurement in measured])
        return
    stats = plugins.load_module("edgekd.benchmarks.stats")
    for item in measured:
        what = f"{item.target} {item.precision}"
        if item.status == "not_run":
            show(f"{what:<14} not run: {item.reason}")
        else:
            flags = f"  [{', '.join(item.flags)}]" if item.flags else ""
            found = stats.summarize(item)
            speed = f"p50 {found.p50_ms:.3f} ms"
            if found.first_token_ms is not None:
                speed = (
                    f"first token {found.first_token_ms:.3f} ms (prompt of {item.plan.prompt_tokens}), "
                    f"{found.tokens_per_second:.1f} tokens/s"
                )
            show(f"{what:<14} {speed} on {item.device}{flags}")


@bench_app.command("import")
def bench_import(
    file: Annotated[Path, typer.Argument(help="JSON; docs/devices.md has its fields.")],
    release: ReleaseOption = "",
    recipe: RecipeOption = None,
) -> None:
    """Keep a measurement that was taken elsewhere: in Xcode, in an app. It is flagged, and nothing is gated on it."""
    from edgekd.stages.imported import import_measurement

    work = workspace(recipe)
    with work.folder.locked():
        path, measurement = import_measurement(file, work.folder, release, progress_bar())
    show(f"{measurement.target} {measurement.precision} on {measurement.device}: {path}")


@devices_app.callback()
def devices(context: typer.Context, json: JsonOption = False) -> None:
    """List the devices that are reachable now, and why the others are not."""
    if context.invoked_subcommand:
        return
    from edgekd.cli.doctor import device_facts

    facts = device_facts()
    if json:
        show_json(facts)
        return
    width = max(len(fact["device"]) for fact in facts) + 1
    for fact in sorted(facts, key=lambda fact: not fact["reachable"]):
        runs = f"runs {', '.join(fact['targets']) or 'nothing'} {fact['facts'].get('opens', '')}"
        state = runs.rstrip() if fact["reachable"] else f"not now: {fact['reason']}"
        show(f"{fact['device']:<{width}} {state}")
        if fact["reachable"]:
            for target, reason in fact["not_run"].items():
                show(f"{'':<{width}} not {target}: {reason}")


@devices_app.command()
def prepare(name: Annotated[str, typer.Argument(help="Name of a device, or the path of its .toml.")]) -> None:
    """Install on a device what measuring needs there; says what it installs and where. Nothing else ever does."""
    from edgekd.profiles import load_device
    from edgekd.protocols import Preparable

    device = load_device(name)
    if not isinstance(device, Preparable):
        raise UsageError(f"device {name} needs no preparing; edgekd devices says what it runs")
    try:
        device.prepare(progress_bar())
    finally:
        device.close()
    show(f"{name} is ready")
