"""Weights of a written ML Program in fewer bits: palettes, int4 blocks, zeros left out. Rewrites messages, not models.

A ``const`` becomes the ``constexpr_*`` operators that the system of the package has: iOS 16 and 17 hold packed bits in
attributes, iOS 18 typed values of less than a byte in inputs (coremltools' own files are the reference for both).
Everything else of the program stays as the converter wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import ExportError

from ._mil_blob import WeightFile, WeightWriter, pack_bits
from ._mil_package import model_proto
from ._mil_palette import palettize

__all__ = ["Scheme", "compress_weights"]

_SMALLEST = 2048  # numbers; below, the operators and tables cost more than they save
# Who reads a weight, and under which names.
_READERS = {
    "conv": {"weight"},
    "conv_transpose": {"weight"},
    "linear": {"weight"},
    "matmul": {"x", "y"},
    "gather": {"x"},
    "lstm": {"weight_ih", "weight_hh", "weight_ih_back", "weight_hh_back"},
    "gru": {"weight_ih", "weight_hh"},
    "rnn": {"weight_ih", "weight_hh"},
}


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    Attributes:
        palette_bits: Bits of an index into a palette; None for no palettes.
        block_bits: 4 for int4 with a scale per block; None for none.
        sparse: Whether weights with enough zeros are stored without them.
        typed: Whether the package is of iOS 18, with types of less than a byte and joint compression.
        group_size: Channels that share a palette, at most; 0 for one palette per weight. Needs ``typed``.
        block_size: Numbers along axis 1 that share a scale, at most.
        narrow: Whether int8 weights of −7 to 7 are stored as int4, with the scales that they have. Needs ``typed``.
    """

    palette_bits: int | None = None
    block_bits: int | None = None
    sparse: bool = False
    typed: bool = False
    group_size: int = 0
    block_size: int = 32
    narrow: bool = False


def compress_weights(model: Any, weights: Path | None, scheme: Scheme, folder: Path) -> None:
    """Rewrite the weights of a program, in place, with a new weight file.

    Args:
        model: The ``Model`` message.
        weights: Folder with the present weight file; None when the program has none.
        scheme: What to do.
        folder: Where the new weight file goes.

    Raises:
        ExportError: No weight could be stored in that way.
    """
    source = WeightFile(weights / "weight.bin") if weights is not None else None
    writer = WeightWriter(folder / "weight.bin")
    done = 0
    for function in model.mlProgram.functions.values():
        block = function.block_specializations[function.opset]
        readers = _weights_read(block)
        done += _rewrite(block, readers, source, writer, scheme)
    writer.close()
    if not done and not scheme.narrow:
        asked = "enough zeros to leave out; prune it first" if scheme.sparse else f"{_SMALLEST} numbers or more"
        raise ExportError(f"no weight of the program has {asked}")


def _blocks(block: Any) -> Iterator[Any]:
    yield block
    for operation in block.operations:
        for inner in operation.blocks:
            yield from _blocks(inner)


def _weights_read(block: Any) -> dict[str, bool]:
    """Every name that is read, and whether all that read it take it for a weight."""
    readers: dict[str, bool] = {}
    for part in _blocks(block):
        for operation in part.operations:
            for key, argument in operation.inputs.items():
                for binding in argument.arguments:
                    if binding.WhichOneof("binding") == "name":
                        weight = key in _READERS.get(operation.type, ())
                        readers[binding.name] = readers.get(binding.name, True) and weight
        for name in part.outputs:
            readers[name] = False
    return readers


