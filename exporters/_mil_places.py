"""Operators of ML Programs that read or write at places given by indices: the gathers and the scatters.

Written from Apple's description of MIL (coremltools' operator reference), in torch; parameters carry MIL's names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.errors import DataError, ExportError

from ._mil_registry import operator

_VALIDATED = {"validate_indices": "CoreML7"}


@operator(moves=True, later={"batch_dims": "CoreML6", **_VALIDATED})
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


@operator(moves=True, later=_VALIDATED)
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool | None = None) -> Tensor:
    """``indices`` has the shape of ``x`` but for the axis."""
    return torch.gather(x, axis, _checked(indices, x.shape[axis], validate_indices))


@operator(moves=True, later={"batch_dims": "CoreML6", **_VALIDATED})
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool | None = None) -> Tensor:
    """The last axis of ``indices`` holds places in ``x``, after ``batch_dims`` common axes."""
    depth = indices.shape[-1]
    sizes = x.shape[batch_dims : batch_dims + depth]
    places = [_checked(indices[..., i], size, validate_indices) for i, size in enumerate(sizes)]
    ranks = indices.ndim - 1
    batch = [torch.arange(x.shape[i]).reshape([-1 if j == i else 1 for j in range(ranks)]) for i in range(batch_dims)]
    return x[(*batch, *places)]


@operator(moves=True)
def non_zero(x: Tensor) -> Tensor:
    """One row of indices per number that is not zero."""
    return x.nonzero().to(torch.int32)


@operator(later=_VALIDATED)
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> Tensor:
    """Slices of ``updates`` into the slices of ``data`` along an axis."""
    places = _places(data).index_select(axis, _checked(indices, data.shape[axis], validate_indices))
    return _scatter(data, places, updates, mode)


@operator(later=_VALIDATED)
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool | None = None,
) -> Tensor:
    """``indices`` and ``updates`` have the shape of ``data`` but for the axis."""
    places = torch.gather(_places(data), axis, _checked(indices, data.shape[axis], validate_indices))
    return _scatter(data, places, updates, mode)


@operator(later=_VALIDATED)
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool | None = None
) -> Tensor:
    """The last axis of ``indices`` holds places in ``data``."""
    sizes = data.shape[: indices.shape[-1]]
    each = tuple(_checked(indices[..., i], size, validate_indices) for i, size in enumerate(sizes))
    return _scatter(data, _places(data)[each], updates, mode)


def _places(data: Tensor) -> Tensor:
    """Of every number, its place in memory."""
    return torch.arange(data.numel()).reshape(data.shape)


def _scatter(data: Tensor, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    """Combine numbers with those at their places, each update after the other."""
    flat, index, values = data.reshape(-1), places.reshape(-1), updates.expand(places.shape).reshape(-1)
    if mode == "update":
        if index.unique().numel() != index.numel():
            raise DataError("writes a place twice, and which of both stays is not defined")
        result = flat.scatter(0, index, values)
    elif mode in ("add", "sub"):
        result = flat.index_add(0, index, values, alpha=1 if mode == "add" else -1)
    elif mode == "mul":
        result = flat.index_reduce(0, index, values, "prod")
    elif mode == "div":
        if not data.is_floating_point():
            raise ExportError("divides integers, and MIL does not say how they are rounded")
        result = flat / torch.ones_like(flat).index_reduce(0, index, values, "prod")
    elif mode in ("max", "min"):
        result = flat.index_reduce(0, index, values, f"a{mode}")
    else:
        raise ExportError(f"has the unknown mode {mode!r}")
    return result.reshape(data.shape)


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
