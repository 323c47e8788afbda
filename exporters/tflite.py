"""LiteRT (TFLite) files, by litert-torch and ai-edge-quantizer; run by LiteRT's interpreter.

=========  ==========================================================================================================
fp32       The program, with the channels last inside.
fp16       Weights stored in half and widened when the file is loaded: half the size, float arithmetic.
w8         The program's int8 weights and scales, widened when the file is loaded.
w8d8       Int8 weights; the kernels quantize activations as they come (ai-edge-quantizer's dynamic range).
w4d8       The same with weights of linear layers and embeddings in int4, one half scale for each 32 numbers; layers
           whose inputs are no multiple of 32 stay as in w8d8.
w8a8       The program's quantize and dequantize nodes, one for one: the same scales, integer kernels.
w8a16      The same with int16 activations: for NPUs; on processors LiteRT has reference kernels only.
=========  ==========================================================================================================

Inputs and outputs are float32, or the integer type of the program, in every precision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.contents import Contents
from edgekd.errors import DataError, ExportError, ModelFileError
from edgekd.fold import folded_module
from edgekd.models import input_specs, output_specs
from edgekd.parity import conversions, fitting
from edgekd.precisions import STATIC, WIDE
from edgekd.protocols import Arrays
from edgekd.quiet import quiet_native
from edgekd.tracing import retrace
from edgekd.types import Conversion, Precision, Student, TensorSpec, Tolerance

from ._sizes import check_open, few_of, sizes
from ._tflite_contents import read_contents
from ._tflite_convert import convert, first_line, quiet, requantize
from ._tflite_edit import integer_edges, with_activations_of_16_bits, with_open_batch, with_weights_of_4_bits
from ._tflite_graph import prepare, program_precision
from ._tflite_metadata import check_intact, read_metadata, write_with_metadata
from ._tflite_options import TFLiteOptions

__all__ = ["EXPORTER", "LiteRTRunner", "TFLiteExporter", "read_metadata"]


W4D8_TOLERANCE = Tolerance(None, 0.93, 0.75)
"""Real models lose more to 4 bits than to 8: MiniLM's sentence vectors come to a cosine of 0.961 (w8d8: 0.998)."""


_DEFAULTS = TFLiteOptions()


