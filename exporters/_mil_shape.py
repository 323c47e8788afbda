"""Operators of ML Programs that move numbers or make shapes: reshape, slice, gather, concat, pad.

Written from Apple's description of MIL (coremltools' operator reference), in torch; parameters carry MIL's names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import DataError, ExportError

from ._mil_registry import Bools, Ints, Tensors, operator


@operator(moves=True)
def identity(x: Tensor) -> Tensor:
    return x


@operator(moves=True)
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@operator("reshape", moves=True)
def reshape_(x: Tensor, shape: Ints) -> Tensor:
    """A size of 0 is that of ``x`` on the same axis, counted from the last one, or 1; one of -1 follows from the rest.

    Before iOS 17 a 0 is allowed only where the ranks are equal, so the rule is the same.
    """
    known = (1,) * max(0, len(shape) - x.ndim) + tuple(x.shape)[max(0, x.ndim - len(shape)) :]
    return x.reshape([own if size == 0 else size for size, own in zip(shape, known, strict=True)])


@operator(moves=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    axis = axis % x.ndim
    return x.reshape(x.shape[:axis].numel(), x.shape[axis:].numel())


@operator(moves=True)
def transpose(x: Tensor, perm: Ints) -> Tensor:
    return x.permute(perm)


@operator(moves=True)
def expand_dims(x: Tensor, axes: Ints) -> Tensor:
    """``axes`` count in the result."""
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator(moves=True)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(axes)


@operator(moves=True)
def reverse(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.flip(tuple(range(x.ndim)) if axes is None else axes)


@operator(moves=True)
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """One after the other, or one slice of each in turn (then all have the same shape)."""
    if not interleave:
        return torch.cat(values, axis)
    axis = axis % values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@operator(moves=True)
def stack(values: Tensors, axis: int) -> Tensor:
    return torch.stack(values, axis)


@operator(moves=True)
def split(x: Tensor, axis: int, num_splits: int | None = None, split_sizes: Ints | None = None) -> tuple[Tensor, ...]:
    if split_sizes is not None:
        return x.split(list(split_sizes), axis)
    if num_splits is None or x.shape[axis] % num_splits:
        raise ExportError(f"splits {x.shape[axis]} into {num_splits} equal parts")
    return x.split(x.shape[axis] // num_splits, axis)


@operator(moves=True)
def tile(x: Tensor, reps: Ints) -> Tensor:
    return x.repeat(reps)


@operator(moves=True)
def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """NumPy's slicing, axis by axis; a masked bound is open, a squeezed axis is indexed by ``begin``."""
    none = (False,) * x.ndim
    stride, begin_mask, end_mask = stride or (1,) * x.ndim, begin_mask or none, end_mask or none
    squeeze_mask = squeeze_mask or none
    for axis in reversed(range(x.ndim)):  # from the last one, so that the others keep their place
        if squeeze_mask[axis]:
            x = x.select(axis, begin[axis])
            continue
        if begin_mask[axis] and end_mask[axis] and stride[axis] == 1:
            continue
        first = None if begin_mask[axis] else begin[axis]
        last = None if end_mask[axis] else end[axis]
        chosen = range(x.shape[axis])[first : last : stride[axis]]
        if chosen.step > 0:
            x = x[(slice(None),) * axis + (slice(chosen.start, max(chosen.stop, chosen.start), chosen.step),)]
        else:  # torch has no slices that run backwards
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64))
    return x


