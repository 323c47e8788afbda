"""A program in the words that coremltools takes, and takes rightly: what it lacks or mistakes is decomposed, no more.

coremltools' own registry says which operators it lacks. What it translates into something else was found by comparing
its packages with PyTorch in the evaluator (coremltools 9.0); an entry below can go when the converter is mended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekd.errors import ExportError
from edgekd.programs.fold import attribute, clean, fold_batch_norm, has_batch_norm, set_constant
from edgekd.programs.models import input_specs
from edgekd.programs.tracing import retrace

from ._mil_lstm import LSTM, decomposed_lstm, register_translation
from ._padding import hoist_above_padding

__all__ = ["is_quantized", "prepare_program", "within_half"]

_ATEN = torch.ops.aten
_CHOICES = {_ATEN.masked_fill.Scalar, _ATEN.where.ScalarOther, _ATEN.where.ScalarSelf, _ATEN.where.Scalar}
_MAX_POOLS = {_ATEN.max_pool1d.default, _ATEN.max_pool2d.default, _ATEN.max_pool3d.default}
_INTEGERS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}


def prepare_program(program: ExportedProgram) -> ExportedProgram:
    """The same program for coremltools' converter.

    Raises:
        ExportError: An operator stays that it has no translation for, or int8 numbers that Core ML cannot hold.
    """
    from torch._decomp import core_aten_decompositions

    program = _rewritten(program)
    _refuse_narrow_ranges(program)
    known = core_aten_decompositions()
    table: dict[Any, Any] = {LSTM: decomposed_lstm}
    register_translation()
    while True:
        program = _with_copies(program.run_decompositions(dict(table)))
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        missing = {node.target: node for node in calls if _is_missing(node)}
        wanted = {target: known[target] for target in missing if target in known}
        wanted |= {n.target: _MENDED[n.target] for n in calls if n.target in _MENDED and _is_mistaken(n)}
        if not set(wanted) - set(table):
            break
        table |= wanted
    if missing:
        names = ", ".join(f"{target} (output {node.name!r})" for target, node in missing.items())
        raise ExportError(f"Core ML's converter has no translation for {names}")
    return _without_ambiguous_names(_with_strides(program))


def within_half(program: ExportedProgram) -> ExportedProgram:
    """Masks whose "minus infinity" is a number in half precision too, in place.

    The lowest float32 (what transformers masks with) becomes infinity there, and the softmax of a row of nothing but
    infinities is not a number, where that of the lowest numbers is even. What is chosen by a mask is the lowest half
    instead; what a mask is multiplied with stays single (see ``_fits_half``), and its product is kept within half.
    """
    largest = torch.finfo(torch.half).max
    for node in list(program.graph.nodes):
        beyond = [
            place
            for place, value in enumerate(node.args)
            if isinstance(value, float) and largest < abs(value) < float("inf")
        ]
        if node.target in _CHOICES:
            for place in beyond:
                node.update_arg(place, largest if node.args[place] > 0 else -largest)
        elif node.target is _ATEN.mul.Tensor and beyond:
            with program.graph.inserting_after(node):
                kept = program.graph.call_function(_ATEN.clamp.default, (node, -largest, largest))
            kept.meta["val"] = node.meta["val"]
            for user in list(node.users):
                if user is not kept and user.op != "output":
                    user.replace_input_with(node, kept)
    return program


def is_quantized(node: Node) -> bool:
    """Whether a node quantizes or dequantizes."""
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "quantized_decomposed"


def _is_missing(node: Node) -> bool:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    target: Any = node.target
    name = target.name() if isinstance(target, torch._ops.OpOverload) else target.__name__
    return _TORCH_OPS_REGISTRY.get_func(name) is None


def _is_mistaken(node: Node) -> bool:
    """Whether the converter would translate this very call into something else, or not at all."""
    if node.target is _ATEN.gelu.default:
        return node.kwargs.get("approximate", "none") != "none"
    if node.target in _SCALED:
        return node.kwargs.get("alpha", 1) != 1 or (len(node.args) > 2 and node.args[2] != 1)
    return True


# A decomposition that gives NotImplemented leaves that call whole.


def _gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """The converter ignores ``approximate``; from these steps it makes Core ML's own tanh gelu."""
    if approximate != "tanh":
        return NotImplemented
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def _scaled(function: Callable[[Any, Any], Tensor]) -> Callable[..., Any]:
    """The converter ignores ``alpha``."""

    def scaled(x: Any, y: Any, alpha: float = 1) -> Any:
        return NotImplemented if alpha == 1 else function(x, y * alpha)

    return scaled


def _reversed_difference(x: Tensor, y: Any, alpha: float = 1) -> Any:
    """The converter refuses ``alpha`` here."""
    return NotImplemented if alpha == 1 else y - x * alpha


def _reciprocal(x: Tensor) -> Tensor:
    """The converter takes Core ML's ``inverse`` with its own epsilon: 1 / (x + 1e-4)."""
    return torch.ones(1, dtype=x.dtype) / x  # the converter cannot make a scalar of ones


