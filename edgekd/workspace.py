"""One recipe with everything that its stages share, loaded when first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edgekd.recipe import Recipe
from edgekd.store import RunFolder

if TYPE_CHECKING:
    from edgekd.capture import CaptureKey, TeacherCache
    from edgekd.data import Split, Splits
    from edgekd.protocols import Augmentation
    from edgekd.sources import Teacher

__all__ = ["SPLITS", "Workspace"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Workspace:
    """A recipe at work.

    Attributes:
        recipe: As checked.
    """

    recipe: Recipe

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.run_folder)

    @cached_property
    def splits(self) -> Splits:
        from edgekd.data import load_splits

        return load_splits(self.recipe)

    @cached_property
    def teacher(self) -> Teacher:
        import numpy as np

        from edgekd.sources import load_teacher

        example = self.splits.validation.arrays(np.arange(1))
        return load_teacher(self.recipe.teacher.model, self.recipe.folder, example)

    @cached_property
    def augment(self) -> Augmentation | None:
        from edgekd.plugins import load_function

        reference = self.recipe.data.augment
        augment: Augmentation | None = None if reference is None else load_function(reference, self.recipe.folder)
        return augment

    def split(self, name: str) -> Split:
        split: Split = getattr(self.splits, name)
        return split

    def augment_for(self, split: str) -> Augmentation | None:
        """Only training samples are augmented."""
        return self.augment if split == "train" else None

    def capture_key(self, split: str) -> CaptureKey:
        """What the cache of a split depends on."""
        from edgekd.capture import CaptureKey
        from edgekd.targets import PLAIN_CODEC
        from edgekd.views import augmentation_fingerprint

        train = split == "train"
        return CaptureKey(
            teacher=self.teacher.fingerprint,
            data=self.split(split).fingerprint,
            augmentation=augmentation_fingerprint(self.splits.train, self.augment) if train and self.augment else "",
            views=self.recipe.data.views if train else 1,
            seed=self.recipe.distill.seeds[0],
            codec=self.recipe.codec(len(self.splits.labels)) if train else PLAIN_CODEC,
        )

    def cache(self, split: str) -> TeacherCache:
        """The finished cache of a split.

        Raises:
            CacheError: It is missing, damaged or of other data; the message has the command that makes it.
        """
        from edgekd.capture import open_cache

        return open_cache(self.folder.cache(split), self.capture_key(split))
