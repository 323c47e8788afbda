"""The table of ML Program operators that the evaluator knows: each one is a plain function of torch tensors.

A function's parameters carry MIL's own names, and their annotations say in which form it takes them: ``Tensor`` as it
is, ``int``, ``float``, ``bool``, ``str``, ``Ints`` and ``Bools`` as Python values. A parameter with a default is
optional in MIL with the same default.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from edgekd.errors import ExportError

__all__ = [
    "OPERATORS", "OPSETS", "REFUSED", "Bools", "Ints", "Operator", "Tensors", "Texts", "operator", "to_python",
]  # fmt: skip

Ints: TypeAlias = tuple[int, ...]
Bools: TypeAlias = tuple[bool, ...]
Tensors: TypeAlias = tuple[Tensor, ...]
Texts: TypeAlias = tuple[str, ...]

OPSETS: dict[str, tuple[str, int]] = {
    "CoreML5": ("iOS 15", 6),
    "CoreML6": ("iOS 16", 7),
    "CoreML7": ("iOS 17", 8),
    "CoreML8": ("iOS 18", 9),
}
"""Operator set to the first system that has it and the specification version of its packages, oldest first."""

REFUSED: dict[str, str] = {
    "random_bernoulli": "its numbers cannot be reproduced",
    "random_categorical": "its numbers cannot be reproduced",
    "random_normal": "its numbers cannot be reproduced",
    "random_uniform": "its numbers cannot be reproduced",
    "conv_quantized": "it is experimental, and its packing is not published; constexpr operators took its place",
    "custom_layer": "it is computed by code of the app",
}
"""Operators that a package may hold and the evaluator does not compute, each with the reason."""


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: MIL's.
        function: Computes it.
        forms: Parameter name to the type in which the function takes it.
        required: Parameters without a default.
        moves: Only moves or selects numbers, so that nothing has to be rounded after it.
        since: First operator set that has it.
        later: Parameters that came with a later operator set.
    """

    name: str
    function: Callable[..., Any]
    forms: dict[str, Any]
    required: tuple[str, ...]
    moves: bool
    since: str
    later: Mapping[str, str]


OPERATORS: dict[str, Operator] = {}
"""Every operator by MIL's name, filled by the modules that define them."""


def operator(
    name: str | None = None, *, moves: bool = False, since: str = "CoreML5", later: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table, under its own name or the given one; see :class:`Operator`."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        key = name or function.__name__
        if key in OPERATORS:
            raise ValueError(f"operator {key!r} is defined twice")
        hints = typing.get_type_hints(function)
        hints.pop("return", None)
        forms = {k: _form(hint) for k, hint in hints.items()}
        parameters = inspect.signature(function).parameters.values()
        required = tuple(p.name for p in parameters if p.default is p.empty)
        OPERATORS[key] = Operator(key, function, forms, required, moves, since, later or {})
        return function

    return enter


def to_python(form: Any, value: Any) -> Any:
    """A value in the form that a parameter takes.

    Raises:
        ExportError: The form and the value do not fit.
    """
    if form in (Tensor, Tensors, Texts, Any):
        return value
    if form is str:
        if not isinstance(value, str):
            raise ExportError(f"takes a text, not {type(value).__name__}")
        return value
    if not isinstance(value, Tensor):
        raise ExportError(f"takes numbers, not {value!r}")
    if form in (Ints, Bools):
        return tuple(value.reshape(-1).tolist())
    return form(value.item())


def _form(hint: Any) -> Any:
    """``X | None`` is X."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) is tuple or not options:
        return hint
    return options[0]