def _hardswish(x: Tensor) -> Tensor:
    """The converter sets what is below -3 to zero first, which the product with zero does by itself."""
    return x * torch.nn.functional.hardsigmoid(x)


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """The converter divides by the largest value, so that half precision does not overflow, but leaves eps unscaled."""
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    axes = list(range(-len(shape), 0))
    size = x.abs().amax(axes, keepdim=True).clamp(min=1.0)
    small = x / size
    result = small / torch.sqrt((small * small).mean(axes, keepdim=True) + epsilon / (size * size))
    return result if weight is None else result * weight


def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(range(x.ndim)) if dim is None else dim
    return torch.var(x, axes, correction=1 if correction is None else correction, keepdim=keepdim), x.mean(
        axes, keepdim
    )


def _logical(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Any]:
    """Of Booleans, bit by bit is logical."""

    def logical(x: Tensor, y: Tensor) -> Any:
        return function(x, y) if x.dtype == y.dtype == torch.bool else NotImplemented

    return logical


_SCALED: dict[Any, Any] = {
    _ATEN.add.Tensor: _scaled(lambda x, y: x + y),
    _ATEN.sub.Tensor: _scaled(lambda x, y: x - y),
    _ATEN.rsub.Tensor: _reversed_difference,
    _ATEN.rsub.Scalar: _reversed_difference,
}
_MENDED: dict[Any, Any] = {
    **_SCALED,
    _ATEN.gelu.default: _gelu,
    _ATEN.reciprocal.default: _reciprocal,
    _ATEN.rms_norm.default: _rms_norm,
    _ATEN.hardswish.default: _hardswish,
    _ATEN.var_mean.correction: _var_mean,
    _ATEN.bitwise_and.Tensor: _logical(torch.logical_and),
    _ATEN.bitwise_or.Tensor: _logical(torch.logical_or),
    _ATEN.bitwise_xor.Tensor: _logical(torch.logical_xor),
}


def _with_copies(program: ExportedProgram) -> ExportedProgram:
    """Copies in the place of aliases, in place: the converter drops the ones, and does not know the others."""
    for node in program.graph.nodes:
        if node.target is _ATEN.alias.default:
            node.target = _ATEN.clone.default
    return program


def _with_strides(program: ExportedProgram) -> ExportedProgram:
    """Max pooling that says its stride, in place; the converter refuses one that leaves it to be the kernel's size.

    https://github.com/apple/coremltools/issues/2415
    """
    for node in program.graph.nodes:
        if node.target in _MAX_POOLS and len(node.args) == 2:
            node.args = (*node.args, node.args[1])
    return program


def _without_ambiguous_names(program: ExportedProgram) -> ExportedProgram:
    """No value is called what a text argument says, in place.

    coremltools 9.0 takes a text argument for the value of that name where there is one (``internal_graph.py``,
    rdar://138953006): after a ``floor``, ``div(rounding_mode="floor")`` is refused.
    """
    texts = {
        value for node in program.graph.nodes for value in (*node.args, *node.kwargs.values()) if isinstance(value, str)
    }
    for node in program.graph.nodes:
        if node.op == "call_function" and node.name in texts:
            present, node.name = node.name, f"{node.name}_value"
            for spec in program.graph_signature.output_specs:
                if spec.arg.name == present:
                    spec.arg.name = node.name
    return program


def _rewritten(program: ExportedProgram) -> ExportedProgram:
    """A quantized program with biases and paddings as Core ML has them; any other with its batch norms folded.

    The converter folds these too, but every step before, from the decomposition on, is then twice as long. Where a size
    is open, or a state is written, that is left to it: here it would take a trace.
    """
    if not any(is_quantized(node) for node in program.graph.nodes):
        needs_trace = program.graph_signature.buffers_to_mutate or any(-1 in s.shape for s in input_specs(program))
        return program if needs_trace or not has_batch_norm(program) else fold_batch_norm(program, keeps_lone=True)
    module = program.module(check_guards=False)
    _make_biases_float(module)
    hoist_above_padding(module)  # what then reads a padding is a convolution, which takes it in: see _mil_fold
    return retrace(clean(module), program)


def _make_biases_float(module: GraphModule) -> None:
    """Compute dequantized constants of more than 8 bits (int32 biases), which Core ML cannot hold as integers."""
    for node in list(module.graph.nodes):
        if not (is_quantized(node) and "dequantize" in node.target.__name__):
            continue
        source = node.args[0]
        if source.op != "get_attr" or attribute(module, source.target).dtype in _INTEGERS:
            continue
        args = [attribute(module, str(a.target)) if isinstance(a, Node) else a for a in node.args]
        constant = set_constant(module, f"{source.target}_float", node.target(*args, **node.kwargs), node)
        node.replace_all_uses_with(constant)


def _refuse_narrow_ranges(program: ExportedProgram) -> None:
    """Core ML quantizes activations to the whole range of the type; the converter would ignore a narrower one."""
    for node in program.graph.nodes:
        if not (is_quantized(node) and node.target.__name__.startswith("quantize_per_tensor")):
            continue
        low, high, dtype = node.args[3:6]
        if _INTEGERS.get(dtype, (low, high)) != (low, high):
            raise ExportError(
                f"{node.name} quantizes to {low}..{high}; Core ML quantizes to the whole range of {dtype}, "
                f"{_INTEGERS[dtype][0]}..{_INTEGERS[dtype][1]}"
            )
