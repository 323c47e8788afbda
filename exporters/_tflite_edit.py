"""Changes to a finished ``.tflite`` model that its converter does not offer: the flatbuffer is read, edited, written.

Schema: https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgekd.errors import ExportError

__all__ = [
    "integer_edges",
    "read_model",
    "with_activations_of_16_bits",
    "with_metadata",
    "with_open_batch",
    "with_weights_of_4_bits",
]

Edit = Callable[[Any, Any], None]
"""Told the schema and the model, which it changes in place."""


def read_model(content: bytes) -> Any:
    """A model as the schema's objects, with the data of every buffer inside.

    ai-edge-quantizer writes weights behind the flatbuffer where they are 256 KiB or more, and the buffers say where.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:  # 0 and 1 say that there is no data
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def _edited(content: bytes, edit: Edit) -> bytes:
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    class Aligned(Builder):
        """Data of buffers at multiples of 16 bytes, as the schema demands and its Python classes forget."""

        def StartVector(self, size: int, count: int, alignment: int) -> Any:
            return super().StartVector(size, count, 16 if size == 1 else alignment)

        def CreateNumpyVector(self, values: Any) -> Any:
            """As it is done there, but for a copy of all weights on the way."""
            if values.dtype != np.uint8:
                return super().CreateNumpyVector(values)
            self.StartVector(1, len(values), 1)
            self.head -= len(values)
            self.Bytes[self.head : self.head + len(values)] = np.ascontiguousarray(values).data
            self.vectorNumElems = len(values)
            return self.EndVector()

    model = read_model(content)
    edit(schema, model)
    builder = Aligned(len(content) + 4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(memoryview(builder.Bytes)[builder.head :])


def with_activations_of_16_bits(content: bytes) -> bytes:
    """Int8 activations without a zero point as int16 of a 256th of their scale, biases as int64 of the same value.

    This is what an int16 program became in ``_tflite_graph.narrow_activations``, turned back.
    """

    def edit(schema: Any, model: Any) -> None:
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                data, told = model.buffers[tensor.buffer].data, tensor.quantization
                empty = data is None or len(data) == 0
                if tensor.type == schema.TensorType.INT8 and empty:
                    if told is None or list(told.zeroPoint) != [0]:
                        raise ExportError(f"w8a16 has no zero points, and the converter gave one to {tensor.name!r}")
                    tensor.type = schema.TensorType.INT16
                    told.scale = [scale / 256 for scale in told.scale]
                elif tensor.type == schema.TensorType.INT32 and not empty and told is not None and _length(told.scale):
                    tensor.type = schema.TensorType.INT64
                    wide = np.frombuffer(bytes(data), np.int32).astype(np.int64) * 256
                    own = schema.BufferT()  # another tensor may have the buffer too
                    own.data = np.frombuffer(wide.tobytes(), np.uint8)
                    tensor.buffer = len(model.buffers)
                    model.buffers.append(own)
                    told.scale = [scale / 256 for scale in told.scale]

    return _edited(content, edit)


def with_weights_of_4_bits(content: bytes, convolutions: bool) -> bytes:
    """Int8 weights of −7 to 7 as int4, two in a byte, the even one in the lower half: the same numbers.

    Args:
        convolutions: Those of convolutions too, not only of linear layers.
    """

    def edit(schema: Any, model: Any) -> None:
        operators = schema.BuiltinOperator
        wanted = {operators.FULLY_CONNECTED}
        if convolutions:
            wanted |= {operators.CONV_2D, operators.DEPTHWISE_CONV_2D}
        kinds = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
        for graph in model.subgraphs:
            for place, tensor in enumerate(graph.tensors):
                readers = {kinds[op.opcodeIndex] for op in graph.operators if place in op.inputs}
                values = np.frombuffer(_data(model, tensor), np.int8)
                if tensor.type != schema.TensorType.INT8 or not len(values) or not readers <= wanted:
                    continue
                if np.abs(values).max() > 7:
                    continue
                values = np.append(values, np.zeros(len(values) % 2, np.int8))
                own = schema.BufferT()
                own.data = ((values[0::2] & 15) | ((values[1::2] & 15) << 4)).astype(np.uint8)
                tensor.type, tensor.buffer = schema.TensorType.INT4, len(model.buffers)
                model.buffers.append(own)
        for buffer, unused in enumerate(_unused(model)):
            if unused:
                model.buffers[buffer].data = None

    return _edited(content, edit)


def _unused(model: Any) -> list[bool]:
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or ()}
    return [index not in used for index in range(len(model.buffers))]


