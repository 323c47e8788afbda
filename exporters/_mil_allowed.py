"""Which shapes an input of a package takes, where it takes several: lists of shapes, ranges, image sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Allowed", "allowed_shapes"]


@dataclass(frozen=True)
class Allowed:
    """What a package says of an input beside its type.

    Attributes:
        shapes: One of these; empty when there is no such list. A shorter one speaks of the last axes.
        ranges: Smallest and largest size by axis, the largest -1 when there is no end; empty when there are none.
        default: Value of every element when the input is not given; None when it must be given.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    default: float | None = None

    def takes(self, shape: tuple[int, ...]) -> bool:
        listed = not self.shapes or any(shape[len(shape) - len(s) :] == s for s in self.shapes)
        sizes = shape[len(shape) - len(self.ranges) :]
        within = all(a <= size and (b < 0 or size <= b) for size, (a, b) in zip(sizes, self.ranges, strict=True))
        return listed and within

    def first_sizes(self, rank: int) -> tuple[int, ...]:
        """Sizes of the first axis; of a range, three."""
        listed = sorted({shape[0] for shape in self.shapes if len(shape) == rank})
        if listed:
            return tuple(listed)
        low, high = self.ranges[0] if len(self.ranges) == rank else (1, -1)
        return tuple(range(max(1, low), max(1, low) + 3 if high < 0 else min(high, max(1, low) + 2) + 1))

    def __str__(self) -> str:
        if self.shapes:
            return f"one of {', '.join(map(str, self.shapes))}"
        return "sizes of " + ", ".join(f"{a} to {b if b >= 0 else 'any'}" for a, b in self.ranges)


def allowed_shapes(feature: Any) -> Allowed:
    """Read a ``FeatureDescription`` message."""
    kind = feature.type.WhichOneof("Type")
    if kind == "multiArrayType":
        array = feature.type.multiArrayType
        shapes = tuple(tuple(int(size) for size in s.shape) for s in array.enumeratedShapes.shapes)
        ranges = tuple((int(r.lowerBound), int(r.upperBound)) for r in array.shapeRange.sizeRanges)
        which = array.WhichOneof("defaultOptionalValue") if feature.type.isOptional else None
        return Allowed(shapes, ranges, float(getattr(array, which)) if which else None)
    if kind == "imageType":
        image = feature.type.imageType
        shapes = tuple((int(s.height), int(s.width)) for s in image.enumeratedSizes.sizes)
        if image.WhichOneof("SizeFlexibility") != "imageSizeRange":
            return Allowed(shapes)
        size = image.imageSizeRange
        return Allowed(
            shapes, tuple((int(r.lowerBound), int(r.upperBound)) for r in (size.heightRange, size.widthRange))
        )
    return Allowed()