def _rewrite(
    block: Any, readers: dict[str, bool], source: WeightFile | None, writer: WeightWriter, scheme: Scheme
) -> int:
    """Operations of a block with their weights moved to the new file; how many were compressed."""
    done = 0
    fresh: list[Any] = []
    for operation in block.operations:
        replacement = None
        if operation.type == "const" and readers.get(operation.outputs[0].name):
            replacement = _compressed(operation, source, writer, scheme)
        elif operation.type == "constexpr_blockwise_shift_scale" and scheme.sparse and scheme.typed:
            replacement = _without_zeros(operation, source, writer)
        elif operation.type == "constexpr_blockwise_shift_scale" and scheme.narrow:
            replacement = _narrowed(operation, source, writer)
        if replacement is not None:
            done += 1
            fresh += replacement
            continue
        for value in _values(operation):
            if value.WhichOneof("value") == "blobFileValue":
                assert source is not None
                value.blobFileValue.offset = writer.add_record(*source.record(value.blobFileValue.offset))
        for inner in operation.blocks:
            done += _rewrite(inner, readers, source, writer, scheme)
        fresh.append(operation)
    copies = [type(operation).FromString(operation.SerializeToString()) for operation in fresh]
    del block.operations[:]
    block.operations.extend(copies)
    return done


def _values(operation: Any) -> Iterator[Any]:
    yield from operation.attributes.values()
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                yield binding.value


def _array(value: Any, source: WeightFile | None) -> np.ndarray | None:
    """A tensor of the weight file in its own type and shape; None for one that stands in the message."""
    if value.WhichOneof("value") != "blobFileValue" or source is None:
        return None
    shape = [int(d.constant.size) for d in value.type.tensorType.dimensions]
    return source.read(value.blobFileValue.offset, math.prod(shape)).reshape(shape)


def _compressed(operation: Any, source: WeightFile | None, writer: WeightWriter, scheme: Scheme) -> list[Any] | None:
    """The operators in place of a constant; None where it stays as it is."""
    array = _array(operation.attributes["val"], source)
    if array is None or array.dtype.kind != "f" or array.ndim < 2 or array.size < _SMALLEST:
        return None
    weight = torch.from_numpy(array.astype(np.float32))
    kept = weight != 0
    zeros = 1 - float(kept.sum()) / array.size
    bits = scheme.palette_bits or scheme.block_bits or 8 * array.dtype.itemsize
    # A bit for each number says whether it is there.
    sparse = scheme.sparse and zeros * bits > 1 and bool(kept.any())
    make = _Maker(operation, array.dtype, writer, scheme.typed)
    if scheme.palette_bits is not None:
        if not sparse:
            return [make.palette(weight, scheme.palette_bits, scheme.group_size)]
        return make.sparse_palette(weight, kept, scheme.palette_bits, scheme.group_size)
    if scheme.block_bits is not None:
        data, scales = quantize_blocks(weight, scheme.block_size)
        return make.sparse_blocks(data, scales, kept, "INT4") if sparse else [make.blocks(data, scales)]
    return [make.sparse(weight[kept].numpy().astype(array.dtype), kept)] if sparse else None


def _without_zeros(operation: Any, source: WeightFile | None, writer: WeightWriter) -> list[Any] | None:
    """int8 with scales, stored without its zeros where that is smaller."""
    data, scale = _integers(operation, source)
    if data is None or scale is None or data.size < _SMALLEST:
        return None
    kept = torch.from_numpy(data != 0)
    if (1 - float(kept.sum()) / data.size) * 8 <= 1 or not bool(kept.any()):
        return None
    make = _Maker(operation, scale.dtype, writer, typed=True)
    return make.sparse_blocks(
        torch.from_numpy(np.array(data)), torch.from_numpy(scale.astype(np.float32)), kept, "INT8"
    )


def _narrowed(operation: Any, source: WeightFile | None, writer: WeightWriter) -> list[Any] | None:
    """int8 with scales as int4 with the same scales, where it is of −7 to 7."""
    data, scale = _integers(operation, source)
    if data is None or scale is None or np.abs(data).max(initial=0) > 7:
        return None
    make = _Maker(operation, scale.dtype, writer, typed=True)
    return [make.blocks(torch.from_numpy(np.array(data)), torch.from_numpy(scale.astype(np.float32)))]


