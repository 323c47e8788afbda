"""More cases for the MIL evaluator (see ``mil_cases.py``): windows, weights, norms and compressed numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from mil_cases import Array, case, normal, positive, softmax

__all__: list[str] = []

Pairs = list[tuple[int, int]]


def convolve(
    x: Array, weight: Array, bias: Array | None, strides: list[int], pads: Pairs, dilations: list[int], groups: int
) -> Array:
    """Convolution by its definition, one output number at a time."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    kernel = weight.shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    out = np.zeros((x.shape[0], weight.shape[0], *size))
    per_out, per_in = weight.shape[0] // groups, weight.shape[1]
    for n, o in np.ndindex(x.shape[0], weight.shape[0]):
        channels = slice(o // per_out * per_in, (o // per_out + 1) * per_in)
        for place in np.ndindex(*size):
            window = tuple(
                slice(p * s, p * s + r, d) for p, s, r, d in zip(place, strides, reach, dilations, strict=True)
            )
            out[(n, o, *place)] = (x[(n, channels, *window)] * weight[o]).sum()
    if bias is not None:
        out += bias.reshape(1, -1, *[1] * len(size))
    return out.astype(np.float32)


def spread(x: Array, weight: Array, strides: list[int], dilations: list[int], groups: int) -> Array:
    """Transposed convolution by its definition: every input number adds its kernel to the full output."""
    kernel = weight.shape[2:]
    size = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)]
    per_in, per_out = weight.shape[0] // groups, weight.shape[1]
    out = np.zeros((x.shape[0], per_out * groups, *size))
    for n, c in np.ndindex(x.shape[0], x.shape[1]):
        for o in range(per_out):
            for place in np.ndindex(*x.shape[2:]):
                window = tuple(
                    slice(p * s, p * s + (k - 1) * d + 1, d)
                    for p, s, k, d in zip(place, strides, kernel, dilations, strict=True)
                )
                out[(n, c // per_in * per_out + o, *window)] += x[(n, c, *place)] * weight[c, o]
    return out.astype(np.float32)


def pool(
    x: Array, kernel: list[int], strides: list[int], pads: Pairs, size: list[int], reduce: Callable[[Array], float]
) -> Array:
    """Pooling by its definition; what is padded is NaN, and what lies beyond the padding is absent."""
    x = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=np.nan)
    out = np.zeros((*x.shape[:2], *size), np.float32)
    for place in np.ndindex(*size):
        window = tuple(slice(p * s, p * s + k) for p, s, k in zip(place, strides, kernel, strict=True))
        for n, c in np.ndindex(*x.shape[:2]):
            out[(n, c, *place)] = reduce(x[(n, c, *window)])
    return out


def mean_of_all(window: Array) -> float:
    return float(np.nan_to_num(window).mean())


def root_of_squares(window: Array) -> float:
    return float(np.sqrt(np.nansum(window**2)))


# Convolution --------------------------------------------------------------------------------------------------------

X1, X2, X3 = normal(2, 4, 9), normal(1, 4, 7, 6), normal(1, 2, 4, 5, 3)
W2, BIAS = normal(6, 4, 3, 3), normal(6)
case(
    "conv_valid",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=W2, bias=BIAS),
    convolve(X2, W2, BIAS, [1, 1], [(0, 0), (0, 0)], [1, 1], 1),
    tolerance=1e-5,
)
case(
    "conv_custom_uneven",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=W2, strides=[2, 1], pad_type="custom", pad=[0, 1, 2, 0], dilations=[1, 2]),
    convolve(X2, W2, None, [2, 1], [(0, 1), (2, 0)], [1, 2], 1),
    tolerance=1e-5,
)
case(
    "conv_custom_even",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=W2, bias=BIAS, pad_type="custom", pad=[1, 1, 2, 2]),
    convolve(X2, W2, BIAS, [1, 1], [(1, 1), (2, 2)], [1, 1], 1),
    tolerance=1e-5,
)
WE = normal(2, 4, 2, 4)  # even kernels: the padding of "same" is uneven
case(
    "conv_same",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=WE, strides=[1, 1], pad_type="same"),
    convolve(X2, WE, None, [1, 1], [(0, 1), (1, 2)], [1, 1], 1),
    tolerance=1e-5,
)
case(
    "conv_same_lower",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=WE, strides=[1, 1], pad_type="same_lower"),
    convolve(X2, WE, None, [1, 1], [(1, 0), (2, 1)], [1, 1], 1),
    tolerance=1e-5,
)
case(
    "conv_same_stride",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=W2, strides=[2, 2], pad_type="same"),
    convolve(X2, W2, None, [2, 2], [(1, 1), (0, 1)], [1, 1], 1),
    tolerance=1e-5,
)
WD, WG = normal(4, 1, 3, 3), normal(6, 2, 3, 3)
case(
    "conv_depthwise",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=WD, groups=4, pad_type="custom", pad=[1, 1, 1, 1]),
    convolve(X2, WD, None, [1, 1], [(1, 1), (1, 1)], [1, 1], 4),
    tolerance=1e-5,
)
case(
    "conv_groups",
    [X2],
    lambda mb, x: mb.conv(x=x, weight=WG, groups=2),
    convolve(X2, WG, None, [1, 1], [(0, 0), (0, 0)], [1, 1], 2),
    tolerance=1e-5,
)
W1, W3 = normal(3, 4, 3), normal(3, 2, 2, 3, 2)
case(
    "conv_1d",
    [X1],
    lambda mb, x: mb.conv(x=x, weight=W1, dilations=[2], pad_type="custom", pad=[2, 1]),
    convolve(X1, W1, None, [1], [(2, 1)], [2], 1),
    tolerance=1e-5,
)
case(
    "conv_3d",
    [X3],
    lambda mb, x: mb.conv(x=x, weight=W3),
    convolve(X3, W3, None, [1, 1, 1], [(0, 0)] * 3, [1, 1, 1], 1),
    tolerance=1e-5,
)
WT = normal(4, 3, 3, 2)
FULL = spread(X2, WT, [2, 3], [1, 1], 1)
case(
    "conv_transpose_valid",
    [X2],
    lambda mb, x: mb.conv_transpose(x=x, weight=WT, bias=BIAS[:3], strides=[2, 3]),
    FULL + BIAS[:3, None, None],
    tolerance=1e-5,
)
case(
    "conv_transpose_custom",
    [X2],
    lambda mb, x: mb.conv_transpose(x=x, weight=WT, strides=[2, 3], pad_type="custom", pad=[1, 0, 0, 2]),
    FULL[:, :, 1:, :-2],
    tolerance=1e-5,
)
case(
    "conv_transpose_output_shape",
    [X2],
    lambda mb, x: mb.conv_transpose(
        x=x, weight=WT, bias=BIAS[:3], strides=[2, 3], pad_type="custom", pad=[1, 1, 0, 0], output_shape=[1, 3, 14, 18]
    ),
    np.pad(FULL, ((0, 0), (0, 0), (0, 0), (0, 1)))[:, :, 1:15] + BIAS[:3, None, None],
    tolerance=1e-5,
)
WTG = normal(4, 2, 2, 2)
case(
    "conv_transpose_groups",
    [X2],
    lambda mb, x: mb.conv_transpose(x=x, weight=WTG, groups=2, dilations=[2, 1]),
    spread(X2, WTG, [1, 1], [2, 1], 2),
    tolerance=1e-5,
)


