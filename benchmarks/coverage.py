"""What edgekd's exports take: every architecture of :mod:`edgekd.benchmarks.architectures` x target x precision.

Each cell goes edgekd's own way (a program, ``compress``, ``export_student`` with its proof) in a process of its own.
What passed stays in ``benchmarks/results/coverage.json``; a further run does only the rest. timm and torchvision want
another torch than ``constraints.txt``, hence an environment::

    python -m venv .venv-coverage
    grep -vE '^torch(vision)?==' constraints.txt > /tmp/constraints.txt
    .venv-coverage/bin/pip install -c /tmp/constraints.txt torch==2.14.1 torchvision==0.29.1 timm==1.0.31 -e '.[all]'
    .venv-coverage/bin/python -m edgekd.benchmarks.coverage
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import EdgekdError, ParityError
from edgekd.programs.student_files import load_student, save_student

from .coverage_page import PRECISIONS, RESULTS, TARGETS, Cell, page, read_cells, write_cells
from .isolation import isolated, one_line

if TYPE_CHECKING:
    from edgekd.types import Student

    from .architectures import Architecture

__all__ = ["LIMITS", "Limit", "main"]

_CALIBRATION, _PROOF, _SETTLING = 16, 4, 32  # samples
_PACKAGES: tuple[str, ...] = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "torchao",
    "coremltools",
    "litert-torch",
    "ai-edge-litert",
)
_PACKAGES += ("ai-edge-quantizer", "onnx", "onnxscript", "onnxruntime", "numpy")
_IMPORTED: tuple[str, ...] = (
    "ai_edge_litert.interpreter",
    "ai_edge_quantizer.quantizer",
    "litert_torch",
    "onnxscript",
    "timm",
)
_IMPORTED += ("coremltools.converters.mil.frontend.torch", "onnxruntime.quantization", "torchvision", "transformers")
_IMPORTED += ("torchao.quantization.pt2e.quantize_pt2e",)

_LEAST_SIGNAL = {"fp32": 0.999, "fp16": 0.9}
"""Smallest cosine after each output lost its mean over the samples: an untrained network says nearly the same to every
input, so that a file which ignores its input could pass parity. int8 is not held to it: there, rounding is of the size
of what so few random samples differ by."""


@dataclass(frozen=True)
class Limit:
    """What a target cannot do, whoever exports to it.

    Attributes:
        target: By name.
        pattern: Found in the reason of a cell that failed.
        reason: What it cannot do, and where that is said.
    """

    target: str
    pattern: str
    reason: str


LIMITS: tuple[Limit, ...] = ()


# ── one cell ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _prepare(architecture: Architecture, folder: Path) -> dict[str, Any]:
    """Build, settle, export and store an architecture with its samples.

    Raises:
        ParityError: The program computes something else than the module, or something that is not finite.
    """
    import torch

    from edgekd.programs.models import count_parameters, flatten_outputs, input_specs, output_specs, run_program
    from edgekd.programs.tracing import export_program
    from edgekd.types import Card, Student

    from .random_weights import settle

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    module = architecture.build()
    module = settle(module, architecture.sample(_SETTLING, generator), generator)
    samples = architecture.sample(_CALIBRATION + _PROOF, generator)
    program = export_program(module, [tensor[:1] for tensor in samples])
    specs = input_specs(program)
    student = Student(
        program, Card(architecture.name, specs, output_specs(program), parameters=count_parameters(program))
    )
    arrays = {spec.name: tensor.numpy() for spec, tensor in zip(specs, samples, strict=True)}
    proof = {name: array[-_PROOF:] for name, array in arrays.items()}
    with torch.no_grad():
        expected = [t.numpy() for t in flatten_outputs(module(*(tensor[-_PROOF:] for tensor in samples)))]
    for spec, want, got in zip(student.card.outputs, expected, run_program(program, proof).values(), strict=True):
        if not np.isfinite(want).all():
            raise ParityError(f"the architecture itself gives NaN or infinity in {spec.name!r}: settle it otherwise")
        if not np.allclose(want, got, rtol=1e-3, atol=1e-3 * max(1.0, float(np.abs(want).max()))):
            raise ParityError(f"the exported program differs from its module in {spec.name!r}")
    save_student(folder / "fp32", student, {})
    np.savez(folder / "samples.npz", **arrays)
    return {}


def _run(target: str, precision: str, folder: Path) -> dict[str, Any]:
    """Export and prove one cell; compressed programs are made once an architecture."""
    from edgekd import plugins
    from edgekd.compression.compress import compress
    from edgekd.exporting.export import Proof, export_student, resolve_precision

    exporter = plugins.load_exporter(target)
    arrays = dict(np.load(folder / "samples.npz"))
    student, _ = load_student(folder / "fp32")
    written, _ = resolve_precision(precision, target, exporter, student)
    source = exporter.precisions[written].source
    if source != "fp32" and (folder / source).is_dir():
        student, _ = load_student(folder / source)
    elif source != "fp32":
        student = compress(student, source, {name: array[:_CALIBRATION] for name, array in arrays.items()})
        save_student(folder / source, student, {})
    proof = {name: array[-_PROOF:] for name, array in arrays.items()}
    facts: dict[str, Any] = {"written": written}
    try:
        artifact = export_student(student, {}, target, written, folder / f"{target}-{precision}", Proof(proof))
    except EdgekdError as error:
        return facts | {"status": "failed", "reason": one_line(str(error))}
    parity = artifact.parity
    signal = _signal(student, exporter.load(folder / f"{target}-{precision}" / artifact.path), proof)
    facts |= {"size_bytes": artifact.size_bytes, "max_abs": parity.max_abs, "cosine": parity.cosine, "signal": signal}
    if signal < _LEAST_SIGNAL.get(precision, -1.0):
        return facts | {
            "status": "failed",
            "reason": f"passes parity, but what the input changes differs: {signal:.4f}",
        }
    return facts | {"status": "passed"}


def _signal(student: Student, runner: Any, samples: Mapping[str, np.ndarray]) -> float:
    """Smallest cosine over the outputs, each without its mean over the samples; 1 where nothing is left."""
    from edgekd.exporting.parity import run_file
    from edgekd.programs.models import run_program

    cosines = [1.0]
    for a, b in zip(run_program(student.program, samples).values(), run_file(runner, samples), strict=True):
        a, b = a - a.mean(0, keepdims=True), b - b.mean(0, keepdims=True)
        size = float(np.linalg.norm(a) * np.linalg.norm(b))
        if np.linalg.norm(a) > 1e-5 * max(1.0, float(np.abs(a).max())):
            cosines.append(float((a * b).sum()) / size if size else 0.0)
    return min(cosines)


# ── the whole run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _import_everything() -> None:
    """Once, before processes are forked: an import costs more than most cells."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    from edgekd.quiet import quiet

    with quiet():
        for name in _IMPORTED:
            importlib.import_module(name)
        import torch

        from edgekd import plugins
        from edgekd.exporting.export import toolchain

        for target in TARGETS:
            toolchain(plugins.load_exporter(target))  # reads the list of all packages once
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported is not searched for garbage in every process


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="run only these, also where they passed")
    parser.add_argument("--target", action="append", choices=TARGETS, help="run only this one")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="run only this one")
    parser.add_argument("--all", action="store_true", help="run what passed again, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run what is asked; print each cell, and at the end the page."""
    arguments = _arguments()
    _import_everything()
    from .architectures import ARCHITECTURES

    unknown = set(arguments.architectures) - {a.name for a in ARCHITECTURES}
    if unknown:
        sys.exit(
            f"no architecture called {', '.join(sorted(unknown))}; there are {', '.join(a.name for a in ARCHITECTURES)}"
        )
    cells = read_cells(arguments.results)
    head = {
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, one core",
        "families": {a.name: a.family for a in ARCHITECTURES},
    }
    for architecture in ARCHITECTURES:
        if arguments.architectures and architecture.name not in arguments.architectures:
            continue
        wanted = [
            key
            for target in arguments.target or TARGETS
            for precision in arguments.precision or PRECISIONS
            for key in [(architecture.name, target, precision)]
            if arguments.all or arguments.architectures or key not in cells or cells[key].status == "failed"
        ]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepared = isolated(_prepare, architecture, folder)
            _say(f"{architecture.name}: program in {prepared['seconds']} s {prepared.get('reason', '')}")
            for key in wanted:
                found = isolated(_run, *key[1:], folder) if "status" not in prepared else prepared
                cell = _limited(Cell(*key, **found))
                cells[key] = cell
                write_cells(cells, head, arguments.results)
                _say(
                    f"  {cell.target} {cell.precision} {cell.written}: {cell.status} in {cell.seconds} s {cell.reason}"
                )
    _say(page(arguments.results))


def _limited(cell: Cell) -> Cell:
    """``not supported`` where a known limit of the target explains the failure."""
    for limit in LIMITS:
        if cell.status == "failed" and cell.target == limit.target and re.search(limit.pattern, cell.reason):
            return replace(cell, status="not supported", reason=limit.reason)
    return cell


if __name__ == "__main__":
    main()