def _integers(operation: Any, source: WeightFile | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """int8 data and scales of a ``constexpr_blockwise_shift_scale``; None where it has an offset or holds no int8."""
    arguments = {key: argument.arguments[0].value for key, argument in operation.inputs.items()}
    data, scale = _array(arguments["data"], source), _array(arguments["scale"], source)
    return (None, None) if data is None or data.dtype != np.int8 or "offset" in arguments else (data, scale)


def quantize_blocks(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """int4 with one scale for each row and block of axis 1: of several scales the one with the smallest error.

    Returns:
        Data, int8 in -8 … 7 in the weight's shape; scales, float32, (rows, blocks, 1 …).
    """
    columns = weight.shape[1]
    width = max(d for d in range(1, min(block_size, columns) + 1) if columns % d == 0)
    # A block is ``width`` columns with all that lies behind them (the kernel of a convolution).
    rows = weight.reshape(weight.shape[0], columns // width, -1)
    largest = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    best, error = largest / 7, torch.full_like(largest, math.inf)
    for share in torch.linspace(0.6, 1.0, 9):
        scale = largest * share / 7
        found = (rows - (rows / scale).round().clamp(-8, 7) * scale).square().sum(-1, keepdim=True)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    data = (rows / best).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
    return data, best.reshape(weight.shape[0], columns // width, *[1] * (weight.ndim - 2))


def group_count(shape: torch.Size, bits: int, group_size: int) -> int:
    """Palettes along axis 0: as many as ``group_size`` asks for, while they take less than a quarter of the indices."""
    channels = shape[0]
    if not group_size:
        return 1
    for width in range(min(group_size, channels), channels + 1):
        groups = channels // width
        if channels % width == 0 and groups * 2**bits * 32 <= shape.numel() * bits / 4:
            return groups
    return 1


class _Maker:
    """Writes the operators that take the place of one constant."""

    def __init__(self, operation: Any, dtype: np.dtype[Any], writer: WeightWriter, typed: bool) -> None:
        self._pb = model_proto().MIL__pb2
        self._old, self._dtype, self._writer, self._typed = operation, dtype, writer, typed
        self._name: str = operation.outputs[0].name
        self._kind = "FLOAT16" if dtype.itemsize == 2 else "FLOAT32"

    def palette(self, weight: Tensor, bits: int, group_size: int) -> Any:
        groups = group_count(weight.shape, bits, group_size) if self._typed else 1
        tables, indices = palettize(weight.reshape(groups, -1), 2**bits)
        table = tables.numpy().astype(self._dtype)
        indexed = indices.reshape(weight.shape).numpy()
        if not self._typed:
            return self._untyped(
                "constexpr_lut_to_dense", weight.shape, indices=pack_bits(indexed.reshape(-1), bits), lut=table[0]
            )
        lut = table.reshape(groups, *[1] * (weight.ndim - 1), 2**bits, 1)
        return self._operator(
            "constexpr_lut_to_dense",
            {"indices": self._value(indexed, f"UINT{bits}"), "lut": self._value(lut, self._kind)},
        )

    def sparse(self, values: np.ndarray, kept: Tensor) -> Any:
        mask = kept.numpy().astype(np.uint8)
        if not self._typed:
            return self._untyped(
                "constexpr_sparse_to_dense", kept.shape, nonzero_data=values, mask=pack_bits(mask.reshape(-1), 1)
            )
        return self._operator(
            "constexpr_sparse_to_dense",
            {"nonzero_data": self._value(values, self._kind), "mask": self._value(mask, "UINT1")},
        )

    def sparse_palette(self, weight: Tensor, kept: Tensor, bits: int, group_size: int) -> list[Any]:
        """Palettes for what is left; who asks for iOS 16 or 17 was refused before."""
        groups = group_count(weight.shape, bits, group_size)
        indices = torch.zeros(weight.shape, dtype=torch.uint8).reshape(groups, -1)
        tables = torch.zeros(groups, 2**bits)
        rows = zip(weight.reshape(groups, -1), kept.reshape(groups, -1), strict=True)
        for group, (values, there) in enumerate(rows):
            if bool(there.any()):
                table, found = palettize(values[there].reshape(1, -1), 2**bits)
                tables[group], indices[group, there] = table[0], found[0]
        lut = tables.numpy().astype(self._dtype).reshape(groups, *[1] * (weight.ndim - 1), 2**bits, 1)
        return self._joint(
            "constexpr_lut_to_sparse",
            "indices_mask",
            kept,
            {
                "indices_nonzero_data": self._value(indices.reshape(weight.shape)[kept].numpy(), f"UINT{bits}"),
                "lut": self._value(lut, self._kind),
            },
        )

    def blocks(self, data: Tensor, scales: Tensor) -> Any:
        return self._operator(
            "constexpr_blockwise_shift_scale",
            {
                "data": self._value(data.numpy(), "INT4"),
                "scale": self._value(scales.numpy().astype(self._dtype), self._kind),
            },
        )

    def sparse_blocks(self, data: Tensor, scales: Tensor, kept: Tensor, kind: str) -> list[Any]:
        return self._joint(
            "constexpr_sparse_blockwise_shift_scale",
            "data_mask",
            kept,
            {
                "nonzero_data": self._value(data[kept].numpy(), kind),
                "scale": self._value(scales.numpy().astype(self._dtype), self._kind),
            },
        )

    def _joint(self, kind: str, mask_name: str, kept: Tensor, inputs: dict[str, Any]) -> list[Any]:
        """A sparse-to-sparse operator and the one that fills in the zeros."""
        mask = kept.numpy().astype(np.uint8)
        names = (f"{self._name}_mask", f"{self._name}_kept")
        first = self._operator(kind, {mask_name: self._value(mask, "UINT1"), **inputs}, f"{self._name}_sparse")
        del first.outputs[:]
        for name, element, shape in ((names[0], "UINT1", mask.shape), (names[1], self._kind, (int(mask.sum()),))):
            output = first.outputs.add(name=name)
            self._set_type(output.type, element, shape)
        second = self._operator("constexpr_sparse_to_dense", {})
        for key, name in (("mask", names[0]), ("nonzero_data", names[1])):
            second.inputs[key].arguments.add(name=name)
        return [first, second]

    def _operator(self, kind: str, inputs: dict[str, Any], name: str | None = None) -> Any:
        operation = self._pb.Operation(type=kind)
        operation.outputs.add().CopyFrom(self._old.outputs[0])
        for key, value in inputs.items():
            operation.inputs[key].arguments.add().value.CopyFrom(value)
        label = operation.attributes["name"]
        label.type.tensorType.dataType = self._pb.DataType.Value("STRING")
        label.immediateValue.tensor.strings.values.append(name or self._name)
        return operation

    def _untyped(self, kind: str, shape: torch.Size, **data: np.ndarray) -> Any:
        """The form of iOS 16: flat data and a shape, as attributes."""
        operation = self._operator(kind, {})
        for key, array in data.items():
            element = "UINT8" if array.dtype == np.uint8 else self._kind
            operation.attributes[key].CopyFrom(self._value(array.reshape(-1), element))
        sizes = operation.attributes["shape"]
        self._set_type(sizes.type, "UINT32", (len(shape),))
        sizes.immediateValue.tensor.bytes.values = np.array(shape, "<u4").tobytes()
        return operation

    def _value(self, array: np.ndarray, kind: str) -> Any:
        value = self._pb.Value()
        self._set_type(value.type, kind, array.shape)
        value.blobFileValue.fileName = "@model_path/weights/weight.bin"
        value.blobFileValue.offset = self._writer.add(array, kind)
        return value

    def _set_type(self, proto: Any, kind: str, shape: tuple[int, ...]) -> None:
        proto.tensorType.dataType = self._pb.DataType.Value(kind)
        proto.tensorType.rank = len(shape)
        for size in shape:
            proto.tensorType.dimensions.add().constant.size = size
