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
from torch.export import ExportedProgram
from torch.fx import GraphModule

from edgekd.contents import Contents
from edgekd.errors import DataError, ExportError, ModelFileError, UsageError
from edgekd.exporting.parity import conversions, fitting
from edgekd.precisions import STATIC, WIDE
from edgekd.programs.fold import folded_module
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import retrace
from edgekd.protocols import Arrays, Runner
from edgekd.quiet import quiet_native
from edgekd.types import Conversion, Json, Precision, Student, TensorSpec, Tolerance

from ._sizes import check_open, few_of, sizes
from ._tflite_contents import read_contents
from ._tflite_convert import Signature, convert, first_line, quiet, requantize
from ._tflite_decoder import DECODE, Kept, prefill_lengths, signatures
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
    cached_precisions: tuple[Precision, ...] = ("fp32", "fp16", "w8", "w8d8", "w4d8")
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
        facts: Json
        if student.card.decoder is not None:
            lengths = prefill_lengths(student, options)
            with quiet():
                several = list(signatures(prepare(module), program, lengths))
            inputs, outputs = _specs(several[0])
            content = convert(several, keep_64_bit=False)
            facts = {**student.card.decoder.to_json(), "prefill": list(lengths)}
        else:
            content, inputs, outputs = _single(prepare(module), program, options)
            facts = {"batch": options.batch} if -1 in inputs[0].shape else {}
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
        write_with_metadata(path, content, student.card, precision, runner.inputs, runner.outputs, facts)
        if precision == "w4d8" and all(weight.dtype != "int4" for weight in read_contents(path).weights):
            path.unlink()
            raise ExportError(
                "w4d8 quantizes linear layers and embeddings whose inputs come in blocks of 32, and this model has "
                "none; take w8d8, or w8a8, which quantizes convolutions too"
            )

    def load(self, path: Path) -> Runner:
        """Load a file in LiteRT's interpreter: one thread, XNNPACK where it has a kernel.

        That of a language model fulfils :class:`edgekd.protocols.Decoding` too; what is called alone is ``decode``.

        Raises:
            ModelFileError: The file is missing, damaged, of another format, or has several signatures.
        """
        check_intact(path)
        try:
            facts = read_metadata(path)
            runner = LiteRTRunner(_interpreter(model_path=str(path)), facts.get("batch"))
            return LiteRTDecoder(runner, Kept(path, int(facts["context"]))) if "context" in facts else runner
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
        keys = list(interpreter.get_signature_list())
        if DECODE in keys:
            keys = [DECODE]
        if len(keys) > 1:
            raise ValueError(f"it has {len(keys)} signatures; one was expected")
        names: tuple[dict[int, str], dict[int, str]] = ({}, {})
        for key in keys:  # the signature's order is alphabetical, that of the tensors is the program's
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


class LiteRTDecoder:
    """A language model with caches; fulfils :class:`edgekd.protocols.Decoding` beside ``Runner``.

    Attributes:
        context: Tokens that the caches hold.
    """

    def __init__(self, runner: LiteRTRunner, kept: Kept) -> None:
        self.runtime, self.inputs, self.outputs = runner.runtime, runner.inputs, runner.outputs
        self.context = kept.context
        self._runner, self._kept = runner, kept

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Read a token, with caches that are given."""
        return self._runner(inputs)

    def read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        return self._kept.read(tokens, start)


EXPORTER = TFLiteExporter()


def _single(
    module: GraphModule, program: ExportedProgram, options: TFLiteOptions
) -> tuple[bytes, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A file of one signature for the batches that were asked for, and what it takes and gives.

    Args:
        module: That of ``program``, prepared for the converter.
    """
    if options.prefill:
        raise UsageError("tflite prefill is for language models with caches; this program has none")
    batch = sizes(options.batch, "tflite", "batch")
    if batch != (1,):
        check_open(program, "tflite", options.batch, "")
    converted = {}
    for size in batch if len(batch) == 1 else (2, 3):
        with quiet():
            fixed = retrace(module, program, batch=size)
        names = [s.name for s in input_specs(fixed)], [s.name for s in output_specs(fixed)]
        signature = Signature(options.signature, fixed, *names)
        inputs, outputs = _specs(signature)
        wide = any(spec.dtype in ("int64", "float64") for spec in (*inputs, *outputs))
        converted[size] = convert([signature], keep_64_bit=wide)
    if len(batch) == 1:
        return converted[batch[0]], inputs, outputs
    inputs, outputs = (tuple(replace(s, shape=(-1, *s.shape[1:])) for s in specs) for specs in (inputs, outputs))
    return with_open_batch(converted[2], converted[3]), inputs, outputs


def _specs(signature: Signature) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What a signature takes and gives; to be asked before the converter rewrites its program."""
    inputs, outputs = input_specs(signature.program), output_specs(signature.program)
    return (
        tuple(replace(spec, name=name) for spec, name in zip(inputs, signature.inputs, strict=True)),
        tuple(replace(spec, name=name) for spec, name in zip(outputs, signature.outputs, strict=True)),
    )


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
