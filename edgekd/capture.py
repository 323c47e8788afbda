"""TeacherCache: the teacher's outputs, paid once, replayed by every student.

Format 3, a folder: ``manifest.json``, ``ids.bin`` (uint64 per sample) and shards of fixed-size records, memory-mapped.
Record number = position · views + view, so a look-up is one offset, and a sample is decoded once for all its views. A
record is the view's seed (u32), the position of the sample that was mixed in (u32, where samples are mixed), and what
:mod:`edgekd.targets` makes of the logits less their largest (shifting changes no softmax); that of a window of tokens
has such a part for each of its positions (:mod:`edgekd.windows`).

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
from edgekd.errors import CacheError, DataError, ModelFileError, NumericalError
from edgekd.feature_records import Layout, feature_fields, layout_of, put_features, read_features
from edgekd.outputs import TeacherOutputs
from edgekd.protocols import Progress
from edgekd.sources import Teacher
from edgekd.store import atomic_write, hash_path, read_json, write_json
from edgekd.targets import Codec, DenseTargets, codec_of
from edgekd.types import Json
from edgekd.views import Views, view_batch, view_partners, view_seeds
from edgekd.windows import counted_positions, encode_windows, positions_of, window_type

__all__ = [
    "CaptureKey",
    "Replay",
    "TeacherCache",
    "Verification",
    "capture",
    "open_cache",
    "record_bytes",
    "verify_cache",
]

FORMAT = 3
RECORDS_PER_SHARD = 16_384
BATCH = 256


@dataclass(frozen=True)
class CaptureKey:
    """What a cache depends on; another key means another cache.

    Attributes:
        teacher: Fingerprint of its weights.
        data: Fingerprint of the split.
        augmentation: Fingerprint of its views; empty for none.
        views: Augmented views of each sample.
        seed: Of all views.
        codec: How records are stored: ``dense-f16``, ``dense-u8``, ``top10`` …
        mix: Fingerprint of what mixes two samples; empty for nothing.
        features: Names of what is kept beside the logits.
    """

    teacher: str
    data: str
    augmentation: str
    views: int
    seed: int
    codec: str = "dense-f16"
    mix: str = ""
    features: tuple[str, ...] = ()

    def to_json(self) -> Json:
        return {name: list(value) if name == "features" else value for name, value in vars(self).items() if value != ()}


@dataclass(frozen=True)
class Replay:
    """What makes some views again, and what the teacher said of them.

    Attributes:
        seeds: uint32, (records,).
        partners: Rows of the samples that were mixed in, int64 (records,); None without mixing.
    """

    seeds: np.ndarray
    partners: np.ndarray | None
    outputs: TeacherOutputs


@dataclass(frozen=True)
class TeacherCache:
    """An open cache.

    Attributes:
        ids: Sample ids in the order of the records, uint64 (samples,).
        views, classes: As captured.
        manifest: As on disk.
        positions: Of a window; 0 where a sample has one label.
        features: Layout of what is kept beside the logits.
    """

    ids: np.ndarray
    views: int
    classes: int
    codec: Codec
    manifest: Json
    positions: int
    features: Layout
    _shards: tuple[np.ndarray, ...]
    _order: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Row of each sample id.

        Raises:
            CacheError: An id was never captured.
        """
        if len(self.ids) == 0:
            raise CacheError("the cache is empty; run: edgekd capture")
        found = np.searchsorted(self.ids, ids, sorter=self._order)
        rows = self._order[np.minimum(found, len(self.ids) - 1)]
        missing = np.flatnonzero(self.ids[rows] != ids)
        if len(missing):
            raise CacheError(
                f"{len(missing)} samples are not in the cache, first id {ids[missing[0]]}; run: edgekd capture"
            )
        return rows

    def places(self, split: Split) -> np.ndarray:
        """Where each row's sample is in a split, int64 (samples,).

        Raises:
            CacheError: A sample is not in the split any more.
        """
        order = np.argsort(split.ids, kind="stable")
        places = order[np.minimum(np.searchsorted(split.ids, self.ids, sorter=order), len(order) - 1)]
        missing = np.flatnonzero(split.ids[places] != self.ids)
        if len(missing):
            raise CacheError(
                f"sample {self.ids[missing[0]]} of the cache is not in the data any more; run: edgekd capture"
            )
        return places

    def read(self, rows: np.ndarray, views: np.ndarray, counted: np.ndarray | None = None) -> Replay:
        """What is stored of these views.

        Args:
            counted: Of windows, which positions are wanted, bool (records, positions); the targets are those of all
                wanted positions in a row.
        """
        records = self._records(rows, views)
        partners = records["partner"].astype(np.int64) if "partner" in (records.dtype.names or ()) else None
        classes = self.codec.decode(records if counted is None else records["positions"][counted])
        return Replay(records["seed"].copy(), partners, TeacherOutputs(classes, read_features(records, self.features)))

    def label_log_probabilities(self, rows: np.ndarray, views: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """What the teacher gave the next tokens of windows: float32, one for each counted position."""
        found: np.ndarray = self._records(rows, views)["positions"]["label"][counted].astype(np.float32)
        return found

    def logits(self, ids: np.ndarray, view: int = 0) -> np.ndarray:
        """Logits of samples in one view, less their largest, float32 (samples, classes).

        Raises:
            CacheError: The cache does not hold all classes, or holds windows.
        """
        if self.positions:
            raise CacheError("this cache holds windows of tokens; the logits of all their positions would not fit")
        targets = self.codec.decode(self._records(self.rows(ids), np.full(len(ids), view)))
        if not isinstance(targets, DenseTargets):
            raise CacheError(f"this cache is {self.codec.name} and does not hold the logits of all classes")
        return targets.logits.numpy()

    def feature(self, ids: np.ndarray, name: str, view: int = 0) -> np.ndarray:
        """A feature of samples in one view, samples first.

        Raises:
            CacheError: It was not captured.
        """
        if name not in self.features:
            kept = ", ".join(self.features) or "none"
            raise CacheError(f"this cache has no feature {name!r}; it has {kept}; run: edgekd capture")
        records = self._records(self.rows(ids), np.full(len(ids), view))
        return read_features(records, {name: self.features[name]})[name].numpy()

    def top_class(self, ids: np.ndarray, view: int = 0) -> np.ndarray:
        """The teacher's top class of samples in one view, int64 (samples,); every codec knows it."""
        return self.codec.decode(self._records(self.rows(ids), np.full(len(ids), view))).top_class().numpy()

    def _records(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        numbers = rows * self.views + views.astype(np.int64)
        shard, offset = np.divmod(numbers, _at_once(RECORDS_PER_SHARD, self.positions))
        records = np.empty(len(numbers), self._shards[0].dtype)
        for index in np.unique(shard):
            chosen = shard == index
            records[chosen] = self._shards[index][offset[chosen]]
        return records


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
            blocks.append(_records(seeds, partners, answer.logits, labels, split.ids[rows], codec, layout))
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


def open_cache(folder: Path, key: CaptureKey | None = None) -> TeacherCache:
    """Open a finished cache and check every shard's hash.

    Raises:
        CacheError: It is missing, incomplete, damaged, or was captured for another key.
    """
    if not (folder / "manifest.json").is_file():
        raise CacheError(f"no teacher cache at {folder}; run: edgekd capture")
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["format"] != FORMAT:
            raise CacheError(
                f"{folder} has cache format {manifest['format']}; this version reads {FORMAT}; run: edgekd capture"
            )
        if key is not None and manifest["key"] != key.to_json():
            changed = [name for name, value in key.to_json().items() if manifest["key"].get(name) != value]
            raise CacheError(f"{folder} was captured with another {', '.join(changed)}; run: edgekd capture")
        codec, positions = codec_of(manifest["key"]["codec"]), int(manifest.get("positions", 0))
        features: Layout = manifest.get("features", {})
        record = _record_type(codec, manifest["classes"], positions, bool(manifest["key"]["mix"]), features)
        ids = np.fromfile(folder / "ids.bin", "<u8")
        if hash_path(folder / "ids.bin") != manifest["ids_sha256"]:
            raise CacheError(f"{folder / 'ids.bin'} is damaged; remove {folder} and run: edgekd capture")
        shards = []
        for entry in manifest["shards"]:
            path = folder / entry["file"]
            if not path.is_file() or hash_path(path) != entry["sha256"]:
                raise CacheError(f"{path} is damaged or missing; remove {folder} and run: edgekd capture")
            shards.append(np.memmap(path, record, mode="r"))
        views = int(manifest["key"]["views"])
    except (KeyError, TypeError, ValueError, ModelFileError) as error:
        raise CacheError(
            f"{folder / 'manifest.json'} is damaged ({error}); remove {folder} and run: edgekd capture"
        ) from None
    order = np.argsort(ids, kind="stable")
    return TeacherCache(ids, views, manifest["classes"], codec, manifest, positions, features, tuple(shards), order)


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
        again = _records(stored.seeds, partners, logits, labels, cache.ids[rows[chosen]], cache.codec, {})
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


def record_bytes(
    codec: Codec, classes: int, positions: int = 0, mixed: bool = False, features: Layout | None = None
) -> int:
    """Of one view on disk, with its seed, its partner where samples are mixed, and what is kept beside the logits."""
    return _record_type(codec, classes, positions, mixed, features or {}).itemsize


def _record_type(codec: Codec, classes: int, positions: int, mixed: bool, features: Layout) -> np.dtype[np.void]:
    head = [("seed", "<u4"), *([("partner", "<u4")] if mixed else [])]
    beside = feature_fields(features)
    if positions:
        return np.dtype([*head, ("positions", window_type(codec, classes, positions)), *beside])
    return np.dtype([*head, *codec.fields(classes), *beside])


def _records(
    seeds: np.ndarray,
    partners: np.ndarray | None,
    logits: np.ndarray,
    labels: np.ndarray | None,
    ids: np.ndarray,
    codec: Codec,
    features: Layout,
) -> np.ndarray:
    """Records of some views, their features still to be put; labels are those of windows, None where a sample has one
    label.
    """
    if logits.ndim != (2 if labels is None else 3):
        wanted = "(samples, classes)" if labels is None else "(windows, positions, vocabulary)"
        raise DataError(f"the teacher gives {logits.shape}, and the labels are those of {wanted}")
    finite = np.isfinite(logits).all(axis=-1)
    if labels is not None:
        finite = (finite | ~counted_positions(labels)).all(axis=1)
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise NumericalError(f"the teacher gives NaN or infinity for {len(bad)} samples, first id {ids[bad[0]]}")
    positions = 0 if labels is None else labels.shape[1]
    records = np.empty(len(seeds), _record_type(codec, logits.shape[-1], positions, partners is not None, features))
    records["seed"] = seeds
    if partners is not None:
        records["partner"] = partners
    if labels is None:
        codec.encode(logits - logits.max(axis=1, keepdims=True), records)
    else:
        records["positions"] = encode_windows(seeds, logits, labels, codec)
    return records
