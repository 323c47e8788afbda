"""TeacherCache: the teacher's outputs, paid once, replayed by every student; :mod:`edgekd.teachers.capture` makes one.

Format 3, a folder: ``manifest.json``, ``ids.bin`` (uint64 per sample) and shards of fixed-size records
(:mod:`edgekd.teachers.records`), memory-mapped; all shards but the last hold equally many. Record number = position ·
views + view, so a look-up is one offset, and a sample is decoded once for all its views.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.data.split import Split
from edgekd.errors import CacheError, ModelFileError
from edgekd.store import hash_path, read_json
from edgekd.teachers.feature_records import Layout, read_features
from edgekd.teachers.outputs import TeacherOutputs
from edgekd.teachers.records import record_type
from edgekd.teachers.targets import Codec, DenseTargets, VectorTargets, codec_of
from edgekd.types import Json

__all__ = ["FORMAT", "CaptureKey", "Replay", "TeacherCache", "open_cache"]

FORMAT = 3


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

    def vectors(self, ids: np.ndarray, view: int = 0) -> np.ndarray:
        """Embeddings of samples in one view, float32 (samples, width).

        Raises:
            CacheError: The cache holds classes.
        """
        targets = self.codec.decode(self._records(self.rows(ids), np.full(len(ids), view)))
        if not isinstance(targets, VectorTargets):
            raise CacheError(f"this cache is {self.codec.name} and holds no embeddings")
        return targets.vectors.numpy()

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
        shard, offset = np.divmod(numbers, len(self._shards[0]))
        records = np.empty(len(numbers), self._shards[0].dtype)
        for index in np.unique(shard):
            chosen = shard == index
            records[chosen] = self._shards[index][offset[chosen]]
        return records


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
        record = record_type(codec, manifest["classes"], positions, bool(manifest["key"]["mix"]), features)
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
