"""``hf:folder``: what transformers saved; see :mod:`edgekd.programs.hugging_face`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.protocols import ModelRequest, OriginOptions

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["ORIGIN"]


class _HuggingFace:
    requires = ("transformers", "optimum")
    extra = "hf"
    options = OriginOptions

    def fault(self, place: str, folder: Path) -> str:
        return "" if (folder / place).is_dir() else f"no {place!r} beside the recipe"

    def module(self, asked: ModelRequest) -> nn.Module:
        from edgekd.programs.hugging_face import hugging_face_module

        return hugging_face_module(asked.folder / asked.place)


ORIGIN = _HuggingFace()
