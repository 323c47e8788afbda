"""Whether what a recipe names is there, seen without loading a model or running code beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["file_fault", "function_fault"]


def file_fault(place: str, folder: Path) -> str:
    """Why there is no such file; empty when there is one."""
    return "" if (folder / place).is_file() else f"no file {place!r} beside the recipe"


def function_fault(reference: str, folder: Path) -> str:
    """Why there is no such ``module:function``; empty when there may be one.

    Of code beside the recipe the source is looked at, and not run.
    """
    module, _, function = reference.partition(":")
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    if not function:
        return f"{reference!r} is not module:function"
    if path.is_file():
        source = path.read_text(encoding="utf-8", errors="replace")
        if (
            not any(f"{keyword} {function}" in source for keyword in ("def", "class", "import"))
            and f"{function} =" not in source
        ):
            return f"{path.name} beside the recipe defines no {function!r}"
        return ""
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    return "" if found else f"no {path.name} beside the recipe, and no module {module!r} is installed"
