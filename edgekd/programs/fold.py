"""Batch norm folded into the layer before or after it, each with its own epsilon; others become a product and a sum."""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekd.programs.layers import CONVOLUTIONS, LINEAR, TRANSPOSED, is_transposed, transposed_groups
from edgekd.programs.pure import drops_nothing, pure_form, stays_in_place
from edgekd.programs.tracing import retrace

__all__ = [
    "attribute",
    "clean",
    "fold_batch_norm",
    "folded_module",
    "free_name",
    "has_batch_norm",
    "pads_with_zero",
    "set_constant",
]

_ATEN = torch.ops.aten

_BATCH_NORMS = {
    _ATEN.batch_norm.default,  # (x, weight, bias, mean, var, training, momentum, eps, cudnn)
    _ATEN._native_batch_norm_legit_no_training.default,  # (x, weight, bias, mean, var, momentum, eps)
    _ATEN.native_batch_norm.default,  # (x, weight, bias, mean, var, training, momentum, eps)
}


def fold_batch_norm(program: ExportedProgram, *, keeps_lone: bool = False) -> ExportedProgram:
    """The same function without batch norms, but for those in training mode.

    One that follows a convolution or a linear layer is folded into its weights; one that precedes them too, where no
    padding stands between; the others become a product and a sum. Computed in double precision, so outputs agree within
    1e-5 of their size. The batch stays dynamic where it is.

    Args:
        keeps_lone: Those that no layer takes in stay as they are.

    Raises:
        ModelFileError: The program cannot be traced again.
    """
    return retrace(folded_module(program, keeps_lone=keeps_lone), program)


def has_batch_norm(program: ExportedProgram) -> bool:
    """Whether a batch norm is among the program's operators."""
    return any(node.target in _BATCH_NORMS for node in program.graph.nodes)


def folded_module(program: ExportedProgram, *, keeps_lone: bool = False) -> GraphModule:
    """The module of a program, ready to be rewritten: no operator in place, no dropout, batch norm folded.

    Paddings with a constant are all ``constant_pad_nd``.

    Constants are ``get_attr`` nodes; those that nothing reads are gone.
    """
    if any(map(stays_in_place, program.graph.nodes)):
        # An empty table decomposes nothing: it only turns operators in place into their pure form.
        with warnings.catch_warnings():  # torch 2.13 warns of its own deprecated use of LeafSpec
            warnings.simplefilter("ignore", FutureWarning)
            program = program.run_decompositions({})
    module = program.module(check_guards=False)
    pure = {node: form for node in module.graph.nodes if (form := pure_form(node)) is not None}
    for node in list(module.graph.nodes):
        node.target = pure.get(node, node.target)
        if node.target is _ATEN.pad.default and (len(node.args) < 3 or node.args[2] == "constant"):
            value = node.args[3] if len(node.args) > 3 else None  # what torch.nn.functional.pad becomes
            node.target, node.args = _ATEN.constant_pad_nd.default, (*node.args[:2], 0 if value is None else value)
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        affine = _affine(module, node) if node.op == "call_function" and node.target in _BATCH_NORMS else None
        if affine is None or _fold_back(module, affine) or _fold_forward(module, affine) or keeps_lone:
            continue
        _multiply_and_add(module, affine)
    return clean(module)


def pads_with_zero(node: Node) -> bool:
    """Whether a node of a folded module pads with zero, which is always one of the quantized values."""
    return node.target is _ATEN.constant_pad_nd.default and (len(node.args) < 3 or node.args[2] == 0)


def clean(module: GraphModule) -> GraphModule:
    """Drop nodes that lead nowhere and constants that nothing reads, in place."""
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for name in names:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()
    return module


def attribute(module: nn.Module, name: str) -> Tensor:
    """The constant of that dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def set_constant(module: GraphModule, name: str, value: Tensor, before: Node, *, parameter: bool = False) -> Node:
    """Put a constant under a dotted name, and a node that reads it before another node.

    A constant of that name is replaced, for all that read it.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if parameter:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["val"] = value
    return node


