"""ONNX, for ONNX Runtime: on servers, on Android and iOS, in browsers."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.contents import Contents
from edgekd.devices.agent.runtimes import SESSION_CONFIG_WITHOUT_VNNI, session_config
from edgekd.errors import DataError, ExportError, ModelFileError, UsageError, first_line
from edgekd.exporting.parity import conversions
from edgekd.precisions import STATIC
from edgekd.protocols import Arrays, Runner
from edgekd.quiet import quiet
from edgekd.types import Conversion, Precision, Student, TensorSpec, Tolerance

from ._onnx_contents import read_contents
from ._onnx_options import OnnxOptions
from ._sizes import few_of, sizes, with_axes

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

OPSET = 20
_INT4_OPSET = 21
_LARGEST = 2**31 - 1  # bytes of one protocol buffer

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


W4_TOLERANCE = Tolerance(None, 0.95, 0.8)
"""Real models lose more to 4 bits than to 8: MiniLM's sentence vectors come to a cosine of 0.974 (w8: 0.9995)."""


DEFAULTS = OnnxOptions()


class OnnxExporter:
    """See :class:`edgekd.protocols.Exporter`.

    ``fp16`` stores and computes in half precision between float inputs and outputs. ``w8d8`` quantizes the constant
    side of matrix products, one scale an output channel, and tables that rows are gathered from, one scale a row;
    convolutions stay float, because ONNX Runtime's dynamic ones are slower than those. ``w4`` holds matrix products and
    tables in 4 bits, with a scale and a zero point for each 32 numbers, and computes in float: small, not fast.
    """

    suffix = ".onnx"
    requires: tuple[str, ...] = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnx"
    precisions: Mapping[Precision, Conversion] = {
        **conversions("fp32", "fp16", "w8", "w8d8", "w8a8", "w4a8", "auto"),
        "w4": Conversion("fp32", W4_TOLERANCE),
    }
    cached_precisions: tuple[Precision, ...] = ("fp32", "fp16", "w8", "w8d8", "w4")
    options = OnnxOptions

    def write(self, student: Student, path: Path, precision: Precision, options: OnnxOptions = DEFAULTS) -> None:
        source = self.precisions[precision].source
        if student.card.precision != source:
            raise UsageError(
                f"onnx {precision} is written from a program in {source}; this is {student.card.precision}"
            )
        if options.fuse and precision in STATIC:
            raise UsageError(f"onnx fuse=true fuses float operators, which {precision} has few of; w8d8, fp32 … have")
        _refuse_large(student)
        with quiet():
            model = _translate(student, precision, options)
            if options.fuse:
                model = _fuse(model)
            if precision == "fp16":
                model = _halve(model)
            elif precision == "w8d8":
                model = _quantize_dynamically(model)
            elif precision == "w4":
                model = _quantize_blocks(model)
        _describe(model, student, precision, options)
        path.write_bytes(model.SerializeToString(deterministic=True))

    def load(self, path: Path) -> Runner:
        return load_onnx(path)

    def contents(self, path: Path) -> Contents:
        return read_contents(path, session_options())


class OnnxRunner:
    """A file in ONNX Runtime on the CPU.

    Attributes:
        batch_sizes: Some of those that the file says it is for; the one that it has, or 1, where it says nothing.
        context: Tokens that the caches of a language model hold; 0 for other files.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        import onnxruntime

        if not path.is_file():
            raise ModelFileError(f"no model file at {path}")
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}"
        try:
            self.session: InferenceSession = onnxruntime.InferenceSession(
                path, session_options(threads), providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ModelFileError(f"{path} is not a model that ONNX Runtime reads: {first_line(error)}") from error
        self.inputs = tuple(_spec(value) for value in self.session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self.session.get_outputs())
        facts = self.session.get_modelmeta().custom_metadata_map
        batch = facts.get("edgekd.batch")
        self.context = int(facts.get("edgekd.context", 0))
        self.batch_sizes = few_of(sizes(batch, "onnx", "batch")) if batch else (max(1, self.inputs[0].shape[0]),)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        feed = {
            spec.name: np.ascontiguousarray(np.asarray(inputs[spec.name]).astype(spec.dtype, copy=False))
            for spec in self.inputs
        }
        names = [spec.name for spec in self.outputs]
        try:
            outputs = self.session.run(names, feed)
        except Exception as error:
            raise DataError(f"ONNX Runtime cannot run these inputs: {first_line(error)}") from error
        return dict(zip(names, outputs, strict=True))


class OnnxDecoder:
    """A language model with caches; fulfils :class:`edgekd.protocols.Decoding` beside ``Runner``."""

    def __init__(self, runner: OnnxRunner) -> None:
        from ._onnx_decoder import Bound

        self.runtime, self.inputs, self.outputs = runner.runtime, runner.inputs, runner.outputs
        self.context = runner.context
        self._runner, self._bound = runner, Bound(runner.session, runner.context)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return self._runner(inputs)

    def read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        return self._bound.read(tokens, start)


EXPORTER = OnnxExporter()


def load_onnx(path: Path, threads: int = 1) -> Runner:
    """A file in ONNX Runtime, of a language model or another."""
    runner = OnnxRunner(path, threads)
    return OnnxDecoder(runner) if runner.context else runner


def session_options(threads: int = 1) -> Any:
    """How edgekd runs a file: quiet, on so many threads, with integer products that never saturate on the way."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    for key, value in session_config().items():
        options.add_session_config_entry(key, value)
    return options


def _refuse_large(student: Student) -> None:
    tensors = [*student.program.state_dict.values(), *student.program.constants.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if hasattr(tensor, "numel"))
    if size > _LARGEST:
        raise ExportError(
            f"the weights of {student.card.name!r} take {size / 2**30:.1f} GB, and one ONNX file holds at most 2 GB; "
            "export a smaller student or, where the target allows it, w8"
        )


