"""Precisions that are decided once for all targets, spelled by bits; the other ones are made by the exporters."""

from __future__ import annotations

from edgekd.types import Precision

__all__ = ["PORTABLE", "STATIC", "WEIGHT_BITS", "WIDE"]

WEIGHT_BITS = {"w8a8": 8, "w4a8": 4}
"""Precisions with static int8 activations, and the bits of their weights."""

WIDE: Precision = "w8a16"
"""Int8 weights with static int16 activations, symmetric around zero: for the NPUs of some phones."""

STATIC: tuple[Precision, ...] = (*WEIGHT_BITS, WIDE, "auto")
"""Precisions whose programs hold static scales of activations (``auto``: in all layers but some)."""

PORTABLE: tuple[Precision, ...] = ("w8", *STATIC)
"""Precisions that are programs: decided here, once for all targets. The exporters make the others from ``fp32``."""