# Pooling ------------------------------------------------------------------------------------------------------------

Y = normal(1, 2, 7, 6)
case(
    "max_pool_valid",
    [Y],
    lambda mb, x: mb.max_pool(x=x, kernel_sizes=[3, 2], strides=[2, 2], pad_type="valid"),
    pool(Y, [3, 2], [2, 2], [(0, 0), (0, 0)], [3, 3], np.nanmax),
)
case(
    "max_pool_custom",
    [Y - 5],  # all below zero: padding must not win
    lambda mb, x: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 0]),
    pool(Y - 5, [3, 3], [2, 2], [(1, 1), (1, 0)], [4, 3], np.nanmax),
)
case(
    "max_pool_same",
    [Y - 5],
    lambda mb, x: mb.max_pool(x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="same"),
    pool(Y - 5, [2, 3], [2, 2], [(0, 1), (0, 1)], [4, 3], np.nanmax),
)
case(
    "max_pool_same_lower",
    [Y - 5],
    lambda mb, x: mb.max_pool(x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="same_lower"),
    pool(Y - 5, [2, 3], [2, 2], [(1, 0), (1, 0)], [4, 3], np.nanmax),
)
case(
    "max_pool_ceil",
    [Y],
    lambda mb, x: mb.max_pool(x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="valid", ceil_mode=True),
    pool(Y, [2, 3], [2, 2], [(0, 0), (0, 0)], [4, 3], np.nanmax),
)
case(
    "max_pool_1d",
    [X1],
    lambda mb, x: mb.max_pool(x=x, kernel_sizes=[4], strides=[3], pad_type="valid"),
    pool(X1, [4], [3], [(0, 0)], [2], np.nanmax),
)
case(
    "max_pool_3d",
    [X3],
    lambda mb, x: mb.max_pool(x=x, kernel_sizes=[2, 2, 2], pad_type="valid"),
    pool(X3, [2, 2, 2], [1, 1, 1], [(0, 0)] * 3, [3, 4, 2], np.nanmax),
)
case(
    "avg_pool_valid",
    [Y],
    lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[2, 3], strides=[2, 1], pad_type="valid"),
    pool(Y, [2, 3], [2, 1], [(0, 0), (0, 0)], [3, 4], np.nanmean),
)
case(
    "avg_pool_counts_padding",
    [Y],
    lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 2, 0]),
    pool(Y, [3, 3], [2, 2], [(1, 1), (2, 0)], [4, 3], mean_of_all),
)
case(
    "avg_pool_without_padding_in_the_mean",
    [Y],
    lambda mb, x: mb.avg_pool(
        x=x,
        kernel_sizes=[3, 3],
        strides=[2, 2],
        pad_type="custom",
        pad=[1, 1, 2, 0],
        exclude_padding_from_average=True,
    ),
    pool(Y, [3, 3], [2, 2], [(1, 1), (2, 0)], [4, 3], np.nanmean),
)
case(
    "avg_pool_same",
    [Y],
    lambda mb, x: mb.avg_pool(
        x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="same", exclude_padding_from_average=True
    ),
    pool(Y, [2, 3], [2, 2], [(0, 1), (0, 1)], [4, 3], np.nanmean),
)
case(
    "avg_pool_ceil",
    [Y],
    lambda mb, x: mb.avg_pool(
        x=x, kernel_sizes=[2, 3], strides=[2, 2], pad_type="custom", pad=[0, 0, 1, 1], ceil_mode=True
    ),
    pool(Y, [2, 3], [2, 2], [(0, 0), (1, 1)], [4, 4], mean_of_all),  # the last window of the second axis is 2 wide
)
case(
    "avg_pool_global_by_an_endless_window",
    [Y],
    lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[7000, 6000], strides=[7000, 6000], pad_type="valid", ceil_mode=True),
    Y.mean((2, 3), keepdims=True),
)
case(
    "l2_pool",
    [Y],
    lambda mb, x: mb.l2_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="custom", pad=[1, 0, 0, 0]),
    pool(Y, [2, 2], [2, 2], [(1, 0), (0, 0)], [4, 3], root_of_squares),
    tolerance=1e-5,
)