def _translate(student: Student, precision: Precision, options: OnnxOptions) -> ModelProto:
    """The program as ONNX, for the sizes that were asked for, with its own names of inputs and outputs."""
    import onnx_ir
    import torch

    from edgekd.programs.models import input_specs, output_specs

    from . import _onnx_activations as activations
    from . import _onnx_blocks as blocks
    from . import _onnx_decoder as decoders
    from . import _onnx_fuse as fusing
    from . import _onnx_graph as editing
    from . import _onnx_weights as weights

    if student.card.decoder is None:
        program = with_axes(student.program, "onnx", options.batch, options.length)
    else:
        program = decoders.decoder_program_for(student, options)
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_INT4_OPSET if precision == "w4a8" else OPSET,
            input_names=[spec.name for spec in input_specs(program)],
            output_names=[spec.name for spec in output_specs(program)],
            external_data=False,
            verbose=False,
            custom_translation_table=decoders.translations() if student.card.decoder else None,
        )
    except Exception as error:
        raise ExportError(_refusal(student, error)) from error
    assert exported is not None
    graph = exported.model.graph
    editing.tidy(graph)
    editing.name_axes(graph)
    if options.fuse:
        fusing.fuse_attention(graph)
    if precision in STATIC:
        activations.drop_saturated(graph)
        activations.pad_in_convolutions(graph)
        activations.pool_globally(graph)
        activations.drop_requantized(graph)
        activations.unsigned_activations(graph)
    elif precision == "w8d8":
        editing.untie(graph)
        weights.quantize_tables(graph)
    elif precision == "w4":
        editing.untie(graph)
        blocks.multiply_instead_of_gemm(graph)
        editing.drop_unused(graph)
    if precision in ("w8", "w8d8", *STATIC):
        weights.gather_then_dequantize(graph)
        weights.multiply_weights(graph)
        weights.transpose_weights(graph)
        weights.own_zero_points(graph)
        if precision == "w4a8":
            weights.store_in_4_bits(graph)
        editing.drop_unused(graph)
    return onnx_ir.to_proto(exported.model)


def _refusal(student: Student, error: Exception) -> str:
    """What torch's exporter says in several hundred lines, in one."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in reversed(chain):
        operator = re.search(r"aten\.[\w.]+|\b\w+\.\w+\.default\b", str(cause))
        if operator:
            return (
                f"torch.onnx does not translate {operator.group()}, which {student.card.name!r} uses; "
                "replace it in the model, or export to another target"
            )
    return f"torch.onnx refuses {student.card.name!r}: {first_line(chain[-1])}"


def _halve(model: ModelProto) -> ModelProto:
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # By default it cuts constants off at 1e4, which multiplies by something else than the program does.
    largest = float(np.finfo(np.float16).max)
    converted = convert_float_to_float16(model, keep_io_types=True, max_finite_val=largest)
    # It leaves wrong types of what it casts (scales of Resize); readers find the right ones by themselves.
    # https://github.com/microsoft/onnxruntime/issues/14827
    del converted.graph.value_info[:]
    halved = onnx_ir.from_proto(converted)
    halved.graph.sort()  # the converter puts the casts of inputs last, which the standard forbids
    return onnx_ir.to_proto(halved)


def _fuse(model: ModelProto) -> ModelProto:
    from . import _onnx_fuse as fusing

    fused = fusing.fuse_rest(model)
    if not fusing.fused_operators(fused):
        raise ExportError("onnx fuse=true finds no attention, gelu or residual sum to fuse in this model")
    return fused


def _quantize_dynamically(model: ModelProto) -> ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    constants = {tensor.name for tensor in model.graph.initializer}
    quantized = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants]
    tables = any(tensor.data_type == onnx.TensorProto.INT8 for tensor in model.graph.initializer)
    if not quantized and not tables:
        raise ExportError(
            "w8d8 quantizes matrix products and embeddings, and this model has none with constant weights; "
            "take w8a8, which quantizes convolutions too"
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        quantize_dynamic(
            model, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )
        return onnx.load(target)


def _quantize_blocks(model: ModelProto) -> ModelProto:
    from . import _onnx_blocks as blocks

    return blocks.quantize_blocks(model)


def _describe(model: ModelProto, student: Student, precision: Precision, options: OnnxOptions) -> None:
    """Write what an app needs to know into the file."""
    from edgekd import __version__

    card = student.card
    model.producer_name, model.producer_version = "edgekd", __version__
    facts = {
        "name": card.name,
        "precision": precision,
        "labels": json.dumps(card.labels, ensure_ascii=False),
        "preprocessing": json.dumps(card.preprocessing, sort_keys=True, ensure_ascii=False),
    }
    if precision in ("w8d8", *STATIC):
        facts["session_config_without_vnni"] = json.dumps(SESSION_CONFIG_WITHOUT_VNNI)
    if options.fuse:
        from ._onnx_fuse import fused_operators  # imports onnx

        facts["fused"] = json.dumps(fused_operators(model))
    if card.decoder is not None:
        facts |= {"context": str(card.decoder.context), "end_tokens": json.dumps(card.decoder.end_tokens)}
    axes = {size.dim_param for value in model.graph.input for size in value.type.tensor_type.shape.dim}
    facts |= {name: getattr(options, name) for name in ("batch", "length") if name in axes and getattr(options, name)}
    del model.metadata_props[:]
    for key, value in facts.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"edgekd.{key}", value


def _spec(value: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(value.name, shape, _DTYPES.get(value.type, value.type))
