"""What is really in a file, in words that all formats share: exporters gather it, ``edgekd.exporting.lint`` judges."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from edgekd.types import JsonMixin

__all__ = ["Contents", "OperatorFact", "OperatorKind", "WeightFact", "stored_bytes"]

OperatorKind = Literal["quantize", "dequantize", "transpose", "cast", "batch_norm", "embedding", "other"]
"""What of an operator matters to a lint, in words that all formats share."""


@dataclass(frozen=True)
class WeightFact(JsonMixin):
    """One constant of a file that takes room.

    Attributes:
        name: As the file calls it.
        dtype: As it is stored: ``float32``, ``int8``, ``int4``, ``uint4`` for a palette of 16 …
        size_bytes: As stored, without scales or palettes.
        shape: As stored.
        reader: Type of the operator that computes with it, dequantization aside.
    """

    name: str
    dtype: str
    size_bytes: int
    shape: tuple[int, ...]
    reader: str

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class OperatorFact(JsonMixin):
    """One operator of a file, as its runtime would run it.

    Attributes:
        name: Of the operator or of its first output.
        type: As the format calls it.
        kind: ``quantize`` and ``dequantize`` only where no integer kernel takes them up.
        size_bytes: Of its first output for one inference; 0 where the file does not tell.
    """

    name: str
    type: str
    kind: OperatorKind
    size_bytes: int


@dataclass(frozen=True)
class Contents(JsonMixin):
    """What is really in a file: the evidence for ``edgekd.exporting.lint``."""

    operators: tuple[OperatorFact, ...]
    weights: tuple[WeightFact, ...]


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes: the digits of its type are bits, and where it has none (``bool``) there are 8."""
    found = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(found.group()) if found else 8) // 8
