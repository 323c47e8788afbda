"""ONNX Runtime's own format (``.ort``): the graph as it was optimized, in a flatbuffer, the same bytes at each writing.

Schema: https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/flatbuffers/schema/ort.fbs
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import ExportError

from ._onnx_graph import add_constant, array_of, drop_unused

__all__ = ["to_ort_format", "with_unsigned_weights"]

_IDENTIFIER = b"ORTM"
_ALIGNMENT = 8  # of 64-bit numbers, counted from the end of the file


def to_ort_format(content: bytes, *, fold: bool = True) -> bytes:
    """A model in ONNX's format, optimized as far as all processors allow, in ONNX Runtime's.

    Args:
        fold: Compute what is constant. Of int8 weights that are read in float this would keep the floats.

    Raises:
        ExportError: ONNX Runtime refuses, or lays the file out otherwise than its release 1.32.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.save_model_format", "ORT")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ort"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(
                content,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=[] if fold else ["ConstantFolding"],
            )
        except Exception as error:
            raise ExportError(f"ONNX Runtime does not save this model in its own format: {error}") from error
        return _repeatable(path.read_bytes())


def with_unsigned_weights(content: bytes) -> bytes:
    """An ONNX model with uint8 weights for int8 ones, and zero points that are 128 larger: the same numbers."""
    import onnx
    import onnx_ir as ir

    model = ir.from_proto(onnx.load_from_string(content))
    for node in model.graph:
        # Data or weight, and its zero point.
        places = {"DequantizeLinear": (0, 2), "MatMulInteger": (1, 3)}.get(node.op_type)
        weight = array_of(node.inputs[places[0]]) if places is not None else None
        if places is None or weight is None or weight.dtype != np.int8:
            continue
        point = array_of(node.inputs[places[1]]) if len(node.inputs) > places[1] else None
        if point is None or point.dtype != np.int8:
            continue
        for place, values in zip(places, (weight, point), strict=True):
            value = node.inputs[place]
            assert value is not None
            shifted = np.asarray(values.astype(np.int16) + 128, np.uint8)
            # ONNX Runtime 1.32 takes no zero point that two weights share; see _onnx_weights.own_zero_points.
            constant = add_constant(model.graph, f"{value.name}_unsigned", shifted, shared=place == places[0])
            node.replace_input_with(place, constant)
    drop_unused(model.graph)
    return ir.to_proto(model).SerializeToString(deterministic=True)


def _repeatable(content: bytes) -> bytes:
    """The same file with the types of kernels in the order of their names.

    They come out of a hash map whose seed is another at each writing (``KernelTypeStrResolver::SaveToOrtFormat``).
    ONNX Runtime writes them last, so they stand in front of all else, which is kept as it is: offsets in a flatbuffer
    are relative.
    """
    from flatbuffers import Builder
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import (
        ArgTypeAndIndex,
        InferenceSession,
        KernelTypeStrArgsEntry,
        KernelTypeStrResolver,
        OpIdKernelTypeStrArgsEntry,
    )

    session = InferenceSession.InferenceSession.GetRootAs(content, 0)
    model, resolver = session.Model()._tab.Pos, session.KernelTypeStrResolver()
    version = session._tab.Indirect(session._tab.Pos + session._tab.Offset(4))
    start = min(model, model - struct.unpack_from("<i", content, model)[0])  # the model's list of fields
    kept = content[start:]
    if not session._tab.Pos < resolver._tab.Pos < start < version:
        raise ExportError("ONNX Runtime lays its own format out in an order that edgekd does not know; use 1.32")

    builder = Builder(len(content) + 4096)
    builder.minalign = _ALIGNMENT
    builder.head -= len(kept)
    builder.Bytes[builder.head : builder.head + len(kept)] = kept

    def vector(offsets: list[int]) -> int:
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())

    def argument(found: Any) -> int:
        ArgTypeAndIndex.Start(builder)
        ArgTypeAndIndex.AddArgType(builder, found.ArgType())
        ArgTypeAndIndex.AddIndex(builder, found.Index())
        return int(ArgTypeAndIndex.End(builder))

    def kernel_type(found: Any) -> int:
        arguments = vector([argument(found.Args(index)) for index in range(found.ArgsLength())])
        name = builder.CreateString(found.KernelTypeStr())
        KernelTypeStrArgsEntry.Start(builder)
        KernelTypeStrArgsEntry.AddKernelTypeStr(builder, name)
        KernelTypeStrArgsEntry.AddArgs(builder, arguments)
        return int(KernelTypeStrArgsEntry.End(builder))

    def operator(found: Any) -> int:
        types = [found.KernelTypeStrArgs(index) for index in range(found.KernelTypeStrArgsLength())]
        entries = vector([kernel_type(each) for each in sorted(types, key=lambda each: each.KernelTypeStr())])
        name = builder.CreateString(found.OpId())
        OpIdKernelTypeStrArgsEntry.Start(builder)
        OpIdKernelTypeStrArgsEntry.AddOpId(builder, name)
        OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, entries)
        return int(OpIdKernelTypeStrArgsEntry.End(builder))

    operators = [resolver.OpKernelTypeStrArgs(index) for index in range(resolver.OpKernelTypeStrArgsLength())]
    entries = vector([operator(each) for each in sorted(operators, key=lambda each: each.OpId())])
    KernelTypeStrResolver.Start(builder)
    KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, entries)
    types = KernelTypeStrResolver.End(builder)
    InferenceSession.Start(builder)
    InferenceSession.AddOrtVersion(builder, len(content) - version)  # counted from the end, which stayed in its place
    InferenceSession.AddModel(builder, len(content) - model)
    InferenceSession.AddKernelTypeStrResolver(builder, types)
    builder.Finish(InferenceSession.End(builder), _IDENTIFIER)
    return bytes(builder.Output())
