"""Operators of ML Programs that carry weights or windows: convolution, pooling, normalization, products, attention.

Written from Apple's description of MIL (coremltools' operator reference), in torch; parameters carry MIL's names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import ExportError

from ._mil_registry import Ints, Tensors, operator

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_AVERAGE = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAXIMUM = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


def spatial_padding(pad_type: str, pad: Ints | None, size: Ints, kernel: Ints, strides: Ints) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis.

    Args:
        pad_type: ``valid``, ``custom``, ``same`` (an odd rest goes after) or ``same_lower`` (an odd rest goes before).
        pad: For ``custom``: before and after, axis by axis.
        size: Of the input, spatial axes only.
        kernel: Sizes, dilation included.
        strides: One per axis.

    Raises:
        ExportError: The type is unknown.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(size)
    if pad_type == "custom":
        pad = pad or (0,) * 2 * len(size)
        return list(zip(pad[::2], pad[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise ExportError(f"has the unknown pad_type {pad_type!r}")
    pairs = []
    for length, window, stride in zip(size, kernel, strides, strict=True):
        total = max((-(-length // stride) - 1) * stride + window - length, 0)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if pad_type == "same" else (more, less))
    return pairs


def _pad(x: Tensor, pairs: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    if all(pair == (0, 0) for pair in pairs):
        return x
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=value)


@operator()
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints | None = None,
    pad_type: str = "valid",
    pad: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Convolution over one to three spatial axes; ``weight`` is (out, in / groups, *kernel)."""
    rank = x.ndim - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    kernel = tuple((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True))
    pairs = spatial_padding(pad_type, pad, tuple(x.shape[2:]), kernel, strides)
    if all(before == after for before, after in pairs):
        return _CONV[x.ndim](x, weight, bias, strides, [before for before, _ in pairs], dilations, groups)
    return _CONV[x.ndim](_pad(x, pairs), weight, bias, strides, 0, dilations, groups)


@operator()
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Ints | None = None,
    output_shape: Ints | None = None,
    pad_type: str = "valid",
    strides: Ints | None = None,
    dilations: Ints | None = None,
    groups: int = 1,
) -> Tensor:
    """Transposed convolution; ``weight`` is (in, out / groups, *kernel), ``pad`` is cut off the full result."""
    rank = x.ndim - 2
    strides, dilations = strides or (1,) * rank, dilations or (1,) * rank
    kernel = tuple((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True))
    pairs = _cuts(pad_type, pad, kernel, strides)
    full = _CONV_TRANSPOSE[x.ndim](x, weight, None, strides, 0, 0, groups, dilations)
    for axis, (before, after) in enumerate(pairs, start=2):
        size = output_shape[axis] if output_shape else full.shape[axis] - before - after
        missing = before + size - full.shape[axis]
        if missing > 0:  # a stride may leave rows at the end that no input reaches
            full = F.pad(full, [0, 0] * (full.ndim - 1 - axis) + [0, missing])
        full = full.narrow(axis, before, size)
    return full if bias is None else full + bias.reshape(-1, *[1] * rank)


def _cuts(pad_type: str, pad: Ints | None, kernel: Ints, strides: Ints) -> list[tuple[int, int]]:
    """What a transposed convolution cuts off (below zero: appends) before and after each axis.

    ``same`` makes the result ``strides`` times as large as the input, so it cuts what the convolution of that padding
    would have padded.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(kernel)
    if pad_type == "custom":
        pad = pad or (0,) * 2 * len(kernel)
        return list(zip(pad[::2], pad[1::2], strict=True))
    if pad_type != "same":
        raise ExportError(f"has the unknown pad_type {pad_type!r}")
    totals = [window - stride for window, stride in zip(kernel, strides, strict=True)]
    return [(max(total, 0) // 2, total - max(total, 0) // 2) for total in totals]


def _windows(
    x: Tensor, kernel: Ints, strides: Ints, pad_type: str, pad: Ints | None, ceil_mode: bool
) -> tuple[Ints, list[tuple[int, int]], list[tuple[int, int]]]:
    """Window of a pooling, its padding, and the rows that ``ceil_mode`` adds after that."""
    pairs = spatial_padding(pad_type, pad, tuple(x.shape[2:]), kernel, strides)
    extra = [(0, 0)] * len(pairs)
    windows = list(kernel)
    if ceil_mode and pad_type in ("valid", "custom"):
        for axis, (before, after) in enumerate(pairs):
            length = x.shape[2 + axis]
            count = -(-(length + before + after - kernel[axis]) // strides[axis]) + 1
            if (count - 1) * strides[axis] >= length + before:  # a window that would start in the padding after
                count -= 1
            reach = (count - 1) * strides[axis] + kernel[axis]
            if count == 1:  # one window, which may be larger than everything (a global pool written so)
                windows[axis] = min(kernel[axis], length + before + after)
            else:
                extra[axis] = (0, max(0, reach - length - before - after))
    return tuple(windows), pairs, extra


@operator(moves=True)
def max_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides = strides or (1,) * (x.ndim - 2)
    kernel, pairs, extra = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    padded = _pad(_pad(x, pairs, -math.inf), extra, -math.inf)
    return _MAXIMUM[x.ndim](padded, kernel, strides)


@operator()
def avg_pool(
    x: Tensor,
    kernel_sizes: Ints,
    pad_type: str,
    strides: Ints | None = None,
    pad: Ints | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """Rows that only ``ceil_mode`` adds never count, as in PyTorch."""
    strides = strides or (1,) * (x.ndim - 2)
    kernel, pairs, extra = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    pool = _AVERAGE[x.ndim]
    if not any(map(any, pairs)) and not any(map(any, extra)):
        return pool(x, kernel, strides)
    means = pool(_pad(_pad(x, pairs), extra), kernel, strides)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    counted = _pad(_pad(counted, pairs, 0.0 if exclude_padding_from_average else 1.0), extra)
    return means / pool(counted, kernel, strides)


@operator()
def l2_pool(
    x: Tensor, kernel_sizes: Ints, pad_type: str, strides: Ints | None = None, pad: Ints | None = None,
    ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """Root of the sum of squares in each window."""
    strides = strides or (1,) * (x.ndim - 2)
    kernel, pairs, extra = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    means = _AVERAGE[x.ndim](_pad(_pad(x.square(), pairs), extra), kernel, strides)
    return torch.sqrt(means * math.prod(kernel))


@operator()
def batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:  # fmt: skip
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@operator()
def instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


@operator()
def layer_norm(
    x: Tensor, axes: Ints | None = None, gamma: Tensor | None = None, beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:  # fmt: skip
    """``gamma`` and ``beta`` have the shape of ``x`` on the axes."""
    dims = sorted(range(x.ndim) if axes is None else (axis % x.ndim for axis in axes))
    if dims == list(range(x.ndim - len(dims), x.ndim)):
        return F.layer_norm(x, x.shape[x.ndim - len(dims) :], gamma, beta, epsilon)
    shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    result = (x - mean) * torch.rsqrt(variance + epsilon)
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


@operator()
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes."""
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


@operator()
def local_response_norm(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


@operator()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@operator()
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


@operator()
def einsum(values: Tensors, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@operator(since="CoreML8")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention with the scale 1/√E; a Boolean mask says who takes part, a float mask is added."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask)
