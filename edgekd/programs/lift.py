"""Programs of other sizes, and rewritten modules as programs again, without tracing them.

``torch.export`` runs a module operator by operator through its tracer, which takes as long as half a conversion to Core
ML. A graph of operators with every size known needs no tracer: each operator is run once on fake tensors, what is a
number becomes a constant, and weights become inputs, as an ``ExportedProgram`` has them. Where nothing but sizes
changes, not even that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from edgekd.programs.models import input_values
from edgekd.programs.pure import stays_in_place

__all__ = ["lifted", "with_sizes"]


def with_sizes(
    program: ExportedProgram, inputs: Sequence[Tensor], example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> ExportedProgram | None:
    """A program with every open size bound to that of the inputs; nothing is run, the sizes are put in.

    Returns:
        None where that is not enough: a size depends on values, an output is a number, or the program holds another
        (``torch.autocast`` within the model).
    """
    if any(node.op == "get_attr" for node in program.graph.nodes):  # of a program, a weight is an input
        return None
    numbers = {
        size.node.expr: actual
        for value, tensor in zip(input_values(program), inputs, strict=True)
        for size, actual in zip(value.shape, tensor.shape, strict=True)
        if isinstance(size, torch.SymInt)
    }
    mode, graph = _fake_mode(), Graph()
    copies: dict[Node, Any] = {}

    def bound(value: Any) -> Any:
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            return type(value.node.hint)(value.node.expr.xreplace(numbers))  # raises where a size stays open
        if isinstance(value, Tensor):
            size, stride = (tuple(map(bound, one)) for one in (value.shape, value.stride()))
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        return value

    with mode, torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                continue
            try:
                value = pytree.tree_map(bound, node.meta.get("val"))
            except TypeError:
                return None
            if node.op == "call_function" and (isinstance(value, int | float) or (value is None and not node.users)):
                copies[node] = value  # a number now, or an assertion about one
                continue
            made = copies[node] = graph.node_copy(node, lambda one: copies[one])
            made.name = node.name  # a graph takes no name that Python has for a function, but keeps one
            made.meta = _meta(node, value)
    if _end(graph, program, copies) is None:
        return None
    signature, state, constants = program.graph_signature, program.state_dict, program.constants
    return _like(program, graph, signature, example_inputs, state, constants)


def lifted(
    module: nn.Module,
    program: ExportedProgram,
    inputs: Sequence[Tensor],
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]],
) -> ExportedProgram | None:
    """The program of a module.

    Args:
        module: A graph that takes and returns what ``program.module()`` does.
        program: What it was made from: says how inputs and outputs are nested.
        inputs: Of the sizes that the program is for, in the order of the module's placeholders.
        example_inputs: The same, as the module is called.

    Returns:
        None where a tracer is needed: the module is no graph, writes where others read, holds another module, or
        takes something besides tensors.
    """
    if not isinstance(module, GraphModule) or not _is_plain(module, program):
        return None
    mode = _fake_mode()
    graph = Graph()
    known: dict[Node, Any] = {}  # of each old node its new one, or the number that it is
    state: dict[str, Tensor] = {}
    weights: list[InputSpec] = []
    taken: list[InputSpec] = []
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    prefix = "weight"
    while any(str(name).startswith(prefix) for name in program.graph_signature.user_inputs):
        prefix += "_"
    of_weights: dict[str, Node] = {}
    for node in (node for node in module.graph.nodes if node.op == "get_attr"):
        name = str(node.target)
        if name not in of_weights:
            weight = _tensor(module, name)
            assert weight is not None
            place = of_weights[name] = graph.placeholder(f"{prefix}_{len(of_weights)}")
            place.meta["val"] = mode.from_tensor(weight, static_shapes=True)
            kind = InputKind.PARAMETER if isinstance(weight, nn.Parameter) else InputKind.BUFFER
            persistent = None if kind is InputKind.PARAMETER else True
            weights.append(InputSpec(kind, TensorArgument(place.name), name, persistent))
            state[name] = weight
        known[node] = of_weights[name]
    for old, tensor in zip(places, inputs, strict=True):
        place = graph.placeholder(old.name)
        place.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        taken.append(InputSpec(InputKind.USER_INPUT, TensorArgument(place.name), None))
        known[old] = place
    with mode, torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "call_function":
                known[node] = _computed(graph, node, known)
    results = _end(graph, module, known)
    if results is None:
        return None
    given = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(result.name), None) for result in results]
    signature = ExportGraphSignature([*weights, *taken], given)
    made = _like(program, graph, signature, example_inputs, state, {})
    entries = [node for node in made.graph.nodes if node.op == "placeholder"][len(weights) :]
    for node, name, spec in zip(entries, program.graph_signature.user_inputs, taken, strict=True):
        # A graph takes no name that Python has for a function (``input``); one that is made already does.
        node.name = node.target = spec.arg.name = str(name)
    return made


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, export=True)


def _is_plain(module: GraphModule, program: ExportedProgram) -> bool:
    if any(
        spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, TensorArgument)
        for spec in program.graph_signature.input_specs
    ):
        return False
    return all(
        node.op in ("placeholder", "output")
        or (node.op == "get_attr" and _tensor(module, str(node.target)) is not None)
        or (node.op == "call_function" and not stays_in_place(node))
        for node in module.graph.nodes
    )


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(owner), leaf)
    return found if isinstance(found, Tensor) else None


def _computed(graph: Graph, node: Node, known: dict[Node, Any]) -> Any:
    """The node's copy with its value, or the number that it is."""
    args = torch.fx.node.map_arg(node.args, lambda one: known[one])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda one: known[one])
    values = torch.fx.node.map_arg((args, kwargs), lambda one: one.meta["val"])
    value = node.target(*values[0], **values[1])
    if isinstance(value, int | float | bool):
        return value
    made = graph.create_node("call_function", node.target, args, kwargs, node.name)
    made.meta = _meta(node, value)
    return made


def _meta(node: Node, value: Any) -> dict[str, Any]:
    """Of a node's copy."""
    return {key: entry for key, entry in node.meta.items() if key == "nn_module_stack"} | {"val": value}


def _end(graph: Graph, module: GraphModule | ExportedProgram, copies: Mapping[Node, Any]) -> list[Node] | None:
    """Return from a graph what the module returns: its nodes, or None where one of them has become a number."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    results = [copies.get(result) for result in pytree.tree_leaves(output.args[0])]
    nodes = [result for result in results if isinstance(result, Node)]
    if len(nodes) != len(results):
        return None
    graph.output(tuple(nodes))
    return nodes


def _like(
    program: ExportedProgram,
    graph: Graph,
    signature: ExportGraphSignature,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]],
    state_dict: dict[str, Any],
    constants: dict[str, Any],
) -> ExportedProgram:
    """A program of another graph with every size known, called as the first is."""
    return ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=signature,
        state_dict=state_dict,
        range_constraints={},
        module_call_graph=program.module_call_graph[:1],
        example_inputs=example_inputs,
        constants=constants,
        verifiers=[program.verifier],
    )
