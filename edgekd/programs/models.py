"""Programs: the one form in which a model passes between the stages (``torch.export``, a ``.pt2`` file)."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgekd.errors import DataError, ModelFileError, first_line
from edgekd.programs.pure import stays_in_place
from edgekd.protocols import Arrays
from edgekd.quiet import quiet
from edgekd.types import TensorSpec

__all__ = [
    "OPEN",
    "bind_inputs",
    "call_arguments",
    "count_macs",
    "count_parameters",
    "example_inputs",
    "input_specs",
    "input_values",
    "load_program",
    "open_axes",
    "output_specs",
    "program_bytes",
    "program_from",
    "read_model_file",
    "run_program",
]


def program_bytes(program: ExportedProgram) -> bytes:
    """The content of a ``.pt2`` file; the same program gives the same bytes."""
    buffer = io.BytesIO()  # a buffer, since torch writes the file's own name into the archive
    torch.export.save(program, buffer)
    return buffer.getvalue()


def load_program(path: Path) -> ExportedProgram:
    """Load a ``.pt2`` file written by ``torch.export.save``, without ever running code from it.

    Raises:
        ModelFileError: It is missing, truncated, of another format, or holds pickled objects.
    """
    return program_from(read_model_file(path), path)


def read_model_file(path: Path) -> bytes:
    """The content of a model file.

    Raises:
        ModelFileError: It is missing.
    """
    if not path.is_file():
        raise ModelFileError(f"no model file at {path}")
    return path.read_bytes()


def program_from(content: bytes, path: Path) -> ExportedProgram:
    """See :func:`load_program`.

    Args:
        content: Of the file.
        path: Where it was read, for the errors.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ModelFileError(f"{path} is not a .pt2 file (torch.export.save writes one), or it is truncated")
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators of compressed programs

    try:
        _refuse_pickle(content, path)
        with quiet():  # it logs the whole traceback of what it cannot read
            return torch.export.load(io.BytesIO(content))
    except ModelFileError:
        raise
    except Exception as error:
        raise ModelFileError(f"{path} cannot be read as a .pt2 file: {first_line(error)}") from error


def _refuse_pickle(content: bytes, path: Path) -> None:
    """``torch.export.load`` unpickles what it does not know (2.13: ``pt2_archive/_package.py``); look first."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in archive.namelist():
            base = name.rsplit("/", 1)[-1]
            if base == "data.pkl":
                raise ModelFileError(
                    f"{path} was not written by torch.export.save, but by torch.save it seems; "
                    "torch.export.save(torch.export.export(model, example), path) writes the program with its weights"
                )
            if base.startswith(("custom_obj_", "opaque_obj_")):
                raise ModelFileError(f"{path} holds a pickled object ({base}), which is never loaded")
            if base.endswith(("_weights_config.json", "_constants_config.json")):
                entries = json.loads(archive.read(name))["config"]
                pickled = [key for key, entry in entries.items() if entry.get("use_pickle")]
                if pickled:
                    raise ModelFileError(f"{path} holds pickled tensors ({pickled[0]}), which are never loaded")
            elif name.endswith(".pt"):
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except Exception as error:
                    raise ModelFileError(f"{path} holds a pickle ({base}), which is never loaded") from error


def input_specs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """User inputs by name, shape (-1 where dynamic) and dtype."""
    wanted = set(program.graph_signature.user_inputs)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(_spec(name, value) for name, value in values.items() if name in wanted and isinstance(value, Tensor))


def input_values(program: ExportedProgram) -> list[Tensor]:
    """Fake tensors of the user inputs, in the order of :func:`input_specs`."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return [values[spec.name] for spec in input_specs(program)]


def output_specs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """User outputs by name, shape (-1 where dynamic) and dtype."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return tuple(_spec(str(name), values[str(name)]) for name in program.graph_signature.user_outputs)


def _spec(name: str, value: Tensor) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(name=name, shape=shape, dtype=str(value.dtype).removeprefix("torch."))


OPEN = -1
"""Of an axis: any size is taken, as in :attr:`TensorSpec.shape`."""


def open_axes(program: ExportedProgram) -> list[dict[int, tuple[int, int | None]]]:
    """Of each input, its dynamic axes with the smallest and the largest size that they take, None without an end."""
    found: list[dict[int, tuple[int, int | None]]] = []
    for value in input_values(program):
        found.append({})
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                limits = program.range_constraints.get(size.node.expr)
                ends = limits is not None and limits.upper.is_Integer
                low = 0 if limits is None else int(limits.lower)
                found[-1][axis] = low, int(limits.upper) if ends else None
    return found


def call_arguments(program: ExportedProgram, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Input tensors as the positional and keyword arguments that the program was exported with."""
    from torch.export.graph_signature import ConstantArgument, InputKind
    from torch.utils import _pytree as pytree

    left = iter(tensors)
    leaves = [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else next(left)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT
    ]
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return args, kwargs