# Norms --------------------------------------------------------------------------------------------------------------

Z, MEAN, VARIANCE = normal(2, 3, 4, 5), normal(3), positive(3)
GAMMA, BETA = normal(3), normal(3)


def channels(value: Array) -> Array:
    return value[None, :, None, None]


case(
    "batch_norm",
    [Z],
    lambda mb, x: mb.batch_norm(x=x, mean=MEAN, variance=VARIANCE, gamma=GAMMA, beta=BETA, epsilon=0.1),
    (Z - channels(MEAN)) / np.sqrt(channels(VARIANCE) + 0.1) * channels(GAMMA) + channels(BETA),
    tolerance=1e-5,
)
case(
    "batch_norm_plain",
    [Z],
    lambda mb, x: mb.batch_norm(x=x, mean=MEAN, variance=VARIANCE),
    (Z - channels(MEAN)) / np.sqrt(channels(VARIANCE) + 1e-5),
    tolerance=1e-5,
)


def normalized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    result: Array = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
    return result


case(
    "instance_norm",
    [Z],
    lambda mb, x: mb.instance_norm(x=x, gamma=GAMMA, beta=BETA, epsilon=0.1),
    normalized(Z, (2, 3), 0.1) * channels(GAMMA) + channels(BETA),
    tolerance=1e-5,
)
G45 = normal(4, 5)
case(
    "layer_norm",
    [Z],
    lambda mb, x: mb.layer_norm(x=x, axes=[-2, -1], gamma=G45, beta=G45 + 1, epsilon=0.1),
    normalized(Z, (2, 3), 0.1) * G45 + G45 + 1,
    tolerance=1e-5,
)
case(
    "layer_norm_over_channels",
    [Z],
    lambda mb, x: mb.layer_norm(x=x, axes=[1], gamma=GAMMA, beta=BETA, epsilon=1e-12),
    normalized(Z, (1,), 1e-12) * channels(GAMMA) + channels(BETA),
    tolerance=2e-5,
)
case(
    "layer_norm_of_all",
    [Z],
    lambda mb, x: mb.layer_norm(x=x, axes=[0, 1, 2, 3]),
    normalized(Z, (0, 1, 2, 3), 1e-5),
    tolerance=1e-5,
)
case(
    "l2_norm",
    [Z],
    lambda mb, x: mb.l2_norm(x=x, epsilon=0.1),
    Z / np.sqrt((Z**2).sum((1, 2, 3), keepdims=True) + 0.1),
)
Q = normal(1, 6, 2, 2)
SQUARES = np.stack([(Q[:, max(0, c - 1) : c + 2] ** 2).sum(1) for c in range(6)], 1)
case(
    "local_response_norm",
    [Q],
    lambda mb, x: mb.local_response_norm(x=x, size=3, alpha=0.3, beta=0.5, k=2.0),
    Q / np.sqrt(2.0 + 0.1 * SQUARES),
    tolerance=1e-5,
)


