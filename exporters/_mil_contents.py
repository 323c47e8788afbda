"""What is in a Core ML package: operators and constants as its ML Program has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgekd.contents import Contents, OperatorFact, OperatorKind, WeightFact, stored_bytes

from ._mil_package import Package, Type, read_package

__all__ = ["read_contents"]

_KINDS: dict[str, OperatorKind] = {
    "transpose": "transpose",
    "cast": "cast",
    "batch_norm": "batch_norm",
    "quantize": "quantize",
    "dequantize": "dequantize",
    "gather": "embedding",
}
# Core ML runs these in integers between a dequantize and a quantize, so the pairs around them are no cost.
# https://apple.github.io/coremltools/docs-guides/source/opt-quantization-overview.html
_INTEGER = {"conv", "linear", "matmul", "add", "mul", "relu", "clip", "avg_pool", "max_pool", "reduce_mean", "concat"}
_INTEGER |= {"reshape", "transpose", "squeeze", "expand_dims", "pad", "slice_by_index", "split"}


def read_contents(path: Path) -> Contents:
    """Operators and constants of the main function.

    Raises:
        ModelFileError: The package is damaged.
    """
    package = read_package(path)
    functions = package.model.mlProgram.functions
    function = functions["main" if "main" in functions else next(iter(functions))]
    operations = list(function.block_specializations[function.opset].operations)
    types = {v.name: package.type_of(v.type) for operation in operations for v in operation.outputs}
    readers: dict[str, str] = {}
    producers = {value.name: operation for operation in operations for value in operation.outputs}
    for operation in reversed(operations):
        widens = operation.type.startswith("constexpr_")
        for name in _names(operation):
            readers[name] = readers.get(operation.outputs[0].name, "") if widens else operation.type
    operators, weights = [], []
    for operation in operations:
        output = operation.outputs[0].name if operation.outputs else ""
        if operation.type == "const":
            if types[output].shape is not None:
                weights.append(_weight(output, types[output], readers.get(output, "")))
        elif operation.type.startswith("constexpr_"):
            for key, declared in _compressed(package, operation):
                weights.append(_weight(f"{output}/{key}", declared, readers.get(output, "")))
        else:
            kind = _kind(operation, readers, producers)
            operators.append(OperatorFact(output, operation.type, kind, _size(types[output]) if output else 0))
    return Contents(tuple(operators), tuple(weights))


def _compressed(package: Package, operation: Any) -> Iterator[tuple[str, Type]]:
    """Parts of a compressed constant: attributes until iOS 17, typed inputs since iOS 18."""
    types = {key: package.type_of(value.type) for key, value in operation.attributes.items() if key != "name"}
    for key, argument in operation.inputs.items():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                types[key] = package.type_of(binding.value.type)
    if "shape" in types:  # packed bits in bytes, and the shape as numbers
        shape = tuple(int(size) for size in package.value_of(operation.attributes["shape"]))
        if "lut" in types:
            types["indices"] = Type(f"UINT{int(math.log2(math.prod(types['lut'].shape or (2,))))}", shape)
        if "mask" in types:
            types["mask"] = Type("UINT1", shape)
        del types["shape"]
    yield from ((key, declared) for key, declared in types.items() if declared.shape is not None)


def _names(operation: Any) -> list[str]:
    return [b.name for a in operation.inputs.values() for b in a.arguments if b.WhichOneof("binding") == "name"]


def _kind(operation: Any, readers: dict[str, str], producers: dict[str, Any]) -> OperatorKind:
    """Quantization counts only where no integer kernel takes it up."""
    kind = _KINDS.get(operation.type, "other")
    if kind == "dequantize" and readers.get(operation.outputs[0].name, "") in _INTEGER:
        return "other"
    if kind == "quantize":
        source = [producers[name].type for name in _names(operation) if name in producers]
        return "other" if any(name in _INTEGER for name in source) else kind
    if kind == "embedding":
        table = [producers[name].type for name in _names(operation)[:1] if name in producers]
        return kind if any(name == "const" or name.startswith("constexpr_") for name in table) else "other"
    return kind


def _weight(name: str, declared: Type, reader: str) -> WeightFact:
    shape = declared.shape or ()
    return WeightFact(name, declared.dtype, stored_bytes(declared.dtype, shape), shape, reader)


def _size(declared: Type) -> int:
    shape = declared.shape
    return 0 if shape is None or -1 in shape else stored_bytes(declared.dtype, shape)