def _is_identity(node: Node) -> bool:
    """Dropout in inference, and the copies into which the pure form turns it."""
    if node.op != "call_function" or not isinstance(node.args[0] if node.args else None, Node):
        return False
    if drops_nothing(node):
        return True
    source = node.args[0]
    assert isinstance(source, Node)
    # A copy in another memory format prepares a view; one of an expanded tensor makes it whole.
    return (
        node.target in (_ATEN.clone.default, _ATEN.alias.default, _ATEN.detach.default)
        and not node.kwargs
        and source.op == "call_function"
        and source.target != _ATEN.expand.default
    )


@dataclass(frozen=True)
class _Affine:
    """What a batch norm computes in inference: ``x * scale + shift``, both (channels,) in double precision.

    Attributes:
        outputs: The nodes that stand for its result.
        name: Of the layer, for new constants.
    """

    norm: Node
    outputs: tuple[Node, ...]
    scale: Tensor
    shift: Tensor
    name: str

    @property
    def source(self) -> Node:
        source = self.norm.args[0]
        assert isinstance(source, Node)
        return source

    def replace_with(self, module: GraphModule, node: Node) -> None:
        """Let another node take the place of the norm."""
        for output in self.outputs:
            output.replace_all_uses_with(node)
        for gone in dict.fromkeys((*self.outputs, self.norm)):
            module.graph.erase_node(gone)


def _affine(module: GraphModule, norm: Node) -> _Affine | None:
    """The batch norm as a function of its input alone, or None where it is in training or has no constants."""
    if norm.target is _ATEN._native_batch_norm_legit_no_training.default:
        epsilon = float(norm.args[6])
    elif norm.args[5]:
        return None  # in training mode: the statistics are those of the batch
    else:
        epsilon = float(norm.args[7])
    outputs = (norm,)
    if norm.target is not _ATEN.batch_norm.default:  # a tuple; only its first part is read in inference
        outputs = tuple(norm.users)
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in outputs):
            return None
    constants = [argument for argument in norm.args[1:5] if argument is not None]
    if norm.args[3] is None or norm.args[4] is None:
        return None
    if any(not isinstance(constant, Node) or constant.op != "get_attr" for constant in constants):
        return None
    gamma, beta, mean, variance = (
        None if argument is None else attribute(module, str(argument.target)).detach().double()
        for argument in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + epsilon) * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - mean * scale
    return _Affine(norm, outputs, scale, shift, str(norm.args[3].target).rpartition(".")[0])


def _fold_back(module: GraphModule, affine: _Affine) -> bool:
    """Fold a batch norm into the layer that it alone reads."""
    layer = affine.source
    if len(layer.users) != 1 or not _has_constant_weight(layer) or not _has_channels_on_axis_1(layer):
        return False
    weight, bias = _constants(module, layer)
    scaled = _scale_outputs(layer, weight, affine.scale)
    _set_constants(module, layer, scaled, bias * affine.scale + affine.shift)
    affine.replace_with(module, layer)
    return True


