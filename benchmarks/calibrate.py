"""What a device can tell apart: a file against itself, and what the noise alone does to the ratio."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from edgekd.errors import DeviceError, InconclusiveError, UsageError
from edgekd.measurement import Plan
from edgekd.protocols import Device, Progress, Side
from edgekd.store import read_json, state_folder, write_json
from edgekd.types import Artifact

from .cells import Pair, Resolution, Samples, log_ratios_of
from .gate import GATE_PLAN, Sitting
from .rule import Rule
from .session import inputs_of, plan_for, where_of, why_not_run
from .stats import ratio_of_logs

__all__ = ["FEWEST_PAIRS", "calibrate", "load_resolution", "resolution_of", "resolution_path", "save_resolution"]

FEWEST_PAIRS = 20
RESAMPLES = 1000
PASSING = 0.95
"""Share of comparisons in which an unchanged file must pass at the last look."""


def calibrate(
    label: str,
    artifact: Artifact,
    folder: Path,
    device_name: str,
    device: Device,
    samples: Samples,
    *,
    pairs: int = 30,
    rule: Rule | None = None,
    plan: Plan = GATE_PLAN,
    seed: int = 0,
    progress: Progress | None = None,
) -> Resolution:
    """Measure a file against itself.

    Raises:
        UsageError: Fewer than 20 pairs, or the device does not run the file.
        DeviceError: The device cannot be reached.
        InconclusiveError: It broke off, or too many blocks were void.
    """
    if pairs < FEWEST_PAIRS:
        raise UsageError(f"a calibration needs at least {FEWEST_PAIRS} pairs; {pairs} were asked for")
    status = device.probe()
    if not status.reachable:
        raise DeviceError(f"{device_name}: {status.reason}")
    where = where_of(device_name, status.facts)
    if why := why_not_run(artifact, where, status):
        raise UsageError(why)
    rule, plan = rule or Rule(), plan_for(plan, [artifact], samples.inputs)
    side = Side(artifact, folder, inputs_of(artifact, samples.inputs))
    sitting = Sitting(
        Pair(label, artifact, folder, artifact, folder), (side, side), device, plan, random.Random(seed), rule.looks[0]
    )
    if progress:
        progress.start(f"calibrating {where}", total=pairs)
    try:
        for _ in range(pairs):
            sitting.measure()
            if progress:
                progress.advance()
    finally:
        device.close()
        if progress:
            progress.finish()
    if sitting.broken:
        raise InconclusiveError(f"{len(sitting.blocks)} of {pairs} pairs were measured: {sitting.broken}")
    smallest = {m: resolution_of(log_ratios_of(sitting.blocks, m), rule, seed) for m in sitting.timed()}
    medians = {metric: sitting.old_median(metric) for metric in smallest}
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    return Resolution(where, label, smallest, medians, pairs, seed, created)


def resolution_of(logs: Sequence[float] | np.ndarray, rule: Rule, seed: int = 0) -> float:
    """Smallest margin at which an unchanged file passes in 95 % of comparisons, as a share.

    Pairs are drawn again from those of a file with itself, each in either direction, as many as at the last look; the
    margin must lie above the upper end of the interval.

    Args:
        logs: Logarithms of the ratios of a file with itself, (pairs,).
    """
    chance = np.random.default_rng(seed)
    values, count = np.asarray(logs, float), rule.looks[-1]
    ends = []
    for _ in range(RESAMPLES):
        drawn = chance.choice(values, count) * chance.choice((-1.0, 1.0), count)
        ends.append(ratio_of_logs(drawn, rule.confidence).high or np.inf)
    return float(np.quantile(ends, PASSING)) - 1


def resolution_path(device_name: str) -> Path:
    """Where a device's calibration is kept."""
    return state_folder() / "calibrations" / f"{Path(device_name).stem}.json"


def save_resolution(resolution: Resolution, path: Path) -> None:
    write_json(path, resolution.to_json())


def load_resolution(path: Path) -> Resolution | None:
    """None when the device has not been calibrated.

    Raises:
        ModelFileError: The file is damaged, or of another version.
    """
    return Resolution.from_json(read_json(path)) if path.is_file() else None
