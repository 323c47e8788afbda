"""Views: one sample, augmented from a seed, so that the student sees exactly what the teacher saw.

Every random number of a view comes from one generator seeded by (run seed, sample id, view number) and nothing else
(the idea of TinyViT, Wu et al. 2022, arXiv:2207.10666). The position in a batch or an epoch plays no part.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from edgekd.data import Split
from edgekd.errors import DataError
from edgekd.protocols import Augmentation

__all__ = ["augmentation_fingerprint", "view_batch", "view_seeds"]

PROBES = 16


def view_seeds(ids: np.ndarray, views: np.ndarray, seed: int) -> np.ndarray:
    """Seed of each (sample id, view): uint32, (records,)."""
    key = seed.to_bytes(8, "little", signed=True)
    pairs = np.stack([ids.astype(np.uint64), views.astype(np.uint64)], axis=1)
    digests = (hashlib.blake2b(pair.tobytes(), digest_size=4, key=key).digest() for pair in pairs)
    return np.frombuffer(b"".join(digests), "<u4").copy()


def view_batch(
    split: Split, positions: np.ndarray, seeds: np.ndarray, augment: Augmentation | None
) -> tuple[Tensor, ...]:
    """The inputs of some views, in the order of the model's ``forward``.

    Args:
        split: Where the samples are.
        positions: Of the samples in it, (records,).
        seeds: Of the views, (records,); unused without an augmentation.
        augment: From one sample (no batch axis) and a generator to one view.

    Raises:
        DataError: The augmentation loses or renames an input.
    """
    columns = {name: torch.from_numpy(array) for name, array in split.arrays(positions).items()}
    if augment is None:
        return tuple(columns.values())
    generator = torch.Generator()
    views: dict[str, list[Tensor]] = {name: [] for name in columns}
    for row, seed in enumerate(seeds.tolist()):
        generator.manual_seed(seed)
        view = augment({name: column[row] for name, column in columns.items()}, generator)
        if set(view) != set(columns):
            raise DataError(f"the augmentation returned {', '.join(view)}; the inputs are {', '.join(columns)}")
        for name in columns:
            views[name].append(view[name])
    return tuple(torch.stack(rows) for rows in views.values())


def augmentation_fingerprint(split: Split, augment: Augmentation) -> str:
    """Sixteen hex digits of what an augmentation does: of its views of a few samples.

    Not of its source: a changed comment, or a student in the same file, must not cost the teacher's work again, and a
    changed function that it calls must.
    """
    positions = np.argsort(split.ids)[:PROBES]
    views = view_batch(split, positions, view_seeds(split.ids[positions], np.zeros(len(positions)), 0), augment)
    digest = hashlib.sha256()
    for view in views:
        digest.update(f"{tuple(view.shape)}{view.dtype}".encode() + view.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
