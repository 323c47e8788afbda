"""``edgekd init``: a recipe that runs as it is, to be changed knob by knob."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from edgekd.errors import UsageError
from edgekd.store import atomic_write

__all__ = ["TEMPLATES", "write_template"]

TEMPLATES = ("image", "text")


def write_template(name: str, folder: Path) -> list[Path]:
    """Write the files of a template into a folder; nothing that is there is overwritten.

    Raises:
        UsageError: There is no such template, one of its files exists, or there is a file in place of the folder.
    """
    if name not in TEMPLATES:
        raise UsageError(f"no template called {name!r}; there are {', '.join(TEMPLATES)}")
    sources = [entry for entry in (files("edgekd") / "templates" / name).iterdir() if entry.is_file()]
    targets = {folder / entry.name: entry for entry in sorted(sources, key=lambda entry: entry.name)}
    blocking = next((path for path in (folder, *folder.parents) if path.is_file()), None)
    if blocking is not None:
        raise UsageError(f"{blocking} is a file; choose another folder: edgekd init FOLDER")
    present = [path for path in targets if path.exists()]
    if present:
        raise UsageError(f"{present[0]} exists already; choose another folder: edgekd init FOLDER")
    for path, entry in targets.items():
        atomic_write(path, entry.read_bytes())
    return list(targets)