@operator(moves=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """A size of -1 goes to the end."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        first = first % x.shape[axis] if first < 0 else first
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


@operator(moves=True)
def gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool | None = None
) -> Tensor:
    """Slices of ``x`` along an axis; shape D[:axis] + N[batch_dims:] + D[axis+1:]."""
    axis = axis % x.ndim
    indices = _checked(indices, x.shape[axis], validate_indices)
    shape = x.shape[:axis] + indices.shape[batch_dims:] + x.shape[axis + 1 :]
    if batch_dims == 0:
        return x.index_select(axis, indices.reshape(-1)).reshape(shape)
    rows = x.flatten(0, batch_dims - 1)
    places = indices.flatten(0, batch_dims - 1)
    parts = [row.index_select(axis - batch_dims, place.reshape(-1)) for row, place in zip(rows, places, strict=True)]
    return torch.stack(parts).reshape(shape)


@operator(moves=True)
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool | None = None) -> Tensor:
    """``indices`` has the shape of ``x`` but for the axis."""
    return torch.gather(x, axis, _checked(indices, x.shape[axis], validate_indices))


@operator(moves=True)
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool | None = None) -> Tensor:
    """The last axis of ``indices`` holds places in ``x``, after ``batch_dims`` common axes."""
    depth = indices.shape[-1]
    sizes = x.shape[batch_dims : batch_dims + depth]
    places = [_checked(indices[..., i], size, validate_indices) for i, size in enumerate(sizes)]
    ranks = indices.ndim - 1
    batch = [torch.arange(x.shape[i]).reshape([-1 if j == i else 1 for j in range(ranks)]) for i in range(batch_dims)]
    return x[(*batch, *places)]


def _checked(indices: Tensor, size: int, validate: bool | None) -> Tensor:
    """Indices as int64, from zero.

    From iOS 17 on (the operators that have ``validate_indices``) a negative index is out of bounds, and what a device
    answers to that is undefined; before, it counts from the end.
    """
    indices = indices.to(torch.int64)
    lowest = -size if validate is None else 0
    if indices.numel() and (int(indices.min()) < lowest or int(indices.max()) >= size):
        raise DataError(
            f"indices {int(indices.min())} to {int(indices.max())} leave the range {lowest} to {size - 1}, "
            "where Core ML answers anything"
        )
    return torch.where(indices < 0, indices + size, indices) if validate is None else indices


@operator(moves=True)
def fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.reshape(()).expand(shape).clone()


@operator(moves=True)
def fill_like(ref_tensor: Tensor, value: Tensor | None = None) -> Tensor:
    return fill(tuple(ref_tensor.shape), value)


@operator()
def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=end.dtype)


@operator(moves=True)
def one_hot(
    indices: Tensor, one_hot_vector_size: int, axis: int = -1, on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Integers unless the values say otherwise; an index out of range gives only ``off_value``."""
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value.reshape(())
    off = torch.zeros((), dtype=on.dtype) if off_value is None else off_value.reshape(())
    hot = indices.unsqueeze(-1) == torch.arange(one_hot_vector_size)
    return torch.where(hot, on, off).movedim(-1, axis)


@operator(moves=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zero outside a band around the diagonal of the last two axes; -1 keeps that whole side."""
    rows = torch.arange(x.shape[-2]).unsqueeze(1)
    columns = torch.arange(x.shape[-1])
    keep = ((rows - columns <= lower) | (lower < 0)) & ((columns - rows <= upper) | (upper < 0))
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


@operator(moves=True)
def pad(x: Tensor, pad: Ints, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """Pairs of before and after for the last ``len(pad) / 2`` axes, in their order."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=constant_val)
    if mode not in ("reflect", "replicate"):
        raise ExportError(f"has the unknown mode {mode!r}")
    for axis, (before, after) in enumerate(pairs, start=x.ndim - len(pairs)):
        if before == after == 0:
            continue
        last = x.shape[axis] - 1
        places = torch.arange(-before, last + 1 + after)
        places = last - (last - places.abs()).abs() if mode == "reflect" else places.clamp(0, last)
        x = x.index_select(axis, places)
    return x


@operator(moves=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@operator(moves=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@operator(moves=True)
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    """Rows and columns to cut off before and after."""
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@operator(moves=True)
def upsample_nearest_neighbor(x: Tensor, scale_factor_height: float = 1.0, scale_factor_width: float = 1.0) -> Tensor:
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        size, last = math.floor(x.shape[axis] * factor), x.shape[axis] - 1
        x = x.index_select(axis, (torch.arange(size) / factor).floor().clamp(max=last).to(torch.int64))
    return x


@operator()
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1.0,
    scale_factor_width: float = 1.0,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """The scale is recomputed from the sizes; half-pixel centers unless the corners are aligned."""
    half = not align_corners if half_pixel_centers is None else half_pixel_centers
    for axis, factor in ((-2, scale_factor_height), (-1, scale_factor_width)):
        before = x.shape[axis]
        after = math.floor(before * factor)
        step = (before - 1) / max(after - 1, 1) if align_corners else before / after
        points = torch.arange(after, dtype=torch.float64) * step + (0.5 * step - 0.5 if half else 0.0)
        points = points.clamp(0, before - 1)
        low = points.floor().to(torch.int64)
        share = (points - low).to(x.dtype).reshape([-1 if axis == other else 1 for other in (-2, -1)])
        upper = x.index_select(axis, (low + 1).clamp(max=before - 1))
        x = torch.lerp(x.index_select(axis, low), upper, share)
    return x
