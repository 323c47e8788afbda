"""Core AI (``.aimodel``): Apple's format since iOS 27, macOS 27.

=========  ==========================================================================================================
fp32       The program.
fp16       Stored and computed in half.
w8         The program's int8 weights and scales, as the format's own dequantize operators.
w8a8       The program's quantize and dequantize nodes, one for one: the same scales.
=========  ==========================================================================================================

The runtime that comes with ``coreai-core`` proves a file on Linux (x86_64) and macOS. It is a reference: what it
computes counts, how long it takes does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import weakref
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np
from torch.export import ExportedProgram

from edgekd.contents import Contents
from edgekd.errors import DataError, ExportError, ModelFileError, UsageError, first_line
from edgekd.exporting.parity import conversions, fitting
from edgekd.programs.models import input_specs, output_specs
from edgekd.protocols import Arrays, Exporter, Options
from edgekd.quiet import quiet, quiet_native
from edgekd.types import Precision, Student, TensorSpec

from ._coreai_contents import read_contents
from ._coreai_graph import prepared
from ._half import halved

__all__ = ["EXPORTER", "CoreAIExporter", "CoreAIRunner"]

FACTS = "edgekd"
"""Under this key of the asset's own metadata an app finds the card's facts."""

_ENTRY = "main"

Result = TypeVar("Result")


class CoreAIExporter:
    """Target ``coreai``; see :class:`edgekd.protocols.Exporter`. The file is a package folder."""

    suffix = ".aimodel"
    requires: tuple[str, ...] = ("coreai_torch", "coreai")
    extra = "coreai"
    precisions = conversions("fp32", "fp16", "w8", "w8a8", "w4a8", "auto")
    options = Options

    def write(self, student: Student, path: Path, precision: Precision, options: Options = Options()) -> None:
        """Write a package for a batch of one; the same program and card give the same bytes.

        Raises:
            UsageError: The program is not in the precision that this one is written from.
            ExportError: The converter refuses; the message names the operator.
        """
        source = self.precisions[precision].source
        if student.card.precision != source:
            raise UsageError(
                f"coreai {precision} is written from a program in {source}; this is {student.card.precision}"
            )
        with quiet(), quiet_native():
            program = halved(student.program) if precision == "fp16" else prepared(student.program)
            _convert(student, program).save_asset(path)
        _describe(student, path, precision)

    def load(self, path: Path) -> CoreAIRunner:
        """Load a package in Core AI's runtime.

        Raises:
            ModelFileError: The package is missing, damaged or of another format.
        """
        return CoreAIRunner(path)

    def contents(self, path: Path) -> Contents:
        """What the package really holds; see :mod:`._coreai_contents`."""
        _check_intact(path)
        with quiet(), quiet_native():
            return read_contents(path)


class CoreAIRunner:
    """A loaded package; see :class:`edgekd.protocols.Runner`. The runtime is asynchronous; a thread waits for it."""

    def __init__(self, path: Path) -> None:
        _check_intact(path)
        with quiet(), quiet_native():
            from coreai.authoring import AIModelAsset

            self._waiter = _Waiter()
            try:
                asset = AIModelAsset.load(path)
                # Off Apple's systems this compiles into a folder of its own, which lives as long as the runner.
                executable = asset.executable()
                model = self._waiter.wait(executable.__aenter__())
                self._function = model.load_function(_ENTRY)
            except (RuntimeError, KeyError, ValueError, OSError) as error:
                raise ModelFileError(f"{path} cannot be loaded by Core AI: {first_line(error)}") from error
        weakref.finalize(self, _close, self._waiter, executable)
        described = self._function.desc
        facts = _facts(path)
        self.inputs = _specs(described, "input", facts.get("inputs"))
        self.outputs = _specs(described, "output", facts.get("outputs"))

    @property
    def runtime(self) -> str:
        return f"Core AI {version('coreai-core')}"

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once.

        Raises:
            DataError: An input is missing, has another shape, or holds what the model cannot take.
        """
        from coreai.runtime import NDArray

        arrays = fitting(self.inputs, inputs)
        feed = {spec.name: NDArray(array) for spec, array in zip(self.inputs, arrays, strict=True)}
        try:
            with quiet_native():
                outputs = self._waiter.wait(self._function(feed))
        except RuntimeError as error:
            raise DataError(f"Core AI cannot run these inputs: {first_line(error)}") from error
        return {spec.name: np.array(outputs[spec.name].numpy()) for spec in self.outputs}


