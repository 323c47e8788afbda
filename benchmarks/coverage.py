"""What edgekd's exports take: every architecture of :mod:`edgekd.benchmarks.architectures` x target x precision.

Each cell goes edgekd's own way (a program, ``compress``, ``export_student`` with its proof) in a process of its own, with
limits on time and memory: a crash or a hang is a result. What passed stays in ``benchmarks/results/coverage.json``; a
further run does only the rest. timm and torchvision want another torch than ``constraints.txt``, hence an environment::

    python -m venv .venv-coverage
    grep -v '^torch==' constraints.txt > /tmp/constraints.txt
    .venv-coverage/bin/pip install -c /tmp/constraints.txt torch==2.14.1 torchvision==0.29.1 timm==1.0.31 -e '.[all]'
    .venv-coverage/bin/python -m edgekd.benchmarks.coverage

With ``--write-table`` nothing is run: ``docs/coverage.md`` is made from the results.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekd.errors import EdgekdError, ParityError
from edgekd.store import atomic_write, hash_path, load_student, save_student

if TYPE_CHECKING:
    from edgekd.types import Student

    from .architectures import Architecture

__all__ = ["PRECISIONS", "TARGETS", "Cell", "page", "read_cells"]

TARGETS = ("onnx", "coreml", "tflite")
PRECISIONS = ("fp32", "fp16", "int8")
RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"

_LONGEST_S = 180.0  # of processor time
_PATIENCE_S = 1200.0  # for a hang
_LARGEST_BYTES = 6 * 2**30
_CALIBRATION, _PROOF, _SETTLING = 16, 4, 32  # samples
_PACKAGES = ("torch", "torchvision", "timm", "transformers", "torchao", "coremltools", "litert-torch", "ai-edge-litert")
_PACKAGES += ("ai-edge-quantizer", "onnx", "onnxscript", "onnxruntime", "numpy")

_LEAST_SIGNAL = {"fp32": 0.999, "fp16": 0.9}
"""Smallest cosine after each output lost its mean over the samples: an untrained network says nearly the same to every
input, so that a file which ignores its input could pass parity. int8 is not held to it: there, rounding is of the size
of what so few random samples differ by."""


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
    def key(self) -> tuple[str, str, str]:
        return self.architecture, self.target, self.precision


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
    """Build, settle, export and store an architecture with its samples; the program must compute what the module does."""
    import torch

    from edgekd.models import count_parameters, export_program, flatten_outputs, input_specs, output_specs, run_program
    from edgekd.types import Card, Student

    from .architectures import settle

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
    from edgekd.compress import compress
    from edgekd.export import Proof, export_student, resolve_precision

    exporter = plugins.load_exporter(target)
    arrays = dict(np.load(folder / "samples.npz"))
    student, _ = load_student(folder / "fp32")
    written, _ = resolve_precision(precision, target, exporter, student)
    source = exporter.precisions[written].source
    if (folder / source).is_dir():
        student, _ = load_student(folder / source)
    else:
        student = compress(student, source, {name: array[:_CALIBRATION] for name, array in arrays.items()})
        save_student(folder / source, student, {})
    proof = {name: array[-_PROOF:] for name, array in arrays.items()}
    facts: dict[str, Any] = {"written": written}
    try:
        artifact = export_student(student, {}, target, written, folder / f"{target}-{precision}", Proof(proof))
    except EdgekdError as error:
        return facts | {"status": "failed", "reason": _one_line(str(error))}
    parity = artifact.parity
    signal = _signal(student, exporter.load(folder / f"{target}-{precision}" / artifact.path), proof)
    facts |= {"size_bytes": artifact.size_bytes, "max_abs": parity.max_abs, "cosine": parity.cosine, "signal": signal}
    if signal < _LEAST_SIGNAL.get(precision, -1.0):
        return facts | {"status": "failed", "reason": f"passes parity, but what the input changes differs: {signal:.4f}"}
    return facts | {"status": "passed"}


def _signal(student: Student, runner: Any, samples: Mapping[str, np.ndarray]) -> float:
    """Smallest cosine over the outputs, each without its mean over the samples; 1 where nothing is left."""
    from edgekd.models import run_program
    from edgekd.parity import run_file

    cosines = [1.0]
    for a, b in zip(run_program(student.program, samples).values(), run_file(runner, samples), strict=True):
        a, b = a - a.mean(0, keepdims=True), b - b.mean(0, keepdims=True)
        size = float(np.linalg.norm(a) * np.linalg.norm(b))
        if np.linalg.norm(a) > 1e-5 * max(1.0, float(np.abs(a).max())):
            cosines.append(float((a * b).sum()) / size if size else 0.0)
    return min(cosines)


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _import_everything() -> None:
    """Once, before processes are forked: an import costs more than most cells."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    from edgekd.quiet import quiet

    with quiet():
        import ai_edge_litert.interpreter
        import ai_edge_quantizer.quantizer
        import coremltools.converters.mil.frontend.torch
        import litert_torch
        import onnxruntime.quantization
        import onnxscript
        import timm
        import torch
        import torchao.quantization.pt2e.quantize_pt2e
        import torchvision
        import transformers  # noqa: F401

        import edgekd.export

        from . import architectures  # noqa: F401
        edgekd.export.toolchain(edgekd.plugins.load_exporter("onnx"))  # reads the list of all packages once
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported is not searched for garbage in every process


