"""Operators of ML Programs that work number by number or along axes: arithmetic, activations, reductions.

Written from Apple's description of MIL (coremltools' operator reference), in torch; parameters carry MIL's names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import ExportError

from ._mil_registry import Ints, operator

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "round": torch.round,  # halves to even
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": torch.floor_divide,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,  # the sign of the divisor
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}

_STORAGE = {
    "bool": torch.bool,
    "fp16": torch.float32,  # rounded by the runner, since the output is declared half
    "fp32": torch.float32,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "uint16": torch.int32,
}


def _define_unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    @operator(name, moves=name in ("abs", "ceil", "floor", "relu", "round", "sign", "logical_not"))
    def compute(x: Tensor) -> Tensor:
        return function(x)


def _define_binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    @operator(name, moves=name in ("maximum", "minimum"))
    def compute(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y)


for _name, _unary in _UNARY.items():
    _define_unary(_name, _unary)
for _name, _binary in _BINARY.items():
    _define_binary(_name, _binary)


@operator()
def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Division; of integers, truncated to an integer."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@operator()
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1.0 / (x + epsilon)


@operator()
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@operator()
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@operator()
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(x, alpha, beta)


@operator()
def threshold(x: Tensor, alpha: float) -> Tensor:
    """The larger of x and alpha."""
    return torch.clamp(x, min=alpha)


@operator()
def cast(x: Tensor, dtype: str) -> Tensor:
    """To another type; from floats to integers towards zero."""
    if dtype not in _STORAGE:
        raise ExportError(f"casts to {dtype!r}; the evaluator knows {', '.join(_STORAGE)}")
    result = x.to(_STORAGE[dtype])
    return result & 0xFFFF if dtype == "uint16" else result


@operator(moves=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


# Activations --------------------------------------------------------------------------------------------------------


@operator(moves=True)
def relu6(x: Tensor) -> Tensor:
    return torch.clamp(x, 0.0, 6.0)


@operator()
def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ExportError(f"has the unknown mode {mode!r}")


@operator()
def clamped_relu(x: Tensor, alpha: float, beta: float) -> Tensor:
    """min(beta, x) above zero, min(beta, alpha·x) below."""
    return torch.clamp(torch.where(x >= 0, x, alpha * x), max=beta)


@operator()
def elu(x: Tensor, alpha: float) -> Tensor:
    return F.elu(x, alpha)


@operator()
def leaky_relu(x: Tensor, alpha: float) -> Tensor:
    return F.leaky_relu(x, alpha)


@operator()
def linear_activation(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * x + beta


@operator()
def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """One slope per channel, on axis 1."""
    return torch.where(x >= 0, x, x * alpha.reshape(-1, *[1] * (x.ndim - 2)))


@operator()
def scaled_tanh(x: Tensor, alpha: float, beta: float) -> Tensor:
    return alpha * torch.tanh(beta * x)


@operator()
def sigmoid_hard(x: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator()
def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """One pair per channel, on axis 1."""
    shape = (-1, *[1] * (x.ndim - 2))
    return alpha.reshape(shape) * F.softplus(x * beta.reshape(shape))


@operator(moves=True)
def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """x where it is at least alpha, else zero."""
    return torch.where(x >= alpha, x, 0.0)


@operator()
def softmax(x: Tensor, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


# Reductions ---------------------------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Callable[[Tensor, Ints, bool], Tensor]] = {
    "reduce_l1_norm": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt(),
    "reduce_log_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "reduce_log_sum_exp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "reduce_max": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keepdim=keep, dtype=x.dtype),
}


def _define_reduction(name: str, function: Callable[[Tensor, Ints, bool], Tensor]) -> None:
    @operator(name, moves=name in ("reduce_max", "reduce_min"))
    def compute(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        return function(x, tuple(range(x.ndim)) if axes is None else axes, keep_dims)


for _name, _reduction in _REDUCTIONS.items():
    _define_reduction(_name, _reduction)


@operator()
def reduce_prod(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
    dims = sorted(range(x.ndim) if axes is None else (axis % x.ndim for axis in axes), reverse=True)
    for axis in dims:  # from the last one, so that the others keep their place
        x = x.prod(axis, keepdim=keep_dims, dtype=x.dtype)
    return x


@operator(moves=True, later={"output_dtype": "CoreML7"})
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return torch.argmax(x, axis, keepdim=keep_dims).to(_STORAGE[output_dtype])


@operator(moves=True, later={"output_dtype": "CoreML7"})
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32") -> Tensor:
    return torch.argmin(x, axis, keepdim=keep_dims).to(_STORAGE[output_dtype])


@operator()
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    flipped = x.flip(axis) if reverse else x
    sums = torch.cumsum(flipped, axis, dtype=x.dtype)
    if exclusive:
        sums = sums - flipped
    return sums.flip(axis) if reverse else sums


@operator(moves=True)
def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True).to(torch.int32)


@operator(moves=True, later={"sort": "CoreML6", "return_indices": "CoreML6", "output_indices_dtype": "CoreML7"})
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The k largest (smallest when ascending); without ``sort`` any order is right, and this gives the sorted one."""
    count = x.shape[axis] if k == -1 else k
    values, indices = torch.topk(x, count, axis, largest=not ascending, sorted=True)
    return (values, indices.to(_STORAGE[output_indices_dtype])) if return_indices else (values,)


@operator()
def classify(probabilities: Tensor, classes: tuple[str, ...]) -> tuple[str, Tensor]:
    """The most probable class, and all probabilities in the order of the classes (MIL's dictionary)."""
    flat = probabilities.reshape(-1)
    return classes[int(flat.argmax())], flat
