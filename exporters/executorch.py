"""ExecuTorch (``.pte``), with XNNPACK: PyTorch's own runtime on phones and boards.

=========  ==========================================================================================================
fp32       The program; XNNPACK takes what it can, ExecuTorch's portable kernels the rest.
fp16       Computed in half, but for normalizations; XNNPACK keeps the weights of convolutions in float.
w8d8       The int8 weights of a ``w8`` program; linear layers quantize their inputs as they come, row by row.
w8a8       The program's quantize and dequantize nodes: the same scales, XNNPACK's integer kernels.
=========  ==========================================================================================================

There is no ``w8``: XNNPACK has no kernel for int8 weights and float activations, and ExecuTorch would make all weights
float again in every inference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.contents import Contents
from edgekd.errors import DataError, ExportError, ModelFileError, UsageError
from edgekd.exporting.parity import TOLERANCES, conversions, fitting
from edgekd.programs.models import input_specs, output_specs
from edgekd.protocols import Arrays, Exporter, Options
from edgekd.quiet import quiet, quiet_native
from edgekd.types import Conversion, Precision, Student, TensorSpec

from ._executorch_contents import DTYPES, read_contents
from ._executorch_graph import prepared
from ._half import halved

__all__ = ["EXPORTER", "ExecuTorchExporter", "ExecuTorchRunner"]

FACTS = "edgekd"
"""A method of the file that takes nothing and returns the card's facts as JSON: the format has no other place."""

# torch 2.13 with ExecuTorch 1.5.1: the portable kernel sums the squares of half precision in half precision, and a row
# of 384 comes out a quarter of what it is (tests/test_exporter_executorch.py shows it).
_IN_FLOAT = {torch.ops.aten.layer_norm.default, torch.ops.aten.group_norm.default, torch.ops.aten.batch_norm.default}


class ExecuTorchExporter:
    """Target ``executorch``; see :class:`edgekd.protocols.Exporter`."""

    suffix = ".pte"
    requires: tuple[str, ...] = ("executorch",)
    extra = "executorch"
    precisions: Mapping[Precision, Conversion] = {
        **conversions("fp32", "fp16", "w8a8", "w4a8", "auto"),
        "w8d8": Conversion("w8", TOLERANCES["w8d8"]),
    }
    options = Options

    def write(self, student: Student, path: Path, precision: Precision, options: Options = Options()) -> None:
        """Write a file for a batch of one; the same program and card give the same bytes.

        Raises:
            UsageError: The program is not in the precision that this one is written from.
            ExportError: ExecuTorch refuses an operator, or ``w8d8`` finds no linear layer or embedding.
        """
        source = self.precisions[precision].source
        if student.card.precision != source:
            raise UsageError(
                f"executorch {precision} is written from a program in {source}; this is {student.card.precision}"
            )
        with quiet():
            if precision == "fp16":
                program = halved(student.program, _IN_FLOAT)
            else:
                program = prepared(student.program, dynamic=precision == "w8d8")
            path.write_bytes(_lower(student, program, _facts(student, precision)))

    def load(self, path: Path) -> ExecuTorchRunner:
        """Load a file in ExecuTorch's runtime, on one thread.

        Raises:
            ModelFileError: The file is missing, damaged or of another format, or its kernels are not in this build.
        """
        if not path.is_file():
            raise ModelFileError(f"no model file at {path}")
        if path.read_bytes()[4:6] != b"ET":
            raise ModelFileError(f"{path} is not an ExecuTorch file: it does not start like one")
        with quiet(), quiet_native() as said:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            portable_lib._unsafe_reset_threadpool(1)
            try:
                program = Runtime.get().load_program(path)
                method = program.load_method("forward")
                facts = _read_facts(program)
            except (RuntimeError, ValueError, KeyError) as error:
                raise ModelFileError(f"{path} cannot be loaded by ExecuTorch: {_reason(error, said())}") from error
        return ExecuTorchRunner(method, facts)

    def contents(self, path: Path) -> Contents:
        """What the file really holds; operators that XNNPACK took are called ``xnnpack.<node>``."""
        with quiet():
            return read_contents(path.read_bytes())


class ExecuTorchRunner:
    """A loaded file; see :class:`edgekd.protocols.Runner`.

    The format numbers inputs and outputs; their names are among the facts that edgekd writes into its files, and are
    ``input_0``, ``output_0`` … in files of others.
    """

    def __init__(self, method: Any, facts: Mapping[str, Any]) -> None:
        self._method = method
        meta = method.metadata
        self.inputs = _specs(facts.get("inputs"), "input", meta.num_inputs(), meta.input_tensor_meta)
        self.outputs = _specs(facts.get("outputs"), "output", meta.num_outputs(), meta.output_tensor_meta)

    @property
    def runtime(self) -> str:
        return f"ExecuTorch {version('executorch')} (XNNPACK)"

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once.

        Raises:
            DataError: An input is missing, has another shape, or holds what the model cannot take.
        """
        tensors = [torch.from_numpy(array) for array in fitting(self.inputs, inputs)]
        with quiet_native() as said:
            try:
                outputs = self._method.execute(tensors)
            except RuntimeError as error:
                raise DataError(f"ExecuTorch cannot run these inputs: {_reason(error, said())}") from error
        return {spec.name: output.numpy() for spec, output in zip(self.outputs, outputs, strict=True)}


EXPORTER: Exporter = ExecuTorchExporter()


def _lower(student: Student, program: Any, facts: str) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods={FACTS: facts})
        return bytes(edge.to_executorch().buffer)
    except Exception as error:
        raise ExportError(f"ExecuTorch cannot translate {student.card.name!r}: {_reason(error, '')}") from error


def _facts(student: Student, precision: Precision) -> str:
    card = student.card
    facts = {
        "name": card.name,
        "precision": precision,
        "inputs": [spec.name for spec in input_specs(student.program)],
        "outputs": [spec.name for spec in output_specs(student.program)],
        "labels": list(card.labels),
        "preprocessing": card.preprocessing,
    }
    return json.dumps(facts, sort_keys=True)


def _read_facts(program: Any) -> dict[str, Any]:
    if FACTS not in program.method_names:
        return {}
    (text,) = program.load_method(FACTS).execute([])
    return json.loads(text)


def _specs(names: Sequence[str] | None, what: str, count: int, tensor_meta: Any) -> tuple[TensorSpec, ...]:
    names = names or [f"{what}_{index}" for index in range(count)]
    infos = [tensor_meta(index) for index in range(count)]
    return tuple(
        TensorSpec(name, tuple(info.sizes()), DTYPES.get(info.dtype(), f"type {info.dtype()}"))
        for name, info in zip(names, infos, strict=True)
    )


def _reason(error: Exception, said: str) -> str:
    """One line of what ExecuTorch says: of its log where that tells more than the exception does."""
    lines = [line.strip() for line in (*said.splitlines(), *str(error).splitlines()) if line.strip()]
    telling = [line for line in lines if any(word in line for word in ("rror", "issing", "nvalid", "ailed"))]
    found = [line for line in telling if "cpuinfo" not in line] or lines or [type(error).__name__]
    return found[0]
