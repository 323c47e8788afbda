"""Modules traced to programs (``torch.export``), and rewritten programs made programs again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from edgekd.collector import collector_paused
from edgekd.errors import ModelFileError, first_line
from edgekd.programs.lift import lifted, with_sizes
from edgekd.programs.models import OPEN, call_arguments, example_inputs, input_specs, input_values, open_axes
from edgekd.programs.pure import drops_nothing
from edgekd.quiet import quiet

__all__ = ["at_batch", "export_program", "rename_outputs", "retrace", "without_origin"]


def export_program(module: nn.Module, inputs: Sequence[Tensor], *, dynamic_batch: bool = True) -> ExportedProgram:
    """Export a module in evaluation mode.

    Args:
        module: Returns a tensor, a tuple or a dict of tensors.
        inputs: One example each, batch first.
        dynamic_batch: Keep the batch axis dynamic where the model allows it; where it does not, the batch is fixed
            at one.

    Raises:
        ModelFileError: ``torch.export`` cannot trace the module; the message is its first line.
    """
    module = module.eval()
    args = tuple(inputs)
    try:
        with quiet(), collector_paused(), _masks_without_vmap():  # torch logs a page before it raises
            if dynamic_batch:
                with contextlib.suppress(Exception):  # of many types; the fixed batch below decides
                    pairs, size = tuple(torch.cat([x, x]) for x in args), Dim("batch")
                    shapes = torch.export.ShapesCollection()  # by tensor, for a module may take them as *inputs
                    for pair in pairs:
                        shapes[pair] = {0: size}
                    return _cleaned(torch.export.export(module, pairs, dynamic_shapes=shapes, strict=False))
            return _cleaned(torch.export.export(module, tuple(x[:1] for x in args), strict=False))
    except Exception as error:
        raise ModelFileError(f"torch.export cannot trace {type(module).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def _masks_without_vmap() -> Iterator[None]:
    """Have transformers compute attention masks from indices that broadcast, as its version 5 does.

    Version 4.53 to 4.57 wraps the computation in ``vmap`` and a mode for indexing, which torch records as a call that
    no ``.pt2`` file can hold (``flat_apply``); https://github.com/huggingface/transformers/pull/42721
    """
    masks = sys.modules.get("transformers.masking_utils")
    names = ("_vmap_for_bhqkv", "TransformGetItemToIndex")
    present = {name: getattr(masks, name) for name in names if hasattr(masks, name)}
    if len(present) < len(names):
        yield
        return

    def broadcast(function: Callable[..., Tensor], bh_indices: bool = True) -> Callable[..., Tensor]:
        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            axes = (batch[:, None, None, None], head[:, None, None], query[:, None], key)
            sizes = [axis.shape[0] for axis in (batch, head, query, key)]  # len() would fix a dynamic batch
            return function(*axes).expand(sizes)

        return mask if bh_indices else present["_vmap_for_bhqkv"](function, bh_indices)

    try:
        for name, plain in zip(names, (broadcast, contextlib.nullcontext), strict=True):
            setattr(masks, name, plain)
        yield
    finally:
        for name, function in present.items():
            setattr(masks, name, function)


def _cleaned(program: ExportedProgram) -> ExportedProgram:
    """Without origins, and without dropout, which does nothing in inference, in place: converters walk through each."""
    for node in list(program.graph.nodes):
        if drops_nothing(node) and all(user.op != "output" for user in node.users):  # outputs keep their names
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return without_origin(program)


def without_origin(program: ExportedProgram) -> ExportedProgram:
    """Drop where each operator comes from, in place: paths of this machine, and addresses that differ in every run."""
    for node in program.graph.nodes:
        for key in ("from_node", "stack_trace"):
            node.meta.pop(key, None)
    return program


def at_batch(program: ExportedProgram, batch: int = 1, length: int | None = None) -> ExportedProgram:
    """The same program with its batch axis fixed, as phones run it; one that is fixed already is returned as it is.

    Args:
        batch, length: See :func:`retrace`.

    Raises:
        ModelFileError: An axis other than the first is dynamic and no length is given: no size can be guessed for it.
    """
    if all(-1 not in spec.shape for spec in input_specs(program)):
        return program
    tensors, dims = _sized(program, batch, length)
    if not len(dims) and (made := with_sizes(program, tensors, call_arguments(program, tensors))) is not None:
        return made
    return retrace(program.module(check_guards=False), program, batch, length)


def retrace(
    module: nn.Module,
    program: ExportedProgram,
    batch: int = OPEN,
    length: int | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> ExportedProgram:
    """Export a rewritten module of a program again: names of inputs and outputs stay, however the module computes them.

    Args:
        module: Takes and returns what ``program.module()`` does.
        program: What the module was made from.
        batch: Fixes a dynamic batch; ``OPEN`` keeps it dynamic where it was.
        length: The same for all other dynamic axes. None keeps them where the batch stays open, and refuses them where
            it is fixed.
        dtypes: Of inputs, by name, that the module takes in another type than the program.

    Raises:
        ModelFileError: ``torch.export`` cannot trace the module; the message is its first line. Or an axis other
            than the first is dynamic and its size is not told.
    """
    tensors, shapes = _sized(program, batch, length, dtypes)
    names = [str(name) for name in program.graph_signature.user_outputs]
    args, kwargs = call_arguments(program, tensors)
    if not len(shapes) and (made := lifted(module, program, tensors, (args, kwargs))) is not None:
        return rename_outputs(made, names)
    dynamic = shapes if len(shapes) else None
    try:
        traced = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ModelFileError(f"torch.export cannot trace the rewritten program: {first_line(error)}") from error
    return rename_outputs(without_origin(traced), names)


def _sized(
    program: ExportedProgram, batch: int, length: int | None, dtypes: Mapping[str, torch.dtype] | None = None
) -> tuple[list[Tensor], Any]:
    """Inputs of the sizes that are asked for, and of those what stays open (torch's ``ShapesCollection``).

    Raises:
        ModelFileError: See :func:`retrace`.
    """
    if length is None and batch == OPEN:
        length = OPEN
    shapes = torch.export.ShapesCollection()
    tensors = example_inputs(program)
    for place, (spec, axes) in enumerate(zip(input_specs(program), _dims(program), strict=True)):
        sizes = list(tensors[place].shape)
        for axis in axes:
            wanted = batch if axis == 0 else length
            if wanted is None:
                raise ModelFileError(
                    f"input {spec.name!r} {spec.shape} has a dynamic axis besides the batch; export it fixed"
                )
            sizes[axis] = wanted if wanted != OPEN else max(2, sizes[axis])  # torch.export takes 1 for fixed
        dtype = (dtypes or {}).get(spec.name, tensors[place].dtype)
        tensors[place] = torch.zeros(sizes, dtype=dtype)
        kept = {axis: dim for axis, dim in axes.items() if (batch if axis == 0 else length) == OPEN}
        if kept:
            shapes[tensors[place]] = kept
    return tensors, shapes


def _dims(program: ExportedProgram) -> list[dict[int, Any]]:
    """What torch.export calls a ``Dim``, for each dynamic axis: the same one for sizes that are the same.

    Raises:
        ModelFileError: A size is no free one, but computed from another (twice as long …).
    """
    dims: dict[str, Any] = {}
    found: list[dict[int, Any]] = []
    for spec, value, axes in zip(input_specs(program), input_values(program), open_axes(program), strict=True):
        found.append({})
        for axis, (low, high) in axes.items():
            size = str(value.shape[axis])
            if not size.isidentifier():
                raise ModelFileError(f"axis {axis} of input {spec.name!r} is {size}, a size that follows from another")
            if size not in dims:
                name = "batch" if axis == 0 else "length"
                while name in {dim.__name__ for dim in dims.values()}:
                    name += "_"
                dims[size] = Dim(name, min=low if low > 1 else None, max=high)
            found[-1][axis] = dims[size]
    return found


def rename_outputs(program: ExportedProgram, names: Sequence[str]) -> ExportedProgram:
    """Give the user outputs of a fresh program these names, in place; torch names them after their last operator."""
    from torch.export.graph_signature import OutputKind

    nodes = {node.name: node for node in program.graph.nodes}
    specs = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    wanted: dict[str, str] = {}  # present name to wanted; an input that is passed through keeps its own
    for spec, name in zip(specs, names, strict=True):
        if nodes[spec.arg.name].op == "call_function":
            wanted.setdefault(spec.arg.name, name)
    for taken in set(wanted.values()) - set(wanted):
        if taken in nodes:
            fresh = f"{taken}_inner"
            while fresh in nodes:
                fresh += "_"
            nodes[taken].name = fresh
    for present, name in wanted.items():
        nodes[present].name = name
    for spec in specs:
        spec.arg.name = wanted.get(spec.arg.name, spec.arg.name)
    return program
