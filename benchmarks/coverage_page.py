"""The cells of :mod:`edgekd.benchmarks.coverage` as they are kept, and the page that they make."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgekd.store import atomic_write

__all__ = ["PRECISIONS", "RESULTS", "TARGETS", "Cell", "Key", "page", "read_cells", "write_cells"]

TARGETS = ("onnx", "coreml", "tflite")
PRECISIONS = ("fp32", "fp16", "int8")
RESULTS = Path(__file__).parent / "results" / "coverage.json"

Key = tuple[str, str, str]
"""Architecture, target and precision."""


@dataclass(frozen=True)
class Cell:
    """One architecture on one target in one precision.

    Attributes:
        architecture, target: By name.
        precision: As asked: ``int8`` stands for what edgekd chooses.
        written: What ``int8`` became.
        status: ``not supported`` only where the target's format or runtime cannot do it.
        reason: Why it did not pass, in one line.
        seconds: Of processor time, from the program to the proven file, compression included.
        peak_mb: Largest resident memory of the process, in 10^6 bytes, the imported packages included.
        size_bytes: Of the file.
        max_abs, cosine: Against the program that the file was written from.
        signal: The same cosine, of what is left of outputs when their mean over the samples is taken off.
    """

    architecture: str
    target: str
    precision: str
    status: Literal["passed", "failed", "not supported"]
    reason: str = ""
    written: str = ""
    seconds: float = 0.0
    peak_mb: int = 0
    size_bytes: int = 0
    max_abs: float | None = None
    cosine: float | None = None
    signal: float | None = None

    @property
    def key(self) -> Key:
        return self.architecture, self.target, self.precision


def read_cells(path: Path = RESULTS) -> dict[Key, Cell]:
    """All cells that were run, by architecture, target and precision."""
    if not path.is_file():
        return {}
    return {cell.key: cell for cell in (Cell(**entry) for entry in json.loads(path.read_text())["cells"])}


def write_cells(cells: Mapping[Key, Cell], head: Mapping[str, Any], path: Path) -> None:
    """One line a cell, so that a change can be read.

    Args:
        cells: Those of architectures that are gone are left out.
        head: Facts of the run; the cells are sorted as its ``families`` are.
        path: Replaced.
    """
    order = {name: i for i, name in enumerate(head["families"])}
    known = [cell for cell in cells.values() if cell.architecture in order]
    known.sort(key=lambda c: (order[c.architecture], TARGETS.index(c.target), PRECISIONS.index(c.precision)))
    empty = (None, "", 0, 0.0)
    lines = [json.dumps({k: v for k, v in asdict(cell).items() if v not in empty}) for cell in known]
    opening, body = json.dumps(dict(head), indent=1)[:-2], ",\n  ".join(lines)
    atomic_write(path, f'{opening},\n "cells": [\n  {body}\n ]\n}}\n'.encode())


def page(path: Path = RESULTS) -> str:
    """``docs/coverage.md``."""
    data, cells = json.loads(path.read_text()), read_cells(path)
    columns = [(target, precision) for target in TARGETS for precision in PRECISIONS]
    lines = [
        "# Coverage",
        "",
        "Which architectures come through, on which target, in which precision. Written by",
        "`python tests/test_docs.py` from `benchmarks/results/coverage.json`; the run is",
        "`python -m edgekd.benchmarks.coverage`, whose docstring says how to make the environment. Weights are random,",
        "models are small; the code is that of timm, torchvision and transformers.",
        "",
        "*Passed*: the file was written, loaded by its own runtime (Core ML: edgekd's evaluator) and is as near to its",
        "program as `edgekd export` demands. *Not supported*: the target's format or runtime cannot do it. All else",
        "*failed*. Seconds are of one core's time, from the program to the proven file, quantization included.",
        "",
        f"{data['machine']}; " + ", ".join(f"{name} {version}" for name, version in data["versions"].items()) + ".",
        "",
        "| | " + " | ".join(PRECISIONS) + " |",
        "|---|" + "---|" * len(PRECISIONS),
        *(
            f"| {target} | " + " | ".join(_share(cells.values(), target, precision) for precision in PRECISIONS) + " |"
            for target in TARGETS
        ),
        "| all | " + " | ".join(_share(cells.values(), None, precision) for precision in PRECISIONS) + " |",
        "",
        "| architecture | from | " + " | ".join(f"{target} {precision}" for target, precision in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name, family in data["families"].items():
        row = [_mark(cells.get((name, target, precision))) for target, precision in columns]
        lines.append(f"| {name} | {family} | " + " | ".join(row) + " |")
    for status in ("failed", "not supported"):
        chosen = [cell for cell in cells.values() if cell.status == status]
        if chosen:
            lines += ["", f"## {status.capitalize()}", ""]
            lines += [f"- {c.architecture}, {c.target} {c.precision}: {_escaped(c.reason)}" for c in chosen]
    return "\n".join(lines) + "\n"


def _share(cells: Iterable[Cell], target: str | None, precision: str) -> str:
    chosen = [c for c in cells if c.precision == precision and target in (None, c.target)]
    passed = sum(c.status == "passed" for c in chosen)
    return f"{passed} of {len(chosen)} ({passed / len(chosen):.1%})" if chosen else "not run"


def _mark(cell: Cell | None) -> str:
    if cell is None:
        return "not run"
    word = cell.written if cell.precision == "int8" else ""
    return f"{word} {cell.seconds:.1f} s".strip() if cell.status == "passed" else f"**{cell.status}**"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)