def _isolated(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run a function in a forked process; what happened to it is the result, whatever it was."""
    import psutil

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as said:
        process = context.Process(target=_child, args=(sender, said.name, work, arguments))
        start, peak, busy, answer = time.monotonic(), 0, 0.0, None
        process.start()
        sender.close()
        watched = psutil.Process(process.pid)
        while answer is None:
            if receiver.poll(0.1):
                try:
                    answer = receiver.recv()
                except EOFError:  # it died without a word
                    break
            try:
                peak, busy = max(peak, watched.memory_info().rss), sum(watched.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
            if peak > _LARGEST_BYTES:
                answer = {"status": "failed", "reason": f"takes more than {_LARGEST_BYTES / 2**30:.0f} GiB of memory"}
            elif busy > _LONGEST_S or time.monotonic() - start > _PATIENCE_S:
                answer = {"status": "failed", "reason": f"takes longer than {_LONGEST_S:.0f} s"}
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
        if answer is None:
            words = _one_line(Path(said.name).read_text(errors="replace")[-300:])
            answer = {"status": "failed", "reason": f"the process died with {process.exitcode}: {words}"}
    return answer | {"seconds": round(busy, 1), "peak_mb": peak // 10**6}


def _child(sender: Any, said: str, work: Callable[..., dict[str, Any]], arguments: Sequence[Any]) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        answer = work(*arguments)
    except EdgekdError as error:
        answer = {"status": "failed", "reason": _one_line(str(error))}
    except BaseException as error:  # noqa: BLE001 - a crash is a result
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error}"
        answer = {"status": "failed", "reason": f"crash, {_one_line(words)} ({Path(frame.filename).name}:{frame.lineno})"}
    sender.send(answer)
    sender.close()
    os._exit(0)  # no exit handlers of the parent


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"failed its proof and is kept in \S+: ", "parity: ", text)
    return text if len(text) <= 300 else text[:297] + "..."


# ── results ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_cells(path: Path = RESULTS) -> dict[tuple[str, str, str], Cell]:
    """All cells that were run, by architecture, target and precision."""
    if not path.is_file():
        return {}
    return {cell.key: cell for cell in (Cell(**entry) for entry in json.loads(path.read_text())["cells"])}


def _write_cells(cells: Mapping[tuple[str, str, str], Cell], path: Path) -> None:
    """One line a cell, so that a change can be read."""
    from .architectures import ARCHITECTURES

    order = {a.name: i for i, a in enumerate(ARCHITECTURES)}
    known = [cell for cell in cells.values() if cell.architecture in order]
    known.sort(key=lambda c: (order[c.architecture], TARGETS.index(c.target), PRECISIONS.index(c.precision)))
    empty = (None, "", 0, 0.0)
    lines = [json.dumps({k: v for k, v in asdict(c).items() if k == "status" or v not in empty}) for c in known]
    head = {
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, one core",
        "families": {a.name: a.family for a in ARCHITECTURES},
    }
    opening = json.dumps(head, indent=1)[:-2]
    atomic_write(path, f'{opening},\n "cells": [\n  {(chr(44) + chr(10) + "  ").join(lines)}\n ]\n}}\n'.encode())


def page(path: Path = RESULTS) -> str:
    """``docs/coverage.md``."""
    data, cells = json.loads(path.read_text()), read_cells(path)
    columns = [(target, precision) for target in TARGETS for precision in PRECISIONS]
    lines = [
        "# Coverage",
        "",
        "Which architectures come through, on which target, in which precision. Written by `python tests/test_docs.py` from",
        "`benchmarks/results/coverage.json`; the run is `python -m edgekd.benchmarks.coverage` (its docstring says how to make",
        "the environment). Weights are random, models are small; the code is that of timm, torchvision and transformers.",
        "",
        "*passed*: the file was written, loaded by its own runtime (Core ML: edgekd's evaluator) and is as near to its program",
        "as `edgekd export` demands. *not supported*: the target's format or runtime cannot do it. All else is *failed*.",
        "Seconds are of one core's time, from the program to the proven file, quantization included.",
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


def _share(cells: Any, target: str | None, precision: str) -> str:
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


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="run only these, also where they passed")
    parser.add_argument("--target", action="append", choices=TARGETS, help="run only this one")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="run only this one")
    parser.add_argument("--all", action="store_true", help="run what passed again, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--write-table", action="store_true", help="run nothing; write docs/coverage.md")
    return parser.parse_args()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run what is asked; print each cell, and at the end the page."""
    arguments = _arguments()
    if arguments.write_table:
        PAGE.write_text(page(arguments.results))
        return
    _import_everything()
    from .architectures import ARCHITECTURES

    unknown = set(arguments.architectures) - {a.name for a in ARCHITECTURES}
    if unknown:
        sys.exit(f"no architecture called {', '.join(sorted(unknown))}; there are {', '.join(a.name for a in ARCHITECTURES)}")
    cells = read_cells(arguments.results)
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
            prepared = _isolated(_prepare, architecture, folder)
            _say(f"{architecture.name}: program in {prepared['seconds']} s {prepared.get('reason', '')}")
            for key in wanted:
                found = _isolated(_run, *key[1:], folder) if "status" not in prepared else prepared
                cell = _limited(Cell(*key, **found))
                cells[key] = cell
                _write_cells(cells, arguments.results)
                _say(f"  {cell.target} {cell.precision} {cell.written}: {cell.status} in {cell.seconds} s {cell.reason}")
    _say(page(arguments.results))


def _limited(cell: Cell) -> Cell:
    """``not supported`` where a known limit of the target explains the failure."""
    for limit in LIMITS:
        if cell.status == "failed" and cell.target == limit.target and re.search(limit.pattern, cell.reason):
            return replace(cell, status="not supported", reason=limit.reason)
    return cell


if __name__ == "__main__":
    main()
