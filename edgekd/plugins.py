"""Name to plugin. Nothing is imported until it is asked for, so a missing toolchain hurts only its own target.

The core never imports ``edgekd.exporters``, ``edgekd.devices`` or ``edgekd.benchmarks`` by a statement: this is the
door.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from edgekd.errors import MissingToolchainError, UsageError
from edgekd.protocols import Exporter, Kind, Origin

__all__ = [
    "exporter_names",
    "exporter_of",
    "kind_names",
    "load_exporter",
    "load_function",
    "load_kind",
    "load_module",
    "load_origin",
    "missing",
    "origin_names",
    "origin_of",
    "require",
    "require_origin",
]


def exporter_names() -> tuple[str, ...]:
    """Names of all targets: the built-in ones by file name, others by entry point."""
    return _names("edgekd.exporters")


def kind_names() -> tuple[str, ...]:
    """Names of all kinds of device."""
    return _names("edgekd.devices")


def load_exporter(name: str) -> Exporter:
    """The exporter of that name; its toolchain need not be installed.

    Raises:
        UsageError: No exporter has that name; the message has those that exist.
    """
    return cast(Exporter, _load("edgekd.exporters", name, "EXPORTER", "exporter"))


def load_kind(name: str) -> Kind:
    """The kind of device of that name.

    Raises:
        UsageError: There is no such kind; the message has those that exist.
    """
    return cast(Kind, _load("edgekd.devices", name, "DEVICE", "kind of device"))


def origin_names() -> tuple[str, ...]:
    """Prefixes of all origins of models."""
    return tuple(name for name in _names("edgekd.origins") if name != _FUNCTION)


def load_origin(name: str) -> Origin:
    """The origin of that name; its toolchain need not be installed."""
    return cast(Origin, _load("edgekd.origins", name, "ORIGIN", "origin"))


def origin_of(reference: str) -> tuple[str, str]:
    """Name of a model's origin, and what the reference says to it; without a known prefix it is ``module:function``."""
    prefix, _, place = reference.partition(":")
    return (prefix, place) if prefix in origin_names() else (_FUNCTION, reference)


def require_origin(reference: str, origin: Origin) -> None:
    """Check that the toolchain of an origin is installed.

    Raises:
        MissingToolchainError: With the line that installs it.
    """
    absent = missing(origin.requires)
    if absent:
        raise MissingToolchainError(repr(reference), ", ".join(absent), origin.extra)


_FUNCTION = "function"
"""The origin of what has no prefix."""


def exporter_of(path: Path) -> str:
    """Name of the target that a file belongs to, by its suffix.

    Raises:
        UsageError: No target writes such files.
    """
    suffixes = {load_exporter(name).suffix: name for name in exporter_names()}
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: no target writes {path.suffix or 'such'} files; there are {', '.join(suffixes)}")
    return suffixes[path.suffix]


def missing(requires: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the modules that are not installed; imports none of them."""
    return tuple(module for module in requires if importlib.util.find_spec(module) is None)


def require(name: str, exporter: Exporter) -> None:
    """Check that the toolchain of an exporter is installed.

    Raises:
        MissingToolchainError: With the line that installs it.
    """
    absent = missing(exporter.requires)
    if absent:
        raise MissingToolchainError(f"target {name!r}", ", ".join(absent), exporter.extra)


def load_module(name: str) -> ModuleType:
    """A module of ``edgekd.benchmarks`` or another mapped folder, by full name."""
    return importlib.import_module(name)


def load_function(reference: str, folder: Path) -> Any:
    """``module:function`` of the user's own code; the module is looked up beside the recipe first.

    The code is run: a recipe is trusted like a Makefile.

    Raises:
        UsageError: The module or the function is not there; the message has the near names.
    """
    module_name, _, attribute = reference.partition(":")
    path = folder.joinpath(*module_name.split(".")).with_suffix(".py")
    if path.is_file():
        module = _import_file(path, folder)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise  # a module that the user's own code lacks: its traceback is the user's
            raise UsageError(
                f"{reference!r}: no module {module_name!r} beside the recipe ({path}) or installed"
            ) from None
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, [name for name in vars(module) if not name.startswith("_")], n=3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise UsageError(f"{reference!r}: {module_name} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _import_file(path: Path, folder: Path) -> ModuleType:
    """Import a file once per process under a name of its own, with its folder importable for its siblings."""
    name = f"edgekd_user_{abs(hash(path.resolve()))}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _names(package: str) -> tuple[str, ...]:
    builtin = {
        Path(entry.name).stem
        for entry in files(package).iterdir()
        if entry.name.endswith(".py") and not entry.name.startswith("_")
    }
    return tuple(sorted(builtin | {point.name for point in entry_points(group=package)}))


def _load(package: str, name: str, attribute: str, what: str) -> Any:
    names = _names(package)
    if name not in names:
        raise UsageError(f"no {what} called {name!r}; there are {', '.join(names)}")
    for point in entry_points(group=package, name=name):
        return point.load()
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)
