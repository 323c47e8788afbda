"""Sizes of an open axis, as options say them: ``4``, ``1,4,8`` or ``1..8``."""

from __future__ import annotations

from typing import TypeAlias

from torch.export import ExportedProgram

from edgekd.errors import UsageError
from edgekd.programs.models import OPEN, input_specs, open_axes
from edgekd.programs.tracing import at_batch

__all__ = ["Sizes", "check_open", "few_of", "sizes", "with_axes"]

Sizes: TypeAlias = tuple[int, ...] | range


def sizes(text: str, target: str, option: str) -> Sizes:
    """``4``, ``1,4,8`` or ``1..8``.

    Raises:
        UsageError: It is none of them.
    """
    try:
        if ".." in text:
            low, high = (int(part) for part in text.split(".."))
            if 0 < low < high:
                return range(low, high + 1)
        else:
            listed = tuple(int(part) for part in text.split(","))
            if listed and min(listed) > 0:
                return listed
    except ValueError:
        pass
    raise UsageError(f"{target} {option}={text!r} is no size (1), list of sizes (1,4,8) or range (1..8)")


def few_of(wanted: Sizes) -> tuple[int, ...]:
    """Some of the sizes, for a proof: all of a list; of a range the ends and the middle."""
    if isinstance(wanted, range):
        return tuple(sorted({wanted[0], wanted[len(wanted) // 2], wanted[-1]}))
    return wanted


def with_axes(program: ExportedProgram, target: str, batch: str, length: str) -> ExportedProgram:
    """A program with one size where one was asked for, and its axis open where several were.

    Args:
        batch, length: What the target's options say, the latter empty for a program without such an axis.

    Raises:
        UsageError: See :func:`check_open`; or an option is no size.
    """
    wanted = sizes(batch, target, "batch"), sizes(length, target, "length") if length else None
    if (batch, length) != ("1", "") or any(OPEN in spec.shape[1:] for spec in input_specs(program)):
        check_open(program, target, batch, length)
    one = [OPEN if size is not None and len(size) > 1 else size[0] if size else None for size in wanted]
    return program if one == [OPEN, None] else at_batch(program, one[0] or OPEN, one[1])


def check_open(program: ExportedProgram, target: str, batch: str, length: str) -> None:
    """Whether the inputs of a program take the sizes that options ask for.

    Raises:
        UsageError: Its own shape is fixed where other sizes were asked for, is open where none were, or ends before.
    """
    specs = input_specs(program)
    for spec, limits in zip(specs, open_axes(program), strict=True):
        for axis, size in enumerate(spec.shape):
            name, text = ("batch", batch) if axis == 0 else ("length", length)
            if size == OPEN and not text:
                raise UsageError(
                    f"axis {axis} of input {spec.name!r} {spec.shape} is open; set length, as 16,32 or 1..128"
                )
            if size != OPEN and axis == 0 and tuple(sizes(text, target, name)) != (size,):
                raise UsageError(
                    f"{target} {name}={text} takes a program with that axis open; input {spec.name!r} is {spec.shape}"
                )
            if size == OPEN:
                wanted, (low, high) = sizes(text, target, name), limits[axis]
                if min(wanted) < low or (high is not None and max(wanted) > high):
                    raise UsageError(
                        f"{target} {name}={text}, but axis {axis} of input {spec.name!r} has {max(1, low)} to "
                        f"{high or 'any size'}"
                    )
    if length and not any(OPEN in spec.shape[1:] for spec in specs):
        shapes = ", ".join(f"{spec.name!r} is {spec.shape}" for spec in specs)
        raise UsageError(f"{target} length={length} takes a program with an open axis; {shapes}")