# Products -----------------------------------------------------------------------------------------------------------

V, WL = normal(2, 3, 4), normal(5, 4)
case("linear", [V], lambda mb, x: mb.linear(x=x, weight=WL, bias=BIAS[:5]), V @ WL.T + BIAS[:5], tolerance=1e-5)
case("linear_without_bias", [V], lambda mb, x: mb.linear(x=x, weight=WL), V @ WL.T, tolerance=1e-5)
R = normal(2, 5, 4)
case(
    "matmul",
    [V, R],
    lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True),
    V @ R.transpose(0, 2, 1),
    tolerance=1e-5,
)
case(
    "matmul_broadcast",
    [V],
    lambda mb, x: mb.matmul(x=x, y=normal(3, 6) * 0 + 1, transpose_x=True),
    np.repeat(V.sum(1)[..., None], 6, -1),
    tolerance=1e-5,
)
E1, E2 = normal(2, 3, 4, 5), normal(2, 5, 4, 6)
case(
    "einsum",
    [E1, E2],
    lambda mb, x, y: mb.einsum(values=[x, y], equation="nchw,nwhu->nchu"),
    np.einsum("nchw,nwhu->nchu", E1, E2),
    tolerance=1e-5,
)


# Compressed numbers -------------------------------------------------------------------------------------------------

