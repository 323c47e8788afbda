"""``blocks_of:hf:teacher``: another model with every k-th of its repeated blocks, and its weights to start from.

See :mod:`edgekd.teachers.blocks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from edgekd import plugins
from edgekd.protocols import ModelRequest, OriginOptions

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["ORIGIN"]


class BlocksOptions(OriginOptions):
    """What is kept.

    Attributes:
        every: One block of so many, spread evenly, the first and the last among them.
        keep: Or these, from 0.
        stacks: Names of the lists of blocks that are cut (``model.encoder.layer``); all by default.
    """

    every: Annotated[int, Field(ge=2)] | None = None
    keep: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    stacks: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _every_or_keep(self) -> BlocksOptions:
        if (self.every is None) == (self.keep is None):
            raise ValueError("blocks_of: needs every = 2 (one block of two) or keep = [0, 2, 5], one of them")
        return self


class _BlocksOf:
    requires: tuple[str, ...] = ()
    extra = ""
    options = BlocksOptions

    def fault(self, place: str, folder: Path) -> str:
        if ":" not in place:
            return f"blocks_of: is of a model, and {place!r} is none; blocks_of:hf:teacher works"
        name, inner = plugins.origin_of(place)
        return plugins.load_origin(name).fault(inner, folder)

    def module(self, asked: ModelRequest) -> nn.Module:
        from edgekd.teachers.blocks import keep_blocks, mark_started
        from edgekd.teachers.sources import module_fingerprint, trainable_module

        whole = trainable_module(asked.place, asked.folder, labels=asked.labels)
        weights = module_fingerprint(whole)
        kept = keep_blocks(whole, asked.options.every, asked.options.keep or (), asked.options.stacks)
        told = "; ".join(
            f"{len(positions)} of {stack.count} in {stack.name or 'the model'}: {', '.join(map(str, positions))}"
            for stack, positions in kept
        )
        return mark_started(whole.train().requires_grad_(True), f"blocks of {asked.place} {weights} ({told})")


ORIGIN = _BlocksOf()