def integer_edges(content: bytes, inputs: bool, outputs: bool) -> bytes:
    """Inputs and outputs in the integers that they are quantized to at once, or come from.

    Raises:
        ExportError: A float input is read by more than its quantization, or a float output is computed in float.
    """

    def edit(schema: Any, model: Any) -> None:
        (graph,) = model.subgraphs
        kinds = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
        graph.inputs, graph.outputs = graph.inputs.copy(), graph.outputs.copy()  # those that are read cannot be written
        places: dict[int, int] = {}
        for given, wanted, kind in (
            (graph.inputs, inputs, schema.BuiltinOperator.QUANTIZE),
            (graph.outputs, outputs, schema.BuiltinOperator.DEQUANTIZE),
        ):
            for place, index in enumerate(given if wanted else ()):
                if graph.tensors[index].type != schema.TensorType.FLOAT32:
                    continue
                around = [op for op in graph.operators if index in (op.inputs if given is graph.inputs else op.outputs)]
                if len(around) != 1 or kinds[around[0].opcodeIndex] != kind:
                    raise ExportError(
                        f"{graph.tensors[index].name!r} is not only quantized, so it stays float32; leave "
                        f"inference_{'input' if given is graph.inputs else 'output'}_type at float32"
                    )
                (step,) = around
                inner = int(step.outputs[0] if given is graph.inputs else step.inputs[0])
                graph.operators.remove(step)
                given[place] = places[int(index)] = inner
        for signature in model.signatureDefs or ():
            for entry in (*signature.inputs, *signature.outputs):
                entry.tensorIndex = places.get(int(entry.tensorIndex), entry.tensorIndex)

    return _edited(content, edit)


def with_open_batch(two: bytes, three: bytes) -> bytes:
    """A model with an open batch, 1 by default, from the same program converted for a batch of two and one of three.

    litert-torch 0.10 cannot translate a program whose batch is open. But the kernels take their sizes from what they
    read; only the shapes that the file declares, and those that a RESHAPE reads, hold the batch, and they are where the
    two files differ.

    Raises:
        ExportError: The files differ in something else: an operator computes with the batch.
    """
    other = read_model(three)

    def edit(schema: Any, model: Any) -> None:
        (graph,), (twin,) = model.subgraphs, other.subgraphs
        kinds = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
        if len(graph.tensors) != len(twin.tensors) or len(graph.operators) != len(twin.operators):
            raise ExportError(_batched("the converter writes other operators for another batch"))
        for place, (tensor, changed) in enumerate(zip(graph.tensors, twin.tensors, strict=True)):
            signature, shape = list(map(int, tensor.shape)), list(map(int, tensor.shape))
            for axis, (a, b) in enumerate(zip(tensor.shape, changed.shape, strict=True)):
                if a != b:
                    shape[axis], signature[axis] = int(b - a), -1
            if -1 in signature:
                tensor.shape, tensor.shapeSignature = shape, signature
            ours, theirs = _data(model, tensor), _data(other, changed)
            if ours == theirs:
                continue
            readers = [op for op in graph.operators if place in op.inputs]
            sizes, wanted = np.frombuffer(ours, np.int32).copy(), np.frombuffer(theirs, np.int32)
            if tensor.type != schema.TensorType.INT32 or (sizes != wanted).sum() != 1 or (sizes == -1).any():
                raise ExportError(_batched(f"{_text(tensor.name)} has more than one size that follows from the batch"))
            (axis,) = np.flatnonzero(sizes != wanted)
            sizes[axis] = -1  # to a RESHAPE: what is left over; to a SLICE: all from where it begins
            for op in readers:
                kind, at = kinds[op.opcodeIndex], list(op.inputs).index(place)
                begins = _data(model, graph.tensors[op.inputs[1]]) if kind == schema.BuiltinOperator.SLICE else b""
                whole = bool(begins) and np.frombuffer(begins, np.int32)[axis] == 0 and at == 2
                if not whole and (kind != schema.BuiltinOperator.RESHAPE or at != 1):
                    raise ExportError(_batched(f"{_text(tensor.name)} is a constant that follows from the batch"))
            own = schema.BufferT()
            own.data = np.frombuffer(sizes.tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(own)
            for op in readers:
                if kinds[op.opcodeIndex] == schema.BuiltinOperator.RESHAPE and op.builtinOptions is not None:
                    op.builtinOptions.newShape = sizes.tolist()

    return _edited(two, edit)


def _data(model: Any, tensor: Any) -> bytes:
    data = model.buffers[tensor.buffer].data
    return b"" if data is None else bytes(data)


def with_metadata(content: bytes, name: str, data: bytes) -> bytes:
    """A model with a buffer of metadata under that name, in the place of one that has it."""

    def edit(schema: Any, model: Any) -> None:
        entry, buffer = schema.MetadataT(), schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        entry.name, entry.buffer = name, len(model.buffers)
        model.buffers.append(buffer)
        model.metadata = [old for old in model.metadata or () if _text(old.name) != name] + [entry]

    return _edited(content, edit)


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _batched(why: str) -> str:
    return f"tflite batch: {why}; export with one size, or a file for each"


def _length(values: Any) -> int:
    return 0 if values is None else len(values)
