"""Operators in place as pure ones, where nobody else sees what they write: the same numbers, without a second trace."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from edgekd.programs.layers import CONVOLUTIONS, LINEAR, TRANSPOSED

__all__ = ["drops_nothing", "is_in_place", "pure_form", "stays_in_place"]

_ATEN = torch.ops.aten

_DROPOUTS = {
    overload
    for kind in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for overload in (getattr(_ATEN, kind).default, getattr(_ATEN, f"{kind}_").default)
}

_FRESH = CONVOLUTIONS | TRANSPOSED | LINEAR | {_ATEN.batch_norm.default, _ATEN.matmul.default}
"""Composite operators that always make a new tensor; others may give their input back, whatever their schema says
(dropout in inference, ``type_as``)."""


def drops_nothing(node: Node) -> bool:
    """Whether a node is a dropout in inference, which gives its argument back; in place it writes nothing."""
    return node.op == "call_function" and node.target in _DROPOUTS and not node.args[2]


def is_in_place(node: Node) -> bool:
    """Whether a node writes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not drops_nothing(node)


def stays_in_place(node: Node) -> bool:
    """Whether a node writes one of its arguments, and no pure form can take its place."""
    return is_in_place(node) and pure_form(node) is None


def pure_form(node: Node) -> torch._ops.OpOverload | None:
    """The operator that computes what one in place leaves in its first argument.

    None where it matters that it is in place: where the argument is read elsewhere, or may share its memory with
    something that is; or where the pure operator does not exist, or would give another type.
    """
    if not is_in_place(node):
        return None
    target, source = node.target, node.args[0] if node.args else None
    assert isinstance(target, torch._ops.OpOverload)
    if not isinstance(source, Node) or len(source.users) != 1 or not _is_fresh(source):
        return None
    packet = getattr(_ATEN, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if not isinstance(found, torch._ops.OpOverload) or found._schema.is_mutable:
        return None
    if [a.name for a in found._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    dtypes = {value.dtype for value in map(_value, node.all_input_nodes) if value is not None} - {torch.bool}
    written = _value(node)
    return found if written is not None and dtypes <= {written.dtype} else None


def _is_fresh(node: Node) -> bool:
    """Whether a node gives a tensor of its own, in memory that nothing else has."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.is_mutable:
        return pure_form(node) is not None
    if node.target in _FRESH:
        return True
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return not node.target.has_kernel_for_dispatch_key(composite) and all(
        result.alias_info is None for result in node.target._schema.returns
    )


def _value(node: Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None
