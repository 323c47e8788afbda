"""``module:function`` of the user's own code, which returns a module; the only origin that no prefix names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd import plugins
from edgekd.errors import DataError
from edgekd.places import function_fault
from edgekd.protocols import ModelRequest, OriginOptions

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ORIGIN"]


class _Function:
    requires: tuple[str, ...] = ()
    extra = ""
    options = OriginOptions
    fault = staticmethod(function_fault)

    def module(self, asked: ModelRequest) -> nn.Module:
        from torch import nn

        module = plugins.load_function(asked.place, asked.folder)()
        if not isinstance(module, nn.Module):
            raise DataError(f"{asked.place} returned {type(module).__name__}; a torch.nn.Module works")
        return module


ORIGIN = _Function()
