"""Operators of ML Programs with a memory or a choice: conditions, loops, lists and states.

``cond`` and ``while_loop`` run blocks, which is done in ``_mil_run.py``; here stand their arguments. A list is a tuple
with a place for each element, None where nothing was written yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from edgekd.errors import DataError, ModelFileError

from ._mil_registry import Tensors, operator

__all__ = ["StateCell"]

List: TypeAlias = tuple[Tensor | None, ...]


@dataclass
class StateCell:
    """One state of a program: a tensor that lasts from call to call."""

    value: Tensor


@operator(moves=True)
def cond(pred: Tensor) -> Any:
    raise AssertionError("blocks are run by the runner")


@operator(moves=True)
def while_loop(loop_vars: Tensors) -> Any:
    raise AssertionError("blocks are run by the runner")


@operator(moves=True, since="CoreML8")
def read_state(input: Any) -> Tensor:
    cell: StateCell = input
    return cell.value


@operator(moves=True, since="CoreML8")
def write_state(input: Any, data: Tensor) -> tuple[()]:
    """Has no result; coremltools' own ``coreml_update_state`` is written as this and a ``read_state``."""
    if input.value.shape != data.shape or input.value.dtype != data.dtype:
        raise ModelFileError(f"writes {tuple(data.shape)} {data.dtype} into a state of {tuple(input.value.shape)}")
    input.value = data
    return ()


@operator(moves=True)
def make_list(elem_shape: Any = None, init_length: int = 1, dynamic_length: bool = True, dtype: str = "fp32") -> List:
    return (None,) * init_length


@operator(moves=True)
def list_length(ls: Any) -> Tensor:
    return torch.tensor(len(ls), dtype=torch.int32)


@operator(moves=True)
def list_read(ls: Any, index: int) -> Tensor:
    return _written(ls, index)


@operator(moves=True)
def list_gather(ls: Any, indices: Tensor) -> Tensor:
    return torch.stack([_written(ls, index) for index in indices.reshape(-1).tolist()])


@operator(moves=True)
def list_write(ls: Any, index: int, value: Tensor) -> List:
    return _with(ls, {index: value})


@operator(moves=True)
def list_scatter(ls: Any, indices: Tensor, value: Tensor) -> List:
    """A list that is too short grows."""
    return _with(ls, dict(zip(indices.reshape(-1).tolist(), value.unbind(0), strict=True)))


def _written(ls: List, index: int) -> Tensor:
    element = ls[index] if 0 <= index < len(ls) else None
    if element is None:
        raise DataError(f"reads element {index} of a list of {len(ls)}, which nothing wrote")
    return element


def _with(ls: List, elements: dict[int, Tensor]) -> List:
    if elements and min(elements) < 0:
        raise DataError(f"writes element {min(elements)} of a list")
    length = max(len(ls), max(elements, default=-1) + 1)
    return tuple(elements.get(i, ls[i] if i < len(ls) else None) for i in range(length))