def _fold_forward(module: GraphModule, affine: _Affine) -> bool:
    """Fold a batch norm into the layers that alone read it.

    A convolution that pads does so with zeros, which the norm would have made of something else: there it is exact only
    without a shift.
    """
    if len(affine.outputs) != 1 or not affine.outputs[0].users:
        return False
    (output,) = affine.outputs
    layers = list(output.users)
    for layer in layers:
        if not _has_constant_weight(layer) or layer.args[0] is not output or is_transposed(layer):
            return False
        if layer.target in LINEAR:
            if not _has_channels_on_axis_1(layer):
                return False
        elif _pads(layer) and bool(affine.shift.any()):
            return False
    for layer in layers:
        weight, bias = _constants(module, layer)
        groups = 1 if layer.target in LINEAR else len(affine.scale) // weight.shape[1]
        per_group = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, out / groups, in / groups, ...)
        shape = (groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (per_group * affine.scale.reshape(shape)).reshape(weight.shape)
        added = (per_group * affine.shift.reshape(shape)).reshape(len(weight), -1).sum(1)
        _set_constants(module, layer, scaled, bias + added)
    affine.replace_with(module, affine.source)
    return True


def _multiply_and_add(module: GraphModule, affine: _Affine) -> None:
    """Write a batch norm as a product and a sum with constants, which every quantizer and runtime knows."""
    value = affine.norm.args[0].meta.get("val")
    shape = (-1, *[1] * (value.ndim - 2)) if isinstance(value, Tensor) else None
    if shape is None:
        return
    result = affine.source
    for suffix, numbers, function in (
        ("scale", affine.scale, _ATEN.mul.Tensor),
        ("shift", affine.shift, _ATEN.add.Tensor),
    ):
        name = free_name(module, f"{affine.name}.{suffix}" if affine.name else suffix)
        constant = set_constant(module, name, numbers.to(value.dtype).reshape(shape), affine.norm)
        with module.graph.inserting_before(affine.norm):
            result = module.graph.call_function(function, (result, constant))
        result.meta["val"] = value
    affine.replace_with(module, result)


def _constants(module: GraphModule, layer: Node) -> tuple[Tensor, Tensor | float]:
    """Weight and bias of a layer in double precision; 0 without a bias."""
    weight, bias = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(weight, Node)
    return (
        attribute(module, str(weight.target)).detach().double(),
        attribute(module, str(bias.target)).detach().double() if isinstance(bias, Node) else 0.0,
    )


def _set_constants(module: GraphModule, layer: Node, weight: Tensor, bias: Tensor) -> None:
    """Give a layer another weight and bias; those that other layers read too are left to them."""
    weight_node, bias_node = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(weight_node, Node)
    name = str(weight_node.target)
    dtype = attribute(module, name).dtype
    private = len(weight_node.users) == 1 and _readers(module, name) == 1
    target = name if private else free_name(module, f"{name}_folded")
    new_weight = set_constant(module, target, weight.to(dtype), layer, parameter=True)
    owner = target.rpartition(".")[0]
    bias_name = free_name(module, f"{owner}.bias" if owner else "bias")
    if isinstance(bias_node, Node) and private and len(bias_node.users) == 1:
        bias_name = str(bias_node.target) if _readers(module, str(bias_node.target)) == 1 else bias_name
    new_bias = set_constant(module, bias_name, bias.to(dtype), layer, parameter=True)
    layer.args = (layer.args[0], new_weight, new_bias, *layer.args[3:])
    for node in (weight_node, bias_node):
        if isinstance(node, Node) and not node.users:
            module.graph.erase_node(node)


def _has_constant_weight(layer: Node) -> bool:
    known = layer.target in CONVOLUTIONS | TRANSPOSED | LINEAR | {_ATEN.convolution.default}
    return known and all(
        isinstance(argument, Node) and argument.op == "get_attr" for argument in layer.args[1:3] if argument is not None
    )


def _has_channels_on_axis_1(layer: Node) -> bool:
    """Whether the layer's features are on the axis that batch norm scales: of a linear layer only with two axes."""
    value = layer.meta.get("val")
    return layer.target not in LINEAR or (isinstance(value, Tensor) and value.ndim == 2)


def _pads(convolution: Node) -> bool:
    """Whether a convolution reads zeros beyond the edges of its input."""
    padding = convolution.args[4] if len(convolution.args) > 4 else 0
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def _scale_outputs(layer: Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Weights of a layer whose output channels are multiplied by ``scale``."""
    if not is_transposed(layer):
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    # (in, out / groups, ...): the inputs of each group make its own outputs.
    groups = transposed_groups(layer)
    spread = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return weight * spread.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))


def _readers(module: GraphModule, name: str) -> int:
    return sum(node.op == "get_attr" and node.target == name for node in module.graph.nodes)


def free_name(module: GraphModule, name: str) -> str:
    """The name, or one like it that no constant has yet."""
    taken = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    taken |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate
