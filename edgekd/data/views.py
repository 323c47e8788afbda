"""Views: one sample, augmented from a seed, so that the student sees exactly what the teacher saw.

Every random number of a view comes from one generator seeded by (run seed, sample id, view number) and nothing else
(the idea of TinyViT, Wu et al. 2022, arXiv:2207.10666). The position in a batch or an epoch plays no part. Which other
sample is mixed into a view is drawn from its seed too, and stored (as Faghri et al. 2023, arXiv:2303.08983, do).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor

from edgekd.data.split import Split
from edgekd.errors import DataError
from edgekd.protocols import Augmentation, Mixing

__all__ = ["ViewBatch", "Views", "split_mix", "view_batch", "view_partners", "view_seeds"]

PROBES = 16


@dataclass(frozen=True)
class Views:
    """How views are made; without anything, they are the samples themselves.

    Attributes:
        augment: From one sample (no batch axis) and a generator to one view.
        mix: From two of these to one.
        alpha: What ``mix`` is told.
    """

    augment: Augmentation | None = None
    mix: Mixing | None = None
    alpha: float = 1.0

    def augmentation_fingerprint(self, split: Split) -> str:
        """Sixteen hex digits of what the augmentation does: of its views of a few samples; empty without one.

        Not of its source: a changed comment, or a student in the same file, must not cost the teacher's work again,
        and a changed function that it calls must.
        """
        return "" if self.augment is None else _probed(split, replace(self, mix=None))

    def mix_fingerprint(self, split: Split) -> str:
        """The same of the mixing, with its shares; empty without one."""
        return "" if self.mix is None else _probed(split, replace(self, augment=None))


@dataclass(frozen=True)
class ViewBatch:
    """Some views.

    Attributes:
        inputs: In the order of the model's ``forward``, each (records, …).
        shares: How much of each is the sample's own, float32 (records,); None without mixing.
    """

    inputs: tuple[Tensor, ...]
    shares: Tensor | None = None


def view_seeds(ids: np.ndarray, views: np.ndarray, seed: int) -> np.ndarray:
    """Seed of each (sample id, view): uint32, (records,)."""
    key = seed.to_bytes(8, "little", signed=True)
    pairs = np.stack([ids.astype(np.uint64), views.astype(np.uint64)], axis=1)
    digests = (hashlib.blake2b(pair.tobytes(), digest_size=4, key=key).digest() for pair in pairs)
    return np.frombuffer(b"".join(digests), "<u4").copy()


def view_partners(seeds: np.ndarray, samples: int) -> np.ndarray:
    """Position of the sample that is mixed into each view, itself not excluded: uint32, (records,).

    A hash of the view's seed, so that it does not go with the other random numbers of the view.
    """
    return (split_mix(seeds) % np.uint64(samples)).astype(np.uint32)


def split_mix(numbers: np.ndarray) -> np.ndarray:
    """A hash of each, uint64 (SplitMix64, Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    state = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = state ^ (state >> np.uint64(31))
    return mixed


def view_batch(
    split: Split, positions: np.ndarray, seeds: np.ndarray, views: Views, partners: np.ndarray | None = None
) -> ViewBatch:
    """Some views.

    Args:
        split: Where the samples are.
        positions: Of the samples in it, (records,).
        seeds: Of the views, (records,); unused when nothing is random.
        partners: Positions of what is mixed in, (records,); needed when ``views`` mixes.

    Raises:
        DataError: The augmentation or the mixing loses or renames an input, or cannot take one.
    """
    count, mix = len(positions), views.mix
    if mix is not None:
        assert partners is not None
        positions = np.concatenate([positions, partners.astype(np.int64)])  # at once: a file is decoded once
    columns = {name: torch.from_numpy(array) for name, array in split.arrays(positions).items()}
    if views.augment is None and mix is None:
        return ViewBatch(tuple(columns.values()))
    generator = Generator()
    made: dict[str, list[Tensor]] = {name: [] for name in columns}
    shares = []
    for row, seed in enumerate(seeds.tolist()):
        generator.manual_seed(seed)
        view = _augmented(columns, row, views.augment, generator)
        if mix is not None:
            view, share = mix(view, _augmented(columns, count + row, views.augment, generator), generator, views.alpha)
            _check_inputs("mixing", view, columns)
            shares.append(share)
        for name in columns:
            made[name].append(view[name])
    inputs = tuple(torch.stack(rows) for rows in made.values())
    return ViewBatch(inputs, None if mix is None else torch.tensor(shares, dtype=torch.float32))


def _augmented(
    columns: Mapping[str, Tensor], row: int, augment: Augmentation | None, generator: Generator
) -> Mapping[str, Tensor]:
    sample = {name: column[row] for name, column in columns.items()}
    if augment is None:
        return sample
    view = augment(sample, generator)
    _check_inputs("augmentation", view, columns)
    return view


def _check_inputs(who: str, view: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
    if view.keys() != columns.keys():
        raise DataError(f"the {who} returned {', '.join(view)}; the inputs are {', '.join(columns)}")


def _probed(split: Split, views: Views) -> str:
    """Sixteen hex digits of the views of a few samples."""
    positions = np.argsort(split.ids)[:PROBES]
    seeds = view_seeds(split.ids[positions], np.zeros(len(positions)), 0)
    batch = view_batch(split, positions, seeds, views, positions[view_partners(seeds, len(positions))])
    digest = hashlib.sha256()
    for view in (*batch.inputs, *([] if batch.shares is None else [batch.shares])):
        digest.update(f"{tuple(view.shape)}{view.dtype}".encode() + view.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