class TFLiteExporter:
    """Target ``tflite``; see :class:`edgekd.protocols.Exporter`."""

    suffix = ".tflite"
    requires = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")
    extra = "tflite"
    precisions: Mapping[Precision, Conversion] = {
        **conversions("fp32", "fp16", "w8", "w8d8", "w8a8", "w4a8", "w8a16", "auto"),
        "w4d8": Conversion("fp32", W4D8_TOLERANCE),
    }
    options = TFLiteOptions

    def write(self, student: Student, path: Path, precision: Precision, options: TFLiteOptions = _DEFAULTS) -> None:
        """Write a file for a batch of one, or for those asked for; the same program and card give the same bytes.

        The file's signature has the program's input and output names; :func:`read_metadata` gives the card's facts.

        Raises:
            ExportError: The program is not in the precision that this one is written from, the converter refuses an
                operator, or LiteRT cannot load what was written.
            ModelFileError: The program has a dynamic axis besides the batch.
        """
        program = student.program
        module = folded_module(program)
        source = self.precisions[precision].source
        if (found := program_precision(module)) != ("w8a8" if source in STATIC and source != WIDE else source):
            raise ExportError(
                f"tflite {precision} is made from a program in {source}; {student.card.name!r} is {found}"
            )
        batch = sizes(options.batch, "tflite", "batch")
        if batch != (1,):
            check_open(program, "tflite", options.batch, "")
        prepared = prepare(module)
        converted = {}
        for size in batch if len(batch) == 1 else (2, 3):
            with quiet():
                fixed = retrace(prepared, program, batch=size)
            inputs, outputs = input_specs(fixed), output_specs(fixed)  # before the converter rewrites the program
            wide = any(spec.dtype in ("int64", "float64") for spec in (*inputs, *outputs))
            names = [s.name for s in inputs], [s.name for s in outputs]
            converted[size] = convert(fixed, *names, options.signature, keep_64_bit=wide)
        if len(batch) > 1:
            content = with_open_batch(converted[2], converted[3])
            inputs, outputs = (
                tuple(replace(spec, shape=(-1, *spec.shape[1:])) for spec in specs) for specs in (inputs, outputs)
            )
        else:
            content = converted[batch[0]]
        if precision == "w4a8":
            content = with_weights_of_4_bits(content, options.int4_convolutions)
        if precision == WIDE:
            content = with_activations_of_16_bits(content)
        if precision in ("fp16", "w8d8", "w4d8"):
            content = requantize(content, precision)
        if (applied := options.applied(student, {})[0]) is not student:
            content = integer_edges(
                content, options.inference_input_type != "float32", options.inference_output_type != "float32"
            )
            inputs, outputs = (
                tuple(replace(spec, dtype=told.dtype) for spec, told in zip(specs, changed, strict=True))
                for specs, changed in ((inputs, applied.card.inputs), (outputs, applied.card.outputs))
            )
        runner = _verify(content, inputs, outputs, precision)
        facts = {"batch": options.batch} if len(batch) > 1 else {}
        write_with_metadata(path, content, student.card, precision, runner.inputs, runner.outputs, facts)
        if precision == "w4d8" and all(weight.dtype != "int4" for weight in read_contents(path).weights):
            path.unlink()
            raise ExportError(
                "w4d8 quantizes linear layers and embeddings whose inputs come in blocks of 32, and this model has "
                "none; take w8d8, or w8a8, which quantizes convolutions too"
            )

    def load(self, path: Path) -> LiteRTRunner:
        """Load a file in LiteRT's interpreter: one thread, XNNPACK where it has a kernel.

        Raises:
            ModelFileError: The file is missing, damaged, of another format, or has several signatures.
        """
        check_intact(path)
        try:
            return LiteRTRunner(_interpreter(model_path=str(path)), read_metadata(path).get("batch"))
        except (RuntimeError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be loaded by LiteRT: {_refusal(error)}") from error

    def contents(self, path: Path) -> Contents:
        """Operators and constants in the file.

        Raises:
            ModelFileError: The file is missing or damaged.
        """
        check_intact(path)
        return read_contents(path)


class LiteRTRunner:
    """A loaded file; see :class:`edgekd.protocols.Runner`. Inputs and outputs go by the names in its signature."""

    def __init__(self, interpreter: Any, batch: str | None = None) -> None:
        """Wrap an interpreter whose tensors are allocated.

        Args:
            batch: The sizes that the file is for, as the options say them, where its batch is open.

        Raises:
            ValueError: The file has several signatures.
        """
        self._interpreter = interpreter
        signatures = interpreter.get_signature_list()
        if len(signatures) > 1:
            raise ValueError(f"it has {len(signatures)} signatures; one was expected")
        names: tuple[dict[int, str], dict[int, str]] = ({}, {})
        for key in signatures:  # the signature's order is alphabetical, that of the tensors is the program's
            signature = interpreter.get_signature_runner(key)
            details = signature.get_input_details(), signature.get_output_details()
            names = tuple({d["index"]: name for name, d in part.items()} for part in details)  # type: ignore[assignment]
        self._inputs = _named(interpreter.get_input_details(), names[0])
        self._outputs = _named(interpreter.get_output_details(), names[1])
        self._batch = 1
        first = self.inputs[0].shape[:1] if self._inputs else ()
        self.batch_sizes = few_of(sizes(batch, "tflite", "batch")) if batch else (max(1, *first, 1),)

    @property
    def runtime(self) -> str:
        return f"LiteRT {version('ai-edge-litert')}"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for _, spec in self._inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for _, spec in self._outputs)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once.

        Raises:
            DataError: An input is missing, has another shape, or holds a value that the model cannot take (a token id
                beyond its embedding).
        """
        arrays = fitting(self.inputs, inputs)
        try:
            self._resize(arrays)
            for (index, _), array in zip(self._inputs, arrays, strict=True):
                self._interpreter.set_tensor(index, array)
            self._interpreter.invoke()
        except RuntimeError as error:
            raise DataError(f"LiteRT cannot run these inputs: {_refusal(error)}") from error
        return {spec.name: self._interpreter.get_tensor(index) for index, spec in self._outputs}

    def _resize(self, arrays: Sequence[np.ndarray]) -> None:
        """Make room for another batch than that of the last call, where the file leaves it open."""
        open_ones = [(index, a) for (index, spec), a in zip(self._inputs, arrays, strict=True) if -1 in spec.shape]
        if open_ones and len(open_ones[0][1]) != self._batch:
            for index, array in open_ones:
                self._interpreter.resize_tensor_input(index, array.shape, strict=True)
            self._interpreter.allocate_tensors()
            self._batch = len(open_ones[0][1])


EXPORTER = TFLiteExporter()


def _named(details: Sequence[dict[str, Any]], names: dict[int, str]) -> list[tuple[int, TensorSpec]]:
    """Tensor indices and specs in the file's order; a file without a signature has tensor names only."""
    return [
        (
            detail["index"],
            TensorSpec(
                name=names.get(detail["index"], detail["name"]),
                shape=tuple(int(size) for size in (*detail["shape_signature"],) or detail["shape"]),
                dtype=np.dtype(detail["dtype"]).name,
            ),
        )
        for detail in details
    ]


def _interpreter(*, plain: bool = False, **model: Any) -> Any:
    """LiteRT's interpreter; ``plain`` without XNNPACK, which is less strict than the kernels that it replaces."""
    with quiet_native():
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if plain else OpResolverType.AUTO
        interpreter = Interpreter(**model, num_threads=1, experimental_op_resolver_type=resolver)
        interpreter.allocate_tensors()
    return interpreter


def _verify(
    content: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], precision: Precision
) -> LiteRTRunner:
    """Load what was written, and compare its inputs and outputs with the program's: converters have got both wrong."""
    try:
        runner = LiteRTRunner(_interpreter(plain=True, model_content=content))
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"LiteRT cannot load the {precision} file that was made: {_refusal(error)}") from error
    for wanted, got in ((inputs, runner.inputs), (outputs, runner.outputs)):
        want = [(spec.name, spec.shape, spec.dtype) for spec in wanted]
        have = [(spec.name, spec.shape, spec.dtype) for spec in got]
        if want != have:
            raise ExportError(f"the converter made {have} out of {want}; litert-torch 0.10 is known to keep them")
    return runner


def _refusal(error: Exception) -> str:
    """What LiteRT says, with the operator in it."""
    text = str(error)
    node = re.search(r"Node number \d+ \(([^)]+)\)", text)
    line = first_line(text)
    return f"{line} (operator {node.group(1)})" if node and node.group(1) not in line else line
