"""What a teacher is to everything else: it answers batches, and its inputs are made in a declared way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Answer", "Preprocessing", "Teacher"]

Above = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Answer:
    """What a teacher says of a batch.

    Attributes:
        logits: float32 (batch, classes); of a causal language model (batch, positions, vocabulary).
        features: By name, batch first; none but those that were asked for, and those of :attr:`Teacher.beside`.
    """

    logits: np.ndarray
    features: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """A model that gives outputs.

    Attributes:
        outputs: From inputs by name, in the order of the data.
        fingerprint: Of its weights.
        parameters: None when they cannot be counted.
        macs: For one sample; None when they cannot be counted.
        size_bytes: Of its weights, as stored; 0 when they cannot be seen.
        lineage: Lines about what it is made of, for the card; none where the fingerprint says it all.
        beside: Features of one number for each sample that are kept whatever is asked for: how sure it is of itself.
        per_shard: Samples after which what it said is safe on the disk; None where asking again costs little.
        listed: So many of its largest outputs are known, at T = 1, and the others' mass as a whole; None where all are.
    """

    outputs: Callable[[Mapping[str, np.ndarray]], Answer]
    fingerprint: str
    parameters: int | None
    macs: int | None
    size_bytes: int
    lineage: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    per_shard: int | None = None
    listed: int | None = None

    def logits(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :attr:`Answer.logits`."""
        return self.outputs(arrays).logits


class Preprocessing(BaseModel):
    """How images of the data become what a teacher takes, where that is another than what the student takes.

    The normalisation of ``[data.image]`` is undone first, so all starts from 0…1. Then in this order: channels, size,
    times ``scale``, less ``mean``, by ``std``, layout. With ``resize`` the shorter side becomes that, and a square of
    ``size`` is cut from the centre; without it, both sides become ``size``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: Annotated[int, Field(ge=1)] | None = None
    resize: Annotated[int, Field(ge=1)] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: Literal[1, 3] | None = None
    scale: Above = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Above, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"

    @model_validator(mode="after")
    def _cut_from_the_larger(self) -> Preprocessing:
        if self.resize is not None and self.resize < (self.size or self.resize + 1):
            raise ValueError("resize must be at least size, which is cut from the centre of it")
        return self