def example_inputs(program: ExportedProgram, batch: int = 1) -> list[Tensor]:
    """Zeros in the shapes of the program, with the given batch where it is dynamic.

    Other dynamic axes have 8, or what is nearest to it of the sizes that the program takes; each another size.
    """
    lengths: dict[str, int] = {}
    tensors = []
    for spec, value, axes in zip(input_specs(program), input_values(program), open_axes(program), strict=True):
        shape = list(spec.shape)
        for axis, (low, high) in axes.items():
            size = max(low, 8 + len(lengths)) if high is None else max(low, min(high, 8 + len(lengths)))
            shape[axis] = batch if axis == 0 else lengths.setdefault(str(value.shape[axis]), size)
        tensors.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype)))
    return tensors


def bind_inputs(specs: Sequence[TensorSpec], arrays: Arrays) -> dict[str, np.ndarray]:
    """Arrays under the names of the specs: by name where the names fit, else by order (``arr_0`` …).

    Raises:
        DataError: The number of arrays, the shapes or the kinds of dtype do not fit.
    """
    if set(arrays) >= {spec.name for spec in specs}:
        bound = {spec.name: np.asarray(arrays[spec.name]) for spec in specs}
    elif len(arrays) == len(specs):
        bound = {spec.name: np.asarray(array) for spec, array in zip(specs, arrays.values(), strict=True)}
    else:
        raise DataError(
            f"the model takes {', '.join(spec.name for spec in specs)}; the data has {', '.join(arrays) or 'nothing'}"
        )
    for spec in specs:
        array = bound[spec.name]
        if array.ndim != len(spec.shape) or any(
            w not in (-1, g) for w, g in zip(spec.shape[1:], array.shape[1:], strict=True)
        ):
            want = ("samples", *spec.shape[1:])
            raise DataError(f"input {spec.name!r} takes ({', '.join(map(str, want))}); the data is {array.shape}")
        if np.issubdtype(array.dtype, np.floating) != spec.dtype.startswith(("float", "bfloat")):
            raise DataError(f"input {spec.name!r} takes {spec.dtype}; the data is {array.dtype}")
        bound[spec.name] = array.astype(spec.dtype, copy=False)
    return bound


def run_program(program: ExportedProgram, arrays: Arrays, batch: int = 256) -> dict[str, np.ndarray]:
    """All samples through a program, in batches where its batch axis is dynamic, else in steps of its fixed batch.

    Returns:
        Outputs by name, samples on the first axis.

    Raises:
        DataError: The arrays do not fit the inputs.
    """
    specs = input_specs(program)
    bound = bind_inputs(specs, arrays)
    step = batch if any(spec.shape and spec.shape[0] == -1 for spec in specs) else specs[0].shape[0]
    names = [spec.name for spec in output_specs(program)]
    module = program.module()
    if _keeps_state(program):  # which the module shares with the program: the next run shall start where this one did
        module = copy.deepcopy(module)
    count = len(bound[specs[0].name])
    if count == 0 or (step != batch and count % step):
        raise DataError(f"the model takes {step} samples at a time; the data has {count}")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with torch.no_grad():
        for start in range(0, count, step):
            args = [torch.from_numpy(np.ascontiguousarray(bound[s.name][start : start + step])) for s in specs]
            positional, keyword = call_arguments(program, args)
            for name, output in zip(names, flatten_outputs(module(*positional, **keyword)), strict=True):
                parts[name].append(output.numpy())
    return {name: np.concatenate(arrays_) for name, arrays_ in parts.items()}


def _keeps_state(program: ExportedProgram) -> bool:
    """Whether a program writes something that lasts from call to call; before decomposition, as operators in place."""
    return bool(program.graph_signature.buffers_to_mutate) or any(map(stays_in_place, program.graph.nodes))


def flatten_outputs(output: Any) -> list[Tensor]:
    """Tensors of whatever a module returns (tensor, tuple, dict, transformers' ModelOutput), in its order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in flatten_outputs(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in flatten_outputs(value)]
    return []


def count_parameters(module: nn.Module | ExportedProgram) -> int:
    """Numbers that training set; shared ones count once, which a program holds under each of their names."""
    own = {(parameter.data_ptr() or id(parameter), parameter.numel()) for parameter in module.parameters()}
    return sum(count for _, count in own)


def count_macs(program: ExportedProgram) -> int:
    """Multiply-accumulates of one sample: those of convolutions and matrix products (torch's FLOP counter, halved)."""
    from torch.utils.flop_counter import FlopCounterMode

    args = example_inputs(program, 1)
    batch = max(1, args[0].shape[0]) if args and args[0].ndim else 1
    positional, keyword = call_arguments(program, args)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        program.module()(*positional, **keyword)
    return int(counter.get_total_flops()) // 2 // batch
