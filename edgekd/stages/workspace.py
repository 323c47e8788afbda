"""One recipe with everything that its stages share, loaded when first asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edgekd.errors import UsageError
from edgekd.recipes.recipe import VECTOR_CODEC, Recipe
from edgekd.store import RunFolder

if TYPE_CHECKING:
    from edgekd.data.samples import Splits
    from edgekd.data.split import Split
    from edgekd.data.views import Views
    from edgekd.teachers.teacher_cache import CaptureKey, TeacherCache
    from edgekd.teaching import Teacher

__all__ = ["SPLITS", "Workspace"]

SPLITS = ("train", "validation", "test")

EXAMPLE = 4
"""Samples by which a teacher's preprocessing is known."""


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
        from edgekd.data.samples import load_splits

        return load_splits(self.recipe)

    @cached_property
    def teacher(self) -> Teacher:
        import numpy as np

        from edgekd.teachers.ensemble import teacher_of

        validation = self.splits.validation
        return teacher_of(self.recipe, validation.arrays(np.argsort(validation.ids)[:EXAMPLE]))

    @cached_property
    def _training_views(self) -> Views:
        from edgekd.data.mixing import MIXINGS
        from edgekd.data.views import Views
        from edgekd.plugins import load_function

        data, folder = self.recipe.data, self.recipe.folder
        augment = None if data.augment is None else load_function(data.augment, folder)
        mix = None if data.mix is None else MIXINGS.get(data.mix) or load_function(data.mix, folder)
        return Views(augment, mix, data.mix_alpha)

    def split(self, name: str) -> Split:
        split: Split = getattr(self.splits, name)
        return split

    def views_of(self, split: str) -> Views:
        """Only training samples are augmented or mixed."""
        from edgekd.data.views import Views

        return self._training_views if split == "train" else Views()

    @cached_property
    def classes(self) -> int:
        """How many; the teacher tells of a language model its vocabulary, of an embedding its width."""
        import numpy as np

        if self.splits.labels and not self.recipe.teacher.embeds:
            return len(self.splits.labels)
        return int(self.teacher.logits(self.splits.validation.arrays(np.arange(1))).shape[-1])

    @property
    def is_language_model(self) -> bool:
        """Whether samples are windows of tokens."""
        from edgekd.data.windows import positions_of

        return positions_of(self.splits.train.labels) > 0

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms to train; without labels, which only a teacher of embeddings can do without, there is no control."""
        from edgekd.distillation.arms import arms_of

        return arms_of(self.recipe, not self.recipe.teacher.embeds or bool(self.splits.labels))

    def _codec(self, train: bool, positions: int) -> str:
        from edgekd.teachers.window_records import plain_codec

        if self.recipe.teacher.embeds:
            return VECTOR_CODEC
        if self.teacher.listed is not None:
            if reason := self.recipe.not_served_by_listed():
                raise UsageError(
                    f"the teacher gives its {self.teacher.listed} largest log-probabilities at T = 1, and {reason}"
                )
            return f"listed{self.teacher.listed}"
        return self.recipe.codec(self.classes, positions) if train else plain_codec(self.classes, positions)

    def capture_key(self, split: str) -> CaptureKey:
        """What the cache of a split depends on."""
        from edgekd.data.windows import positions_of
        from edgekd.teachers.teacher_cache import CaptureKey

        train, views = split == "train", self.views_of(split)
        positions = positions_of(self.splits.train.labels)
        return CaptureKey(
            teacher=self.teacher.fingerprint,
            data=self.split(split).fingerprint,
            augmentation=views.augmentation_fingerprint(self.splits.train),
            views=self.recipe.data.views if train else 1,
            seed=self.recipe.distill.seeds[0],
            codec=self._codec(train, positions),
            mix=views.mix_fingerprint(self.splits.train),
            features=self._kept_features(train),
        )

    def _kept_features(self, train: bool) -> tuple[str, ...]:
        """What students learn beside classes; of samples that are judged, what each of several teachers said; and what
        the teacher says of itself."""
        from edgekd.teachers.ensemble import MEMBERS

        if train:
            wanted = tuple(sorted(spec.stored for spec in self.recipe.distill.wanted_features()))
        else:
            wanted = (MEMBERS,) if len(self.recipe.teacher.members) > 1 else ()
        return (*wanted, *self.teacher.beside)

    def cache(self, split: str) -> TeacherCache:
        """The finished cache of a split.

        Raises:
            CacheError: It is missing, damaged or of other data; the message has the command that makes it.
        """
        from edgekd.teachers.teacher_cache import open_cache

        return open_cache(self.folder.cache(split), self.capture_key(split))