T = np.array([[-1.0, -0.26, 0.0, 0.24, 0.25, 0.75, 100.0]], np.float32)  # ties, and one that saturates
case(
    "quantize",
    [T],
    lambda mb, x: mb.cast(
        x=mb.quantize(input=x, scale=np.float32(0.5), zero_point=np.int8(3), output_dtype="int8"), dtype="int32"
    ),
    np.array([[1, 2, 3, 3, 3, 5, 127]], np.int32),
)
SCALES, ZEROS = np.array([0.5, 0.25, 2.0], np.float32), np.array([1, 0, 255], np.uint8)
case(
    "quantize_and_dequantize_by_channel",
    [Z],
    lambda mb, x: mb.dequantize(
        input=mb.quantize(input=x, scale=SCALES, zero_point=ZEROS, axis=1, output_dtype="uint8"),
        scale=SCALES,
        zero_point=ZEROS,
        axis=-3,
    ),
    (
        np.clip(np.round(Z / channels(SCALES)) + channels(ZEROS.astype(np.float32)), 0, 255)
        - channels(ZEROS.astype(np.float32))
    )
    * channels(SCALES),
)
case(
    "dequantize_without_zero_point",
    [T],
    lambda mb, x: mb.dequantize(
        input=mb.quantize(input=x, scale=np.float32(0.5), output_dtype="uint8"), scale=np.float32(0.5)
    ),
    np.clip(np.round(T / 0.5), 0, 255) * 0.5,
)
W8 = np.arange(-12, 12, dtype=np.int8).reshape(6, 4)
case(
    "constexpr_affine_dequantize",
    [V],
    lambda mb, x: mb.add(
        x=x,
        y=mb.constexpr_affine_dequantize(quantized_data=W8[:3], zero_point=np.int8(2), scale=SCALES, axis=np.int32(0)),
    ),
    V + (W8[:3].astype(np.float32) - 2) * SCALES[:, None],
)
case(
    "constexpr_cast",
    [V],
    lambda mb, x: mb.add(x=x, y=mb.constexpr_cast(source_val=G45[:3, :4].astype(np.float16), output_dtype="fp32")),
    V + G45[:3, :4].astype(np.float16).astype(np.float32),
)


def packed(values: Array, bits: int) -> Array:
    """Bits of each value, lowest first, in bytes."""
    flags = (values.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(flags.astype(np.uint8).reshape(-1), bitorder="little")


INDICES = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 3, 3]], np.uint8)
TABLE = np.array([-1.0, 0.5, 2.0, 7.0], np.float32)
case(
    "constexpr_lut_to_dense",
    [V],
    lambda mb, x: mb.add(
        x=x,
        y=mb.constexpr_lut_to_dense(indices=packed(INDICES, 2), lut=TABLE, shape=np.array([3, 4], np.uint32)),
    ),
    V + TABLE[INDICES],
)
MASK = np.array([[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 0, 0]], np.uint8)
KEPT = np.array([5.0, 6.0, 7.0, 8.0, 9.0], np.float32)
DENSE = np.zeros((3, 4), np.float32)
for _value, _place in zip(KEPT, [p for p in itertools.product(range(3), range(4)) if MASK[p]], strict=True):
    DENSE[_place] = _value
case(
    "constexpr_sparse_to_dense",
    [V],
    lambda mb, x: mb.add(
        x=x,
        y=mb.constexpr_sparse_to_dense(nonzero_data=KEPT, mask=packed(MASK, 1), shape=np.array([3, 4], np.uint32)),
    ),
    V + DENSE,
)


def attention(q: Array, k: Array, v: Array, mask: Array | float) -> Array:
    result: Array = softmax(q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]) + mask, -1) @ v
    return result
