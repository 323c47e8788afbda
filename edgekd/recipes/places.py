"""Whether what a recipe names is there, seen without loading a model or running code beside it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

__all__ = ["file_fault", "function_fault", "function_faults"]


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
        names = _names_in(path.read_text(encoding="utf-8", errors="replace"))
        if names is None or function in names:
            return ""
        return f"{path.name} beside the recipe defines no {function!r}"
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    return "" if found else f"no {path.name} beside the recipe, and no module {module!r} is installed"


def function_faults(key: str, reference: str, folder: Path) -> list[str]:
    """The same as a line of a recipe's faults, with its key path; none where there may be one."""
    fault = function_fault(reference, folder)
    return [f"{key}: {fault}"] if fault else []


def _names_in(source: str) -> set[str] | None:
    """What a module's source defines, assigns or imports; None where that cannot be read off it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return None  # Python says what is wrong with it when it is run
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return None if "*" in names else names
