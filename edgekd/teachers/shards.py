"""One shard of a teacher cache: the teacher over a run of records, before anything is written.

A shard depends on its :class:`Part` and on nothing else, so whoever makes it, in whichever order and however often,
makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from edgekd.buffers import buffers_kept
from edgekd.data.split import Split
from edgekd.data.views import Views, view_batch, view_partners, view_seeds
from edgekd.data.windows import positions_of
from edgekd.teachers.feature_records import Layout, describe_features, layout_of, put_features
from edgekd.teachers.records import make_records
from edgekd.teachers.targets import codec_of
from edgekd.teachers.teacher_cache import CaptureKey
from edgekd.teaching import Teacher

__all__ = ["Maker", "Part", "Shard", "at_once", "make_shard"]

BATCH = 256


@dataclass(frozen=True)
class Part:
    """What a shard holds.

    Attributes:
        number: Of the shard.
        start, stop: Its records: (sample, view) number position · views + view.
    """

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """A part, made.

    Attributes:
        content: Its records, as they lie on the disk.
        classes: The teacher's.
        layout: Of the features in it.
        beside: Mean and largest of what the teacher says of itself, by name.
    """

    part: Part
    content: bytes
    classes: int
    layout: Layout
    beside: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


Maker: TypeAlias = Callable[[Sequence[Part]], Iterator[Shard]]
"""Who makes some shards: all of them, in any order."""


@buffers_kept()
def make_shard(
    part: Part, split: Split, teacher: Teacher, key: CaptureKey, views: Views, advance: Callable[[int], None]
) -> Shard:
    """Run the teacher over one part.

    Args:
        advance: Told the records of each batch that is done.

    Raises:
        NumericalError: The teacher gives NaN or infinity; the message names the sample.
        DataError: Its outputs do not fit the labels.
    """
    codec, positions = codec_of(key.codec), positions_of(split.labels)
    blocks: list[np.ndarray] = []
    classes = 0
    layout: Layout = {}
    for start in range(part.start, part.stop, at_once(BATCH, positions)):
        numbers = np.arange(start, min(start + at_once(BATCH, positions), part.stop))
        rows, turns = np.divmod(numbers, key.views)
        seeds = view_seeds(split.ids[rows], turns, key.seed)
        partners = view_partners(seeds, len(split)) if key.mix else None
        inputs = view_batch(split, rows, seeds, views, partners).inputs
        answer = teacher.outputs(dict(zip(split.inputs, (x.numpy() for x in inputs), strict=True)))
        classes, features = answer.logits.shape[-1], {name: answer.features[name] for name in key.features}
        layout = layout or layout_of(features)
        labels = split.labels[rows] if split.labels is not None and positions else None
        blocks.append(make_records(seeds, partners, answer.logits, labels, split.ids[rows], codec, layout))
        put_features(blocks[-1], features)
        advance(len(numbers))
    records = np.concatenate(blocks)
    return Shard(part, records.tobytes(), classes, layout, describe_features(records, teacher.beside))


def at_once(records: int, positions: int) -> int:
    """How many windows make as many positions as there are records of samples with one label."""
    return max(1, records // max(1, positions))
