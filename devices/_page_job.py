"""A job as the page of a browser reads it: files, samples one after the other, and the order of the turns."""

from __future__ import annotations

import dataclasses
import random
import secrets
from collections.abc import Sequence

import numpy as np

from edgekd.errors import DataError
from edgekd.measurement import Plan
from edgekd.protocols import Side
from edgekd.types import Json

from . import _page

__all__ = ["made_job"]

ORDERS = 64  # of the rounds of turns, which a page goes through again and again


def made_job(sides: Sequence[Side], plan: Plan, accelerator: str, wants_outputs: bool, seed: int) -> _page.Job:
    """The job as the page reads it. It goes through the orders of the rounds again and again."""
    drawn, each, given = random.Random(seed), range(len(sides)), [_side(side, wants_outputs) for side in sides]
    told: Json = {
        "id": secrets.token_hex(8),
        "accelerator": accelerator,
        "sides": [told for told, _ in given],
        "orders": [drawn.sample(each, len(each)) for _ in range(ORDERS)],
        "wants_outputs": wants_outputs,
        "plan": dataclasses.asdict(plan),
        "versions": _page.versions(),
    }
    models = tuple((side.folder / side.artifact.path).read_bytes() for side in sides)
    return _page.Job(told, models, tuple(samples for _, samples in given))


def _side(side: Side, wants_outputs: bool) -> tuple[Json, bytes]:
    """One side as the page reads it, and its samples: one batch after the other, each with all inputs."""
    artifact = side.artifact
    batch = max(1, artifact.inputs[0].shape[0])
    arrays, specs = [], []
    for spec in artifact.inputs:
        array = side.inputs[spec.name]
        if np.issubdtype(array.dtype, np.floating) != np.issubdtype(np.dtype(spec.dtype), np.floating):
            raise DataError(f"input {spec.name!r} takes {spec.dtype}; it got {array.dtype}")
        arrays.append(np.ascontiguousarray(array, dtype=spec.dtype))
        specs.append({"name": spec.name, "dtype": spec.dtype, "shape": [batch, *array.shape[1:]]})
    count = len(arrays[0]) if wants_outputs else batch
    if count == 0 or count % batch:
        raise DataError(f"{artifact.path} takes {batch} samples at a time; there are {count}")
    parts = [array[begin : begin + batch].tobytes() for begin in range(0, count, batch) for array in arrays]
    told: Json = {
        "target": artifact.target,
        "inputs": specs,
        "outputs": [{"name": spec.name} for spec in artifact.outputs],
        "batches": count // batch,
        "bytes_per_batch": sum(len(part) for part in parts[: len(arrays)]),
    }
    return told, b"".join(parts)
