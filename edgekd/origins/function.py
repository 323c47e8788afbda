"""``module:function`` of the user's own code, which returns a module; the only origin that no prefix names."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd import plugins
from edgekd.errors import DataError, UsageError
from edgekd.protocols import ModelRequest, OriginOptions
from edgekd.recipes.places import function_fault

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ORIGIN"]


class FunctionOptions(OriginOptions):
    """What the function is called with: ``arguments = { width = 0.5 }``."""

    arguments: dict[str, Any] = Field(default_factory=dict)


class _Function:
    requires: tuple[str, ...] = ()
    extra = ""
    options = FunctionOptions
    fault = staticmethod(function_fault)

    def module(self, asked: ModelRequest) -> nn.Module:
        from torch import nn

        function, arguments = plugins.load_function(asked.place, asked.folder), asked.options.arguments
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            taken = ", ".join(inspect.signature(function).parameters) or "nothing"
            raise UsageError(f"{asked.place}, arguments {arguments}: {error}; it takes {taken}") from None
        module = function(**arguments)
        if not isinstance(module, nn.Module):
            raise DataError(f"{asked.place} returned {type(module).__name__}; a torch.nn.Module works")
        return module


ORIGIN = _Function()
