"""Operators of ML Programs for compressed numbers: quantize, dequantize, and the ``constexpr_*`` family.

A ``constexpr`` is computed once, when the program is loaded, as Core ML does. iOS 16 gives packed bits and a shape,
iOS 18 typed values of less than a byte; both forms are read here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgekd.errors import ExportError, ModelFileError

from ._mil_blob import unpack_bits
from ._mil_registry import Ints, operator

_RANGE = {"int8": (-128, 127, torch.int8), "uint8": (0, 255, torch.uint8)}


def _along(value: Tensor, axis: int | None, rank: int) -> Tensor:
    """A scalar as it is, a vector laid along an axis."""
    if value.numel() == 1:
        return value.reshape(())
    if axis is None:
        raise ExportError("has one scale per slice, but no axis")
    shape = [1] * rank
    shape[axis] = -1
    return value.reshape(shape)


@operator(moves=True, since="CoreML7")
def quantize(
    input: Tensor, scale: Tensor, output_dtype: str, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    """clip(round(input / scale) + zero_point), halves to even.

    The quotient is input · (1 / scale) in single precision, as in PyTorch's quantized programs and in integer kernels:
    then a right translation agrees to the last step. Dividing may move a value that lies on a tie by one step.
    """
    if output_dtype not in _RANGE:
        raise ExportError(f"quantizes to {output_dtype!r}; the evaluator knows {', '.join(_RANGE)}")
    low, high, dtype = _RANGE[output_dtype]
    steps = torch.round(input * _along(scale.double().reciprocal().float(), axis, input.ndim))
    if zero_point is not None:
        steps = steps + _along(zero_point, axis, input.ndim).to(torch.float32)
    return steps.clamp(low, high).to(dtype)


@operator(since="CoreML7")
def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    """(input - zero_point) · scale."""
    values = input.to(torch.float32)
    if zero_point is not None:
        values = values - _along(zero_point, axis, input.ndim).to(torch.float32)
    return values * _along(scale, axis, input.ndim)


@operator(since="CoreML6")
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int) -> Tensor:
    return dequantize(quantized_data, scale, zero_point, axis)


@operator(since="CoreML8")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """(data - offset) · scale, one scale per block; the rank is that of ``data``, the blocks are of equal size."""
    values = data.to(torch.float32)
    if offset is not None:
        values = values - _spread(offset.to(torch.float32), data.shape)
    return values * _spread(scale, data.shape)


@operator(since="CoreML6")
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    if output_dtype != "fp32":
        raise ExportError(f"casts to {output_dtype!r}; MIL allows fp32")
    return source_val.to(torch.float32)


@operator(moves=True, since="CoreML6", later={"vector_axis": "CoreML8"})
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Ints | None = None, vector_axis: int | None = None
) -> Tensor:
    """Values looked up in a table: one for all (iOS 16), or one per block, of numbers or of vectors (iOS 18)."""
    if shape is not None:  # iOS 16: bytes of packed indices
        bits = int(math.log2(lut.numel()))
        flat = unpack_bits(indices.reshape(-1).numpy(), bits, math.prod(shape), signed=False)
        return lut.reshape(-1)[torch.from_numpy(flat).to(torch.int64)].reshape(shape)
    *blocks, palette, width = lut.shape
    tables = lut.reshape(-1, palette, width)
    owner = _spread(torch.arange(tables.shape[0]).reshape(blocks), indices.shape)
    values = tables[owner, indices.to(torch.int64)]  # (*indices, width)
    if width == 1:
        return values.squeeze(-1)
    if vector_axis is None:
        raise ExportError("looks up vectors, but has no vector_axis")
    axis = vector_axis % indices.ndim
    return values.movedim(-1, axis + 1).flatten(axis, axis + 1)


@operator(moves=True, since="CoreML6")
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Ints | None = None) -> Tensor:
    """Zero but where the mask says; iOS 16 packs the mask in bytes, iOS 18 gives it the result's shape."""
    if shape is not None:
        flat = unpack_bits(mask.reshape(-1).numpy(), 1, math.prod(shape), signed=False)
        mask = torch.from_numpy(flat).reshape(shape)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    if int(mask.sum()) != nonzero_data.numel():
        raise ModelFileError(f"the mask keeps {int(mask.sum())} values; there are {nonzero_data.numel()}")
    dense[mask.bool()] = nonzero_data.reshape(-1)
    return dense


@operator(moves=True, since="CoreML8")
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """Looked up where the mask says; the mask, and the values in its order."""
    indices = constexpr_sparse_to_dense(indices_nonzero_data, indices_mask)
    dense = constexpr_lut_to_dense(indices, lut, None, vector_axis)
    mask = indices_mask
    if dense.shape != mask.shape:
        assert vector_axis is not None
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask.bool()]


@operator(since="CoreML8")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shifted and scaled where the mask says; the mask, and the values in its order."""
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]


def _spread(value: Tensor, shape: torch.Size) -> Tensor:
    """Repeat each value over its block, so that the result has (or broadcasts to) the shape."""
    for axis, size in enumerate(shape):
        if value.shape[axis] not in (1, size):
            if size % value.shape[axis]:
                raise ModelFileError(f"{value.shape[axis]} blocks do not divide an axis of {size}")
            value = value.repeat_interleave(size // value.shape[axis], axis)
    return value
