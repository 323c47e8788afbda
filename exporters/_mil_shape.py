"""Operators of ML Programs that move numbers or make shapes: reshape, slice, gather, concat, pad.

Written from Apple's description of MIL (coremltools' operator reference), in torch; parameters carry MIL's names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import ExportError, ModelFileError

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


@operator(moves=True, since="CoreML6")
def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors) -> Tensor:
    """To sizes taken from other tensors, one stretch of axes of each; a masked end is open."""
    shape: list[int] = []
    for ref, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += ref.shape[int(begin) : None if bool(mask) else int(end)]
    return x.reshape(shape)


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
def reverse_sequence(x: Tensor, lengths: Ints, seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """The first ``lengths[i]`` steps of sample i backwards."""
    steps = torch.arange(x.shape[seq_axis])
    rows = []
    for row, length in zip(x.split(1, batch_axis), lengths, strict=True):
        rows.append(row.index_select(seq_axis, torch.where(steps < length, length - 1 - steps, steps)))
    return torch.cat(rows, batch_axis)


@operator(moves=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """Every window of an axis, which becomes (windows, size)."""
    axis = axis % x.ndim
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


@operator(moves=True)
def concat(values: Tensors, axis: int, interleave: bool = False) -> Tensor:
    """One after the other, or one slice of each in turn (then all have the same shape); scalars make a vector."""
    if all(value.ndim == 0 for value in values):
        return torch.stack(values, axis)
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
    chosen = _chosen(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    for axis in reversed(range(x.ndim)):  # from the last one, so that the others keep their place
        places = chosen[axis]
        if isinstance(places, int):
            x = x.select(axis, places)
        elif places == range(x.shape[axis]):
            continue
        elif places.step > 0:
            x = x[(slice(None),) * axis + (slice(places.start, max(places.stop, places.start), places.step),)]
        else:  # torch has no slices that run backwards
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return x


@operator(moves=True, since="CoreML8")
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Bools | None = None,
    end_mask: Bools | None = None,
    squeeze_mask: Bools | None = None,
) -> Tensor:
    """``x`` with that slice replaced; see ``slice_by_index``."""
    chosen = _chosen(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    kept = [axis for axis, places in enumerate(chosen) if not isinstance(places, int)]
    if update.shape != tuple(len(chosen[axis]) for axis in kept):  # type: ignore[arg-type]
        raise ModelFileError(f"writes {tuple(update.shape)} into a slice of another shape")
    index = []
    for axis, places in enumerate(chosen):
        if isinstance(places, int):
            index.append(torch.tensor(places))
        else:
            shape = [-1 if other == axis else 1 for other in kept]
            index.append(torch.tensor(list(places), dtype=torch.int64).reshape(shape))
    result = x.clone()
    result[tuple(index)] = update
    return result


def _chosen(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Bools | None,
    end_mask: Bools | None,
    squeeze_mask: Bools | None,
) -> list[range | int]:
    """What a slice takes of each axis: places, or one place of an axis that it drops."""
    none = (False,) * x.ndim
    stride, begin_mask, end_mask = stride or (1,) * x.ndim, begin_mask or none, end_mask or none
    chosen: list[range | int] = []
    for axis, squeezed in enumerate(squeeze_mask or none):
        if squeezed:
            chosen.append(range(x.shape[axis])[begin[axis]])
            continue
        first = None if begin_mask[axis] else begin[axis]
        last = None if end_mask[axis] else end[axis]
        chosen.append(range(x.shape[axis])[first : last : stride[axis]])
    return chosen


@operator(moves=True)
def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """A size of -1 goes to the end."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        first = first % x.shape[axis] if first < 0 else first
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


@operator(moves=True)
def fill(shape: Ints, value: Tensor | None = None) -> Tensor:
    return torch.zeros(shape) if value is None else value.reshape(()).expand(shape).clone()


@operator(moves=True, since="CoreML6")
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


@operator(moves=True, since="CoreML6")
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@operator(moves=True)
def crop(x: Tensor, crop_height: Ints, crop_width: Ints) -> Tensor:
    """Rows and columns to cut off before and after."""
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@operator(moves=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channel (i · b + j) · C + c to pixel (i, j) of the blocks of channel c."""
    n, channels, height, width = x.shape
    blocks = x.reshape(n, block_size, block_size, channels // block_size**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, height * block_size, width * block_size)


@operator(moves=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    """The inverse of ``depth_to_space``."""
    n, channels, height, width = x.shape
    blocks = x.reshape(n, channels, height // block_size, block_size, width // block_size, block_size)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, height // block_size, width // block_size)


@operator(moves=True)
def space_to_batch(x: Tensor, block_shape: Ints, paddings: Ints) -> Tensor:
    """Zeros around the image, then pixel (i, j) of every block to sample (i · width of a block + j) · n + sample."""
    rows, columns = block_shape
    top, bottom, left, right = paddings
    x = F.pad(x, (left, right, top, bottom))
    n, channels, height, width = x.shape
    blocks = x.reshape(n, channels, height // rows, rows, width // columns, columns)
    return blocks.permute(3, 5, 0, 1, 2, 4).reshape(-1, channels, height // rows, width // columns)


@operator(moves=True)
def batch_to_space(x: Tensor, block_shape: Ints, crops: Ints) -> Tensor:
    """The inverse of ``space_to_batch``."""
    rows, columns = block_shape
    top, bottom, left, right = crops
    _, channels, height, width = x.shape
    blocks = x.reshape(rows, columns, -1, channels, height, width).permute(2, 3, 4, 0, 5, 1)
    whole = blocks.reshape(-1, channels, height * rows, width * columns)
    return whole[..., top : height * rows - bottom, left : width * columns - right]
