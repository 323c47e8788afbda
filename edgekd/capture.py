"""The teacher run over every view, once, into a :mod:`edgekd.teacher_cache`; and again over some, to compare.

A capture works in ``<folder>.part``: each shard is written whole, then listed. Killed at any moment, it goes on after
the last listed shard; the finished folder takes its place only when it is complete.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.data import Split
from edgekd.errors import ModelFileError
from edgekd.feature_records import layout_of, put_features
from edgekd.protocols import Progress
from edgekd.records import make_records
from edgekd.sources import Teacher
from edgekd.store import atomic_write, hash_path, read_json, write_json
from edgekd.targets import codec_of
from edgekd.teacher_cache import FORMAT, CaptureKey, TeacherCache, open_cache
from edgekd.types import Json
from edgekd.views import Views, view_batch, view_partners, view_seeds
from edgekd.windows import counted_positions, positions_of

__all__ = ["Verification", "capture", "verify_cache"]

RECORDS_PER_SHARD = 16_384
BATCH = 256


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
    folder: Path, split: Split, teacher: Teacher, key: CaptureKey, views: Views, progress: Progress
) -> TeacherCache:
    """Run the teacher over every (sample, view) that is not captured yet.

    Raises:
        NumericalError: The teacher gives NaN or infinity; the message names the sample.
        StorageError: The disk is full; finished shards stay.
    """
    part = folder.with_name(folder.name + ".part")
    positions = positions_of(split.labels)
    in_shard, in_batch = _at_once(RECORDS_PER_SHARD, positions), _at_once(BATCH, positions)
    manifest, codec = _resume(part, key, in_shard), codec_of(key.codec)
    samples, total = len(split), len(split) * key.views
    shards = manifest["shards"]
    done = min(len(shards) * in_shard, total)
    classes, layout = int(manifest.get("classes", 0)), manifest.get("features", {})
    progress.start(f"capture {folder.name}", total, done)
    while done < total:
        numbers = np.arange(done, min(done + in_shard, total))
        blocks = []
        for start in range(0, len(numbers), in_batch):
            rows, turns = np.divmod(numbers[start : start + in_batch], key.views)
            seeds = view_seeds(split.ids[rows], turns, key.seed)
            partners = view_partners(seeds, samples) if key.mix else None
            inputs = view_batch(split, rows, seeds, views, partners).inputs
            answer = teacher.outputs(dict(zip(split.inputs, (x.numpy() for x in inputs), strict=True)))
            classes, features = answer.logits.shape[-1], {name: answer.features[name] for name in key.features}
            layout = layout or layout_of(features)
            labels = split.labels[rows] if split.labels is not None and positions else None
            blocks.append(make_records(seeds, partners, answer.logits, labels, split.ids[rows], codec, layout))
            put_features(blocks[-1], features)
            progress.advance(len(rows))
        name = f"shard-{len(shards):05d}.bin"
        content = np.concatenate(blocks)
        atomic_write(part / name, content.tobytes())
        shards.append({"file": name, "records": len(content), "sha256": hashlib.sha256(content.tobytes()).hexdigest()})
        manifest |= {"classes": classes, "positions": positions, "features": layout}
        write_json(part / "manifest.json", manifest)
        done += len(numbers)
    progress.finish()
    atomic_write(part / "ids.bin", split.ids.astype("<u8").tobytes())
    manifest |= {
        "teacher": list(teacher.lineage),
        "samples": samples,
        "ids_sha256": hash_path(part / "ids.bin"),
        "complete": True,
    }
    write_json(part / "manifest.json", manifest)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    return open_cache(folder)


def verify_cache(
    cache: TeacherCache, split: Split, teacher: Teacher, views: Views, share: float = 0.001
) -> Verification:
    """Run the teacher again on a random share of the records (at least 64) and compare.

    The same kernels on the same machine differ by no more than the rounding to f16.
    """
    total = len(cache) * cache.views
    count = min(total, max(_at_once(64, cache.positions), int(total * share)))
    numbers = np.sort(np.random.default_rng(0).choice(total, count, replace=False))
    rows, turns = np.divmod(numbers, cache.views)
    places = cache.places(split)
    differs, errors, in_batch = [], [], _at_once(BATCH, cache.positions)
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
        shown = logits if counted is None else logits[counted]
        differs.append((top_class != stored.outputs.classes.top_class()).float())
        errors.append(stored.outputs.classes.errors(torch.from_numpy(shown - shown.max(axis=1, keepdims=True))).max())
    return Verification(count, float(torch.cat(differs).mean()), float(torch.stack(errors).max()))


def _resume(part: Path, key: CaptureKey, in_shard: int) -> Json:
    """The manifest of an interrupted capture of the same key, or a new one."""
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
            intact = []
            for entry in manifest["shards"]:
                if entry["records"] != in_shard or not (part / entry["file"]).is_file():
                    break
                if hash_path(part / entry["file"]) != entry["sha256"]:
                    break
                intact.append(entry)
            return {**manifest, "shards": intact, "complete": False}
    shutil.rmtree(part, ignore_errors=True)
    return fresh


def _at_once(records: int, positions: int) -> int:
    """How many windows make as many positions as there are records of samples with one label."""
    return max(1, records // max(1, positions))