EXPORTER: Exporter = CoreAIExporter()


class _Waiter:
    """An event loop in a thread of its own: the caller may have one running already (a notebook does)."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="coreai").start()

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


def _close(waiter: _Waiter, executable: Any) -> None:
    waiter.wait(executable.__aexit__(None, None, None))
    waiter.stop()


def _convert(student: Student, program: ExportedProgram) -> Any:
    import coreai_torch
    from coreai_torch.debugging.debug_info import strip_debug_info

    inputs, outputs = input_specs(program), output_specs(program)
    try:
        decomposed = program.run_decompositions(coreai_torch.get_decomp_table())
        converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
        converter.add_exported_program(
            decomposed,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            entrypoint_name=_ENTRY,
        )
        with _repeatable_names():
            converted = converter.to_coreai()
        strip_debug_info(converted)  # where each operator stood, in whose file
        return converted
    except Exception as error:
        raise ExportError(f"coreai-torch refuses {student.card.name!r}: {first_line(error)}") from error


@contextmanager
def _repeatable_names() -> Iterator[None]:
    """The same names in every run, where coreai-core 1.0.0b3 draws lots.

    It ends the names of inner graphs in letters from ``secrets.choice``, and calls each large constant after a hash
    whose seed is another in every process.
    """
    from coreai.authoring import func, graph_builder  # isort: skip - coreai's modules import each other in this order
    from coreai._compiler._mlir_libs._coreaiIR._bindings.mlir.dialects import coreai as bindings
    from coreai._compiler.dialects.coreai import constant
    from coreai._compiler.ir import DenseResourceElementsAttr

    choice, create = func.choice, bindings.create_elements_attr

    def named_by_content(location: Any, kind: Any, data: Any) -> Any:
        made = create(location, kind, data)
        if not DenseResourceElementsAttr.isinstance(made):
            return made
        array = np.ascontiguousarray(data)
        return DenseResourceElementsAttr.get_from_buffer(array, hashlib.sha256(array.tobytes()).hexdigest()[:16], kind)

    func.choice = graph_builder.choice = Random(0).choice
    bindings.create_elements_attr = constant.create_elements_attr = named_by_content
    try:
        yield
    finally:
        func.choice = graph_builder.choice = choice
        bindings.create_elements_attr = constant.create_elements_attr = create


def _describe(student: Student, path: Path, precision: Precision) -> None:
    """Write what an app needs to know into the metadata, and leave out when it was written."""
    card = student.card
    metadata = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
    metadata.pop("creationDate", None)
    metadata["creatorDefinedMetadata"] = {
        FACTS: {
            "name": card.name,
            "precision": precision,
            "inputs": [spec.name for spec in input_specs(student.program)],
            "outputs": [spec.name for spec in output_specs(student.program)],
            "labels": list(card.labels),
            "preprocessing": card.preprocessing,
        }
    }
    text = json.dumps(metadata, indent=2, sort_keys=True, ensure_ascii=False)
    (path / "metadata.json").write_text(text, encoding="utf-8")


def _check_intact(path: Path) -> None:
    """The package holds a program, and the program is the one that the package has a hash of: the runtime looks not."""
    if not path.is_dir():
        raise ModelFileError(f"no model package at {path}")
    program, digest = path / "main.mlirb", path / "main.hash"
    if not program.is_file() or not (path / "metadata.json").is_file():
        raise ModelFileError(f"{path} is not a Core AI package: it lacks main.mlirb or metadata.json")
    if digest.is_file() and hashlib.sha256(program.read_bytes()).digest() != digest.read_bytes():
        raise ModelFileError(f"{path} is damaged: the program's sha256 is not the one that stands beside it")


def _facts(path: Path) -> dict[str, Any]:
    return (
        json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        .get("creatorDefinedMetadata", {})
        .get(FACTS, {})
    )


def _specs(described: Any, what: str, order: list[str] | None) -> tuple[TensorSpec, ...]:
    """Inputs or outputs, in the order of the program where the package tells it."""
    names = list(getattr(described, f"{what}_names"))
    if order and set(order) == set(names):
        names = order
    specs = []
    for name in names:
        tensor = getattr(described, f"{what}_descriptor")(name)
        specs.append(TensorSpec(name, tuple(tensor.shape), str(tensor.dtype)))
    return tuple(specs)
