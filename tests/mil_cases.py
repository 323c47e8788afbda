"""One case per operator and edge of the MIL evaluator: how to build it, and the answer computed in another way.

The answers are NumPy: plain loops or formulas, never the torch calls of the evaluator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CASES", "Case"]

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """An operator with its arguments.

    Attributes:
        name: Of the case; of its results in the program.
        inputs: Given when the program runs; float32, or int32 for integers.
        build: Takes coremltools' builder and the inputs as variables, returns one variable or several.
        answers: One per result, float32 or int32 (Booleans and small integers are cast to int32).
        tolerance: Largest difference.
        opset: Of the program.
    """

    name: str
    inputs: tuple[Array, ...]
    build: Callable[..., Any]
    answers: tuple[Array, ...]
    tolerance: float = 2e-6
    opset: str = "iOS17"


CASES: list[Case] = []

_random = np.random.default_rng(7)


def normal(*shape: int) -> Array:
    return _random.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return (_random.random(shape) + 0.1).astype(np.float32)


def case(
    name: str,
    inputs: Sequence[Array],
    build: Callable[..., Any],
    *answers: Array,
    tolerance: float = 2e-6,
    opset: str = "iOS17",
) -> None:
    CASES.append(Case(name, tuple(inputs), build, answers, tolerance, opset))


# Number by number ---------------------------------------------------------------------------------------------------

X = normal(2, 3, 4)
U = (_random.random((2, 3, 4)) * 1.8 - 0.9).astype(np.float32)  # inside (-1, 1)
P = positive(2, 3, 4)
# Halves, so that rounding to even shows.
H = np.array([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.0, 1.2]], np.float32)

_UNARY: dict[str, tuple[Array, Callable[[Array], Array]]] = {
    "abs": (X, np.abs),
    "acos": (U, np.arccos),
    "asin": (U, np.arcsin),
    "atan": (X, np.arctan),
    "atanh": (U, np.arctanh),
    "ceil": (H, np.ceil),
    "cos": (X, np.cos),
    "cosh": (X, np.cosh),
    "erf": (X, lambda x: np.vectorize(math.erf)(x)),
    "exp": (X, np.exp),
    "exp2": (X, np.exp2),
    "floor": (H, np.floor),
    "relu": (X, lambda x: np.maximum(x, 0)),
    "relu6": (4 * X, lambda x: np.minimum(np.maximum(x, 0), 6)),
    "round": (H, np.round),
    "sigmoid": (X, lambda x: 1 / (1 + np.exp(-x))),
    "sign": (H, np.sign),
    "silu": (X, lambda x: x / (1 + np.exp(-x))),
    "sin": (X, np.sin),
    "sinh": (X, np.sinh),
    "softplus": (9 * X, lambda x: np.log1p(np.exp(x))),
    "softsign": (X, lambda x: x / (1 + np.abs(x))),
    "sqrt": (P, np.sqrt),
    "square": (X, np.square),
    "tan": (U, np.tan),
    "tanh": (X, np.tanh),
}
for _op, (_x, _answer) in _UNARY.items():
    case(
        _op,
        [_x],
        lambda mb, x, op=_op: getattr(mb, op)(x=x),
        _answer(_x.astype(np.float64)).astype(np.float32),
        tolerance=2e-5,
    )

A, B = normal(2, 3, 4), normal(3, 1)  # B is broadcast over the first and the last axis
IA, IB = np.array([[7, -7, 6, -6]], np.int32), np.array([[3, 3, -4, -4]], np.int32)
_BINARY: dict[str, tuple[Array, Array, Callable[[Array, Array], Array]]] = {
    "add": (A, B, np.add),
    "sub": (A, B, np.subtract),
    "mul": (A, B, np.multiply),
    "real_div": (A, B, np.divide),
    "maximum": (A, B, np.maximum),
    "minimum": (A, B, np.minimum),
    "pow": (P, B, np.power),
    "floor_div": (IA, IB, lambda a, b: np.floor(a / b).astype(np.int32)),
    "mod": (IA, IB, lambda a, b: (a - b * np.floor(a / b)).astype(np.int32)),
}
for _op, (_x, _y, _both) in _BINARY.items():
    case(_op, [_x, _y], lambda mb, x, y, op=_op: getattr(mb, op)(x=x, y=y), _both(_x, _y), tolerance=1e-5)
case("real_div_of_integers", [IA, IB], lambda mb, x, y: mb.real_div(x=x, y=y), np.array([[2, -2, -1, 1]], np.int32))

N, M = np.array([[1, 2, 3, 3]], np.int32), np.array([[3], [2]], np.int32)
_COMPARE = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}
for _op, _compare in _COMPARE.items():
    case(
        _op,
        [N, M],
        lambda mb, x, y, op=_op: mb.cast(x=getattr(mb, op)(x=x, y=y), dtype="int32"),
        _compare(N, M).astype(np.int32),
    )
_LOGIC = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}
for _op, _logic in _LOGIC.items():
    case(
        _op,
        [N, M],
        lambda mb, x, y, op=_op: mb.cast(
            x=getattr(mb, op)(x=mb.greater(x=x, y=2), y=mb.greater(x=y, y=2)), dtype="int32"
        ),
        _logic(N > 2, M > 2).astype(np.int32),
    )
case("logical_not", [N], lambda mb, x: mb.cast(x=mb.logical_not(x=mb.greater(x=x, y=2)), dtype="int32"), (N <= 2) * 1)
case("inverse", [P], lambda mb, x: mb.inverse(x=x, epsilon=0.25), 1 / (P + 0.25))
case("inverse_with_its_own_epsilon", [P], lambda mb, x: mb.inverse(x=x), 1 / (P + np.float32(1e-4)))
case("log", [P], lambda mb, x: mb.log(x=x, epsilon=0.5), np.log(P + 0.5))
case("rsqrt", [P], lambda mb, x: mb.rsqrt(x=x, epsilon=0.5), 1 / np.sqrt(P + 0.5))
case("clip", [X], lambda mb, x: mb.clip(x=x, alpha=-0.5, beta=0.25), np.clip(X, -0.5, 0.25))
case("threshold", [X], lambda mb, x: mb.threshold(x=x, alpha=0.25), np.maximum(X, 0.25))
case("cast_truncates", [H], lambda mb, x: mb.cast(x=x, dtype="int32"), np.trunc(H).astype(np.int32))
case("cast_to_bool_and_back", [H], lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="fp32"), (H != 0) * 1.0)
case(
    "cast_to_half_rounds",
    [X],
    lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"),
    X.astype(np.float16).astype(np.float32),
    tolerance=0,
)
case("cast_to_int8", [H], lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="int8"), dtype="int32"), np.trunc(H) * 1)
case(
    "cast_to_uint16",
    [np.array([0, 1, 65535], np.int32)],
    lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="uint16"), dtype="int32"),
    np.array([0, 1, 65535], np.int32),
)
case(
    "cast_to_int16",
    [np.array([0, -1, 32767], np.int32)],
    lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="int16"), dtype="int32"),
    np.array([0, -1, 32767], np.int32),
)
case("select", [A, B], lambda mb, a, b: mb.select(cond=mb.greater(x=a, y=b), a=a, b=b), np.where(A > B, A, B))


# Activations --------------------------------------------------------------------------------------------------------

C = normal(2, 3, 4, 5)
case(
    "gelu",
    [X],
    lambda mb, x: mb.gelu(x=x),
    (0.5 * X * (1 + np.vectorize(math.erf)(X / math.sqrt(2)))).astype(np.float32),
)
case(
    "gelu_tanh",
    [X],
    lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
    0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))),
)
case(
    "gelu_sigmoid",
    [X],
    lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
    X / (1 + np.exp(-1.702 * X)),
)
case(
    "clamped_relu",
    [X],
    lambda mb, x: mb.clamped_relu(x=x, alpha=0.1, beta=0.5),
    np.minimum(np.where(X >= 0, X, 0.1 * X), 0.5),
)
case("elu", [X], lambda mb, x: mb.elu(x=x, alpha=0.5), np.where(X > 0, X, 0.5 * np.expm1(X)))
case("leaky_relu", [X], lambda mb, x: mb.leaky_relu(x=x, alpha=0.2), np.where(X > 0, X, np.float32(0.2) * X))
case("linear_activation", [X], lambda mb, x: mb.linear_activation(x=x, alpha=2.0, beta=-1.0), 2 * X - 1)
SLOPES = np.array([0.1, 0.2, 0.3], np.float32)
case(
    "prelu",
    [C],
    lambda mb, x: mb.prelu(x=x, alpha=SLOPES),
    np.where(C > 0, C, C * SLOPES[None, :, None, None]),
)
case("scaled_tanh", [X], lambda mb, x: mb.scaled_tanh(x=x, alpha=1.5, beta=0.5), 1.5 * np.tanh(0.5 * X))
case(
    "sigmoid_hard",
    [4 * X],
    lambda mb, x: mb.sigmoid_hard(x=x, alpha=1 / 6, beta=0.5),
    np.clip(4 * X / np.float32(6) + 0.5, 0, 1),
)
case(
    "softplus_parametric",
    [C],
    lambda mb, x: mb.softplus_parametric(x=x, alpha=SLOPES, beta=2 * SLOPES),
    SLOPES[None, :, None, None] * np.log1p(np.exp(2 * SLOPES[None, :, None, None] * C)),
)
case("thresholded_relu", [X], lambda mb, x: mb.thresholded_relu(x=x, alpha=0.5), np.where(X >= 0.5, X, 0))


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    shares: Array = e / e.sum(axis, keepdims=True)
    return shares


case("softmax", [X], lambda mb, x: mb.softmax(x=x, axis=-2), softmax(X, 1))
case("softmax_last", [X], lambda mb, x: mb.softmax(x=x), softmax(X, 2))


# Reductions ---------------------------------------------------------------------------------------------------------

_REDUCE: dict[str, Callable[[Array, Any, bool], Array]] = {
    "reduce_l1_norm": lambda x, axes, keep: np.abs(x).sum(axes, keepdims=keep),
    "reduce_l2_norm": lambda x, axes, keep: np.sqrt((x * x).sum(axes, keepdims=keep)),
    "reduce_log_sum": lambda x, axes, keep: np.log(x.sum(axes, keepdims=keep)),
    "reduce_log_sum_exp": lambda x, axes, keep: np.log(np.exp(x).sum(axes, keepdims=keep)),
    "reduce_max": lambda x, axes, keep: x.max(axes, keepdims=keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdims=keep),
    "reduce_min": lambda x, axes, keep: x.min(axes, keepdims=keep),
    "reduce_prod": lambda x, axes, keep: x.prod(axes, keepdims=keep),
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdims=keep),
    "reduce_sum_square": lambda x, axes, keep: (x * x).sum(axes, keepdims=keep),
}
for _op, _reduce in _REDUCE.items():
    case(
        _op,
        [P],
        lambda mb, x, op=_op: getattr(mb, op)(x=x, axes=[-1, 0], keep_dims=False),
        _reduce(P, (2, 0), False),
        tolerance=1e-5,
    )
    case(
        f"{_op}_of_all",
        [P],
        lambda mb, x, op=_op: getattr(mb, op)(x=x, keep_dims=True),
        _reduce(P, None, True),
        tolerance=5e-5,
    )
case("reduce_sum_of_integers", [N], lambda mb, x: mb.reduce_sum(x=x, axes=[1]), N.sum(1).astype(np.int32))
case("reduce_argmax", [X], lambda mb, x: mb.reduce_argmax(x=x, axis=-1), X.argmax(-1).astype(np.int32))
case(
    "reduce_argmin",
    [X],
    lambda mb, x: mb.reduce_argmin(x=x, axis=1, keep_dims=True),
    X.argmin(1)[:, None].astype(np.int32),
)
case("cumsum", [X], lambda mb, x: mb.cumsum(x=x, axis=-1), np.cumsum(X, -1))
case(
    "cumsum_exclusive",
    [X],
    lambda mb, x: mb.cumsum(x=x, axis=1, exclusive=True),
    np.concatenate([np.zeros((2, 1, 4)), np.cumsum(X, 1)[:, :-1]], 1),
)
case(
    "cumsum_reverse",
    [X],
    lambda mb, x: mb.cumsum(x=x, axis=2, reverse=True),
    np.cumsum(X[..., ::-1], 2)[..., ::-1],
)
case("argsort", [X], lambda mb, x: mb.argsort(x=x, axis=-1), np.argsort(-X, -1, kind="stable").astype(np.int32))
case(
    "argsort_ascending",
    [X],
    lambda mb, x: mb.argsort(x=x, axis=1, ascending=True),
    np.argsort(X, 1, kind="stable").astype(np.int32),
)
case(
    "topk",
    [X],
    lambda mb, x: mb.topk(x=x, k=2, axis=2),
    -np.sort(-X, 2)[..., :2],
    np.argsort(-X, 2)[..., :2].astype(np.int32),
)
case(
    "topk_ascending",
    [X],
    lambda mb, x: mb.topk(x=x, k=2, axis=1, ascending=True),
    np.sort(X, 1)[:, :2],
    np.argsort(X, 1)[:, :2].astype(np.int32),
)


# Shapes and moves ---------------------------------------------------------------------------------------------------

case("identity", [X], lambda mb, x: mb.identity(x=x), X)
case("shape", [X], lambda mb, x: mb.shape(x=x), np.array(X.shape, np.int32))
case("reshape", [X], lambda mb, x: mb.reshape(x=x, shape=[4, -1]), X.reshape(4, 6))
case("reshape_keeps_sizes_from_the_right", [X], lambda mb, x: mb.reshape(x=x, shape=[0, -1]), X.reshape(3, 8))
case("reshape_adds_ones", [X], lambda mb, x: mb.reshape(x=x, shape=[0, 2, 0, 0]), X[None])
case("reshape_to_a_computed_shape", [X], lambda mb, x: mb.reshape(x=x, shape=mb.shape(x=x)), X)
case("flatten2d", [C], lambda mb, x: mb.flatten2d(x=x, axis=-2), C.reshape(6, 20))
case("transpose", [C], lambda mb, x: mb.transpose(x=x, perm=[0, -1, 1, 2]), C.transpose(0, 3, 1, 2))
case("expand_dims", [X], lambda mb, x: mb.expand_dims(x=x, axes=[-1, 0]), X[None, ..., None])
case("squeeze", [X[None, :, :1]], lambda mb, x: mb.squeeze(x=x, axes=[-2]), X[None, :, 0])
case("squeeze_all", [X[None, :, :1]], lambda mb, x: mb.squeeze(x=x), X[:, 0])
case("reverse", [X], lambda mb, x: mb.reverse(x=x, axes=[-1]), X[..., ::-1])
case("reverse_all", [X], lambda mb, x: mb.reverse(x=x), X[::-1, ::-1, ::-1])
case("concat", [X, X + 1], lambda mb, x, y: mb.concat(values=[x, y], axis=-2), np.concatenate([X, X + 1], 1))
case(
    "concat_interleaved",
    [X, X + 1],
    lambda mb, x, y: mb.concat(values=[x, y], axis=1, interleave=True),
    np.stack([X[:, 0], X[:, 0] + 1, X[:, 1], X[:, 1] + 1, X[:, 2], X[:, 2] + 1], 1),
)
case("stack", [X, X + 1], lambda mb, x, y: mb.stack(values=[x, y], axis=-1), np.stack([X, X + 1], -1))
case("split", [X], lambda mb, x: mb.split(x=x, num_splits=2, axis=-1), X[..., :2], X[..., 2:])
case("split_sizes", [X], lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=2), X[..., :1], X[..., 1:])
case("tile", [X], lambda mb, x: mb.tile(x=x, reps=[1, 2, 3]), np.tile(X, (1, 2, 3)))
case(
    "slice_by_index",
    [C],
    lambda mb, x: mb.slice_by_index(
        x=x,
        begin=[1, 0, -3, 0],
        end=[0, 2, -1, 5],
        stride=[1, 1, 1, 2],
        begin_mask=[False, True, False, False],
        end_mask=[False, False, False, True],
        squeeze_mask=[True, False, False, False],
    ),
    C[1, :2, -3:-1, ::2],
)
case(
    "slice_by_index_backwards",
    [C],
    lambda mb, x: mb.slice_by_index(
        x=x,
        begin=[0, 2, 3, 0],
        end=[2, 0, 0, 5],
        stride=[1, -1, -2, 1],
        end_mask=[False, False, True, False],
    ),
    C[:, 2:0:-1, 3::-2],
)
case(
    "slice_by_size", [C], lambda mb, x: mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[2, 2, -1, 1]), C[:, 1:, 2:, :1]
)
I23 = np.array([[0, 2], [1, 0]], np.int32)
case("gather", [X, I23], lambda mb, x, i: mb.gather(x=x, indices=i, axis=-2), X[:, I23])
case("gather_a_scalar", [X], lambda mb, x: mb.gather(x=x, indices=np.int32(1), axis=1), X[:, 1])
case(
    "gather_by_batch",
    [X, I23],
    lambda mb, x, i: mb.gather(x=x, indices=i, axis=1, batch_dims=1),
    np.stack([X[0, I23[0]], X[1, I23[1]]]),
)
case(
    "gather_an_embedding",
    [I23],
    lambda mb, i: mb.gather(x=X[0], indices=i, axis=0),
    X[0][I23],
)
ALONG = np.array([[[0, 2, 1, 1]], [[1, 0, 0, 2]]], np.int32)
case(
    "gather_along_axis",
    [X, ALONG],
    lambda mb, x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
    np.take_along_axis(X, ALONG, 1),
)
ND = np.array([[0, 1], [1, 2]], np.int32)
case("gather_nd", [X, ND], lambda mb, x, i: mb.gather_nd(x=x, indices=i), X[ND[:, 0], ND[:, 1]])
case(
    "gather_nd_by_batch",
    [X, np.array([[[1]], [[2]]], np.int32)],
    lambda mb, x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
    np.stack([X[0, [1]], X[1, [2]]]),
)
case("fill", [X], lambda mb, x: mb.fill(shape=mb.shape(x=x), value=0.5), np.full_like(X, 0.5))
case("fill_like", [X], lambda mb, x: mb.fill_like(ref_tensor=x, value=2.0), np.full_like(X, 2))
case(
    "range_1d",
    [N],
    lambda mb, x: mb.range_1d(end=mb.gather(x=mb.shape(x=x), indices=np.int32(1)), start=0, step=1),
    np.arange(4, dtype=np.int32),
)
case(
    "one_hot",
    [np.array([0, 2, 5], np.int32)],
    lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=3, axis=-1, on_value=2.0, off_value=-1.0),
    np.array([[2, -1, -1], [-1, -1, 2], [-1, -1, -1]], np.float32),
)
case(
    "one_hot_first",
    [np.array([0, 2], np.int32)],
    lambda mb, i: mb.one_hot(indices=i, one_hot_vector_size=3, axis=0),
    np.array([[1, 0], [0, 0], [0, 1]], np.int32),
)
case("band_part_lower", [X], lambda mb, x: mb.band_part(x=x, lower=-1, upper=0), np.tril(X))
case("band_part_upper", [X], lambda mb, x: mb.band_part(x=x, lower=0, upper=-1), np.triu(X))
case("band_part", [X], lambda mb, x: mb.band_part(x=x, lower=1, upper=0), np.triu(np.tril(X), -1))
case(
    "pad",
    [C],
    lambda mb, x: mb.pad(x=x, pad=[1, 0, 2, 1], mode="constant", constant_val=0.5),
    np.pad(C, ((0, 0), (0, 0), (1, 0), (2, 1)), constant_values=0.5),
)
case(
    "pad_reflect",
    [C],
    lambda mb, x: mb.pad(x=x, pad=[1, 2, 3, 0], mode="reflect"),
    np.pad(C, ((0, 0), (0, 0), (1, 2), (3, 0)), mode="reflect"),
)
case(
    "pad_replicate",
    [C],
    lambda mb, x: mb.pad(x=x, pad=[0, 1, 2, 3], mode="replicate"),
    np.pad(C, ((0, 0), (0, 0), (0, 1), (2, 3)), mode="edge"),
)
S = normal(1, 8, 2, 3)
case(
    "pixel_shuffle",
    [S],
    lambda mb, x: mb.pixel_shuffle(x=x, upscale_factor=2),
    S.reshape(1, 2, 2, 2, 2, 3).transpose(0, 1, 4, 2, 5, 3).reshape(1, 2, 4, 6),
)
D = normal(1, 2, 4, 6)
case(
    "pixel_unshuffle",
    [D],
    lambda mb, x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
    D.reshape(1, 2, 2, 2, 3, 2).transpose(0, 1, 3, 5, 2, 4).reshape(1, 8, 2, 3),
)
case("crop", [C], lambda mb, x: mb.crop(x=x, crop_height=[1, 0], crop_width=[2, 1]), C[:, :, 1:, 2:-1])
case(
    "upsample_nearest_neighbor",
    [C],
    lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
    C.repeat(2, 2).repeat(3, 3),
)
case(
    "upsample_nearest_neighbor_by_a_fraction",
    [C],
    lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=1.5, scale_factor_width=1.0),
    C[:, :, [0, 0, 1, 2, 2, 3]],
)


def interpolated(x: Array, axis: int, points: list[float]) -> Array:
    """Linear interpolation at places of an axis; beyond the ends, the ends."""
    ends = np.arange(x.shape[axis])
    return np.apply_along_axis(lambda line: np.interp(points, ends, line), axis, x).astype(np.float32)


case(
    "upsample_bilinear_with_aligned_corners",
    [C],
    lambda mb, x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=1, align_corners=True),
    interpolated(C, 2, [i * 3 / 7 for i in range(8)]),
)
case(
    "upsample_bilinear_with_half_pixels",
    [C],
    lambda mb, x: mb.upsample_bilinear(
        x=x, scale_factor_height=1, scale_factor_width=2, align_corners=False, half_pixel_centers=True
    ),
    interpolated(C, 3, [i / 2 + 0.25 - 0.5 for i in range(10)]),
)
case(
    "upsample_bilinear_from_the_corner",
    [C],
    lambda mb, x: mb.upsample_bilinear(
        x=x, scale_factor_height=1, scale_factor_width=2, align_corners=False, half_pixel_centers=False
    ),
    interpolated(C, 3, [i / 2 for i in range(10)]),
)
