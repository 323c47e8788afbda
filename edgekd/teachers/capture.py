"""The teacher run over every view, once, into a :mod:`edgekd.teachers.teacher_cache`; and again over some, to compare.

A capture works in ``<folder>.part``: each shard is written whole, then listed, by this process alone and in whichever
order shards are made. Killed at any moment, it goes on with those that are not listed; a shard that is made twice is
one file. The finished folder takes its place only when it is complete.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.data.split import Split
from edgekd.data.views import Views, view_batch
from edgekd.data.windows import counted_positions, positions_of
from edgekd.errors import CacheError, DataError, ModelFileError
from edgekd.protocols import Progress
from edgekd.store import atomic_write, hash_path, read_json, write_json
from edgekd.teachers.records import make_records
from edgekd.teachers.shards import BATCH, Maker, Part, Shard, at_once, make_shard
from edgekd.teachers.targets import shown
from edgekd.teachers.teacher_cache import FORMAT, CaptureKey, TeacherCache, open_cache
from edgekd.teaching import Teacher
from edgekd.types import Json

__all__ = ["Verification", "capture", "verify_cache", "whole_cache"]

RECORDS_PER_SHARD = 16_384
LARGE_PER_SHARD = 1_024
"""Of records that hold features, or every logit of a token: a shard is in memory three times over while it is made."""


@dataclass(frozen=True)
class Verification:
    """Teacher run again against its cache.

    Attributes:
        records: How many were compared.
        top1_differs: Share whose top class differs.
        max_relative: Largest difference of a shifted logit, as a share of its size (at least 1); the rounding to f16
            explains 0.0005, that to 256 steps is taken off.
    """

    records: int
    top1_differs: float
    max_relative: float


def capture(
    folder: Path,
    split: Split,
    teacher: Teacher,
    key: CaptureKey,
    views: Views,
    progress: Progress,
    maker: Maker | None = None,
) -> TeacherCache:
    """Run the teacher over every (sample, view) that is not captured yet.

    Args:
        maker: Who runs it, in place of this process; the teacher here then only says what it is.

    Raises:
        NumericalError: The teacher gives NaN or infinity; the message names the sample.
        DataError: Its outputs do not fit the labels, or are not alike everywhere.
        StorageError: The disk is full; finished shards stay.
    """

    def here(missing: Sequence[Part]) -> Iterator[Shard]:
        return (make_shard(one, split, teacher, key, views, progress.advance) for one in missing)

    part = folder.with_name(folder.name + ".part")
    positions = positions_of(split.labels)
    large = bool(key.features) or (positions > 0 and key.codec.startswith("dense"))
    usual = min(LARGE_PER_SHARD, RECORDS_PER_SHARD) if large else RECORDS_PER_SHARD
    parts = _parts(len(split) * key.views, at_once(teacher.per_shard or usual, positions))
    manifest, written = _resume(part, key, parts)
    progress.start(f"capture {folder.name}", len(split) * key.views, sum(len(parts[number]) for number in written))
    for shard in (maker or here)([one for one in parts if one.number not in written]):
        found = {
            "classes": shard.classes,
            "positions": positions,
            "features": {name: [dtype, list(shape)] for name, (dtype, shape) in shard.layout.items()},
        }
        if written and found != (before := {name: manifest[name] for name in found}):
            raise DataError(f"the teacher gives {found} for some samples, and gave {before} for those before")
        number, digest = shard.part.number, hashlib.sha256(shard.content).hexdigest()
        atomic_write(part / _file_name(number), shard.content)
        told = {"beside": shard.beside} if shard.beside else {}
        written[number] = {"file": _file_name(number), "records": len(shard.part), "sha256": digest, **told}
        manifest |= {"shards": [written[done] for done in sorted(written)], **found}
        write_json(part / "manifest.json", manifest)
        if maker is not None:
            progress.advance(len(shard.part))
    progress.finish()
    if missing := [one.number for one in parts if one.number not in written]:
        raise CacheError(f"{len(missing)} of {len(parts)} shards were not made; edgekd capture goes on from the others")
    atomic_write(part / "ids.bin", split.ids.astype("<u8").tobytes())
    manifest |= {
        "teacher": list(teacher.lineage),
        "samples": len(split),
        "ids_sha256": hash_path(part / "ids.bin"),
        "complete": True,
        **({"beside": _over_shards(manifest["shards"], teacher.beside)} if teacher.beside else {}),
    }
    write_json(part / "manifest.json", manifest)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    return open_cache(folder)


def whole_cache(folder: Path, key: CaptureKey) -> TeacherCache | None:
    """The cache, if all of it is there, undamaged."""
    try:
        return open_cache(folder, key)
    except CacheError:
        return None


def verify_cache(
    cache: TeacherCache, split: Split, teacher: Teacher, views: Views, share: float = 0.001, fewest: int = 64
) -> Verification:
    """Run the teacher again on a random share of the records (``fewest`` at least) and compare.

    The same kernels on the same machine differ by no more than the rounding to f16.
    """
    total = len(cache) * cache.views
    count = min(total, max(at_once(fewest, cache.positions), int(total * share)))
    numbers = np.sort(np.random.default_rng(0).choice(total, count, replace=False))
    rows, turns = np.divmod(numbers, cache.views)
    places = cache.places(split)
    differs, errors, in_batch = [], [], at_once(BATCH, cache.positions)
    for start in range(0, count, in_batch):
        chosen = slice(start, start + in_batch)
        where = places[rows[chosen]]
        labels = split.labels[where] if split.labels is not None and cache.positions else None
        counted = None if labels is None else counted_positions(labels)
        stored = cache.read(rows[chosen], turns[chosen], counted)
        partners = None if stored.partners is None else places[stored.partners]
        inputs = view_batch(split, where, stored.seeds, views, partners).inputs
        logits = teacher.logits(dict(zip(split.inputs, (x.numpy() for x in inputs), strict=True)))
        again = make_records(stored.seeds, partners, logits, labels, cache.ids[rows[chosen]], cache.codec, {})
        top_class = cache.codec.decode(again if counted is None else again["positions"][counted]).top_class()
        again_shown = shown(logits if counted is None else logits[counted], cache.codec)
        differs.append((top_class != stored.outputs.classes.top_class()).float())
        errors.append(stored.outputs.classes.errors(torch.from_numpy(again_shown)).max())
    return Verification(count, float(torch.cat(differs).mean()), float(torch.stack(errors).max()))


def _parts(records: int, in_shard: int) -> list[Part]:
    """All shards of a cache; the last may be smaller."""
    starts = range(0, records, in_shard)
    return [Part(number, start, min(start + in_shard, records)) for number, start in enumerate(starts)]


def _file_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _resume(part: Path, key: CaptureKey, parts: Sequence[Part]) -> tuple[Json, dict[int, Json]]:
    """The manifest of an interrupted capture of the same key and its whole shards by number, or a new one."""
    fresh: dict[str, Any] = {
        "format": FORMAT,
        "key": key.to_json(),
        "shards": [],
        "complete": False,
    }
    path = part / "manifest.json"
    if path.is_file():
        try:
            manifest = read_json(path)
        except ModelFileError:
            manifest = {}
        if manifest.get("key") == fresh["key"] and manifest.get("format") == FORMAT:
            by_name = {entry["file"]: entry for entry in manifest["shards"]}
            whole = {one.number: by_name[name] for one in parts if (name := _file_name(one.number)) in by_name}
            intact = {
                number: entry
                for number, entry in whole.items()
                if entry["records"] == len(parts[number])
                and (part / entry["file"]).is_file()
                and hash_path(part / entry["file"]) == entry["sha256"]
            }
            return {**manifest, "complete": False}, intact
    shutil.rmtree(part, ignore_errors=True)
    return fresh, {}


def _over_shards(shards: list[Json], names: Sequence[str]) -> Json:
    """Mean and largest of what the teacher says of itself, over all records."""
    total = sum(shard["records"] for shard in shards)
    return {
        name: {
            "mean": sum(shard["beside"][name]["mean"] * shard["records"] for shard in shards) / total,
            "largest": max(shard["beside"][name]["largest"] for shard in shards),
        }
        for name in names
    }
