"""What is in a ``.aimodel`` package: the operators of its program, and its constants."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekd.contents import Contents, OperatorFact, OperatorKind, WeightFact, stored_bytes

__all__ = ["read_contents"]

# Not quantize and dequantize: the format has no integer operators, so they are how it says int8. What the compilers on
# a device make of them does not show here.
_KINDS: dict[str, OperatorKind] = {"transpose": "transpose", "cast": "cast"}
_PREPARING = ("dequantize", "cast", "reshape", "transpose", "broadcast_in_dims", "broadcast_to")
_TYPES = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "i1": "bool"}


def read_contents(path: Path) -> Contents:
    """Operators of the entry point, and all its constants, as the package stores them.

    The format has no names for either: a constant is called after its place.
    """
    from coreai.authoring import AIModelAsset

    program = AIModelAsset.load(path).program  # keeps what is read from it alive
    (main,) = [op for op in _inside(program._module._mlir_module.operation) if "@main" in str(op.operation)[:60]]
    operators, weights = [], []
    for place, op in enumerate(_inside(main.operation)):
        name = _name(op)
        if not op.results:
            continue
        dtype, shape = _tensor(op.results[0].type)
        size = stored_bytes(dtype, shape)
        if name == "constant":
            weights.append(WeightFact(f"constant_{place}", dtype, size, shape, _reader(op)))
        else:
            kind = "other" if _is_constant(op) else _KINDS.get(name, "other")
            operators.append(OperatorFact(f"{name}_{place}", name, kind, size))
    return Contents(tuple(operators), tuple(weights))


def _inside(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            yield from block.operations


def _name(op: Any) -> str:
    return str(op.operation.name).rpartition(".")[2]


def _is_constant(op: Any) -> bool:
    """Whether an operator only prepares a constant, which is done once, when the package is compiled."""
    while _name(op) in _PREPARING and op.operands:
        source = op.operands[0].owner
        if not hasattr(source, "operands") or not hasattr(source, "regions"):  # a block: an input of the program
            return False
        op = source
    return _name(op) == "constant"


def _reader(op: Any) -> str:
    """The first operator that computes with a constant, behind those that only prepare it."""
    name = ""
    while op.results:
        use = next(iter(op.results[0].uses), None)
        if use is None:
            break
        op, name = use.owner, _name(use.owner)
        if name not in _PREPARING:
            break
    return name


def _tensor(kind: Any) -> tuple[str, tuple[int, ...]]:
    """NumPy's name of the type and the shape of ``tensor<8x3xf32>``; unknown sizes are 0."""
    sizes = str(kind).removeprefix("tensor<").partition(",")[0].rstrip(">").split("x")
    element = sizes.pop().strip()
    dtype = _TYPES.get(element) or element.replace("si", "int").replace("ui", "uint")
    return dtype, tuple(int(size) if size.isdigit() else 0 for size in sizes)
