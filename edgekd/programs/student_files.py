"""Students on disk: a folder with the program, its card and its assets, or any ``.pt2`` file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from edgekd.programs.models import (
    count_parameters,
    input_specs,
    output_specs,
    program_bytes,
    program_from,
    read_model_file,
)
from edgekd.store import atomic_folder, load_card, write_json
from edgekd.types import Card, Json, Student

__all__ = ["load_student", "save_student"]


def save_student(folder: Path, student: Student, assets: Mapping[str, bytes], result: Json | None = None) -> None:
    """Write ``student.pt2``, ``card.json``, the assets and, if given, ``result.json``: all or nothing."""
    with atomic_folder(folder) as part:
        (part / "student.pt2").write_bytes(program_bytes(student.program))
        write_json(part / "card.json", student.card.to_json())
        for name, content in assets.items():
            (part / name).write_bytes(content)
        if result is not None:
            write_json(part / "result.json", result)


def load_student(path: Path) -> tuple[Student, dict[str, bytes]]:
    """A student from its folder, or from any ``.pt2`` file; without a card, one is derived from the program.

    Returns:
        The student and its assets by name.

    Raises:
        ModelFileError: The file is missing, damaged or unsafe.
    """
    file = path / "student.pt2" if path.is_dir() else path
    content = read_model_file(file)
    program = program_from(content, file)
    if file.name == "student.pt2" and file.with_name("card.json").is_file():
        card = load_card(file.parent)
    else:
        lineage = (f"file: {hashlib.sha256(content).hexdigest()[:16]}",)
        card = Card(
            file.stem,
            input_specs(program),
            output_specs(program),
            parameters=count_parameters(program),
            lineage=lineage,
        )
    assets = {name: (file.parent / name).read_bytes() for name in card.assets}
    return Student(program, card), assets
