"""Zero padding of a written ML Program taken into the convolution that reads it: one operator and one copy less.

PyTorch's convolution pads both ends of an axis alike, so models with TensorFlow's uneven padding carry a ``pad`` of
their own; Core ML's convolution pads each end by itself. The numbers stay the same.
"""

from __future__ import annotations

from typing import Any

from ._mil_package import model_proto

__all__ = ["fold_pads"]


def fold_pads(model: Any) -> int:
    """Fold what can be folded in every function, in place; how many ``pad`` operators went.

    That is: constant zeros on spatial axes alone, read by convolutions alone, which pad by numbers or not at all.
    """
    folded = 0
    for function in model.mlProgram.functions.values():
        block = function.block_specializations[function.opset]
        constants = {op.outputs[0].name: op.attributes["val"] for op in block.operations if op.type == "const"}
        readers: dict[str, list[Any]] = {name: [None] for name in block.outputs}
        for operation in block.operations:
            _collect(operation, readers, inside=False)
        gone = []
        for operation in block.operations:
            if operation.type == "pad":
                amounts = _spatial_zeros(operation, constants)
                convolutions = readers.get(operation.outputs[0].name, [])
                if (
                    amounts is not None
                    and convolutions
                    and all(_takes(op, operation, constants) for op in convolutions)
                ):
                    for convolution in convolutions:
                        _pad_more(convolution, amounts, constants, operation.inputs["x"])
                    gone.append(operation)
        for operation in gone:
            block.operations.remove(operation)
        folded += len(gone)
    return folded


def _collect(operation: Any, readers: dict[str, list[Any]], inside: bool) -> None:
    """Who reads what; from inside a block of another operator, someone unknown."""
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "name":
                readers.setdefault(binding.name, []).append(None if inside else operation)
    for block in operation.blocks:
        for inner in block.operations:
            _collect(inner, readers, inside=True)
        for name in block.outputs:
            readers.setdefault(name, []).append(None)


def _argument(operation: Any, key: str, constants: dict[str, Any]) -> Any:
    """The constant value of an argument; None where it is none or absent."""
    if key not in operation.inputs or len(operation.inputs[key].arguments) != 1:
        return None
    binding = operation.inputs[key].arguments[0]
    return binding.value if binding.WhichOneof("binding") == "value" else constants.get(binding.name)


def _text(value: Any) -> str:
    return str(value.immediateValue.tensor.strings.values[0])


def _integers(value: Any) -> list[int]:
    return list(value.immediateValue.tensor.ints.values)


def _spatial_zeros(pad: Any, constants: dict[str, Any]) -> list[int] | None:
    """Before and after of each spatial axis, where nothing else is padded and all of it with zeros."""
    mode, amounts, filler = (_argument(pad, key, constants) for key in ("mode", "pad", "constant_val"))
    rank = len(pad.outputs[0].type.tensorType.dimensions)
    if amounts is None or (mode is not None and _text(mode) != "constant"):
        return None
    if filler is not None:
        tensor = filler.immediateValue.tensor
        stored = tensor.floats.values if tensor.WhichOneof("value") == "floats" else tensor.bytes.values
        if any(stored):
            return None
    found = _integers(amounts)
    found = [0] * (2 * rank - len(found)) + found
    return found[4:] if min(found) >= 0 and not any(found[:4]) else None


def _takes(convolution: Any, pad: Any, constants: dict[str, Any]) -> bool:
    """Whether it is a convolution over the padded value, and not with it as its weight, that pads by numbers."""
    if convolution is None or convolution.type != "conv":
        return False
    names = [
        b.name for key in ("weight", "bias") if key in convolution.inputs for b in convolution.inputs[key].arguments
    ]
    kind = _argument(convolution, "pad_type", constants)
    return pad.outputs[0].name not in names and (kind is None or _text(kind) in ("valid", "custom"))


def _pad_more(convolution: Any, amounts: list[int], constants: dict[str, Any], source: Any) -> None:
    kind, own = _argument(convolution, "pad_type", constants), _argument(convolution, "pad", constants)
    custom = kind is not None and _text(kind) == "custom" and own is not None
    present = _integers(own) if custom else [0] * len(amounts)
    pb = model_proto().MIL__pb2
    value = pb.Value()
    value.type.tensorType.dataType = pb.DataType.Value("INT32")
    value.type.tensorType.rank = 1
    value.type.tensorType.dimensions.add().constant.size = len(amounts)
    value.immediateValue.tensor.ints.values.extend(a + b for a, b in zip(amounts, present, strict=True))
    text = pb.Value()
    text.type.tensorType.dataType = pb.DataType.Value("STRING")
    text.immediateValue.tensor.strings.values.append("custom")
    for key, new in (("pad", value), ("pad_type", text)):
        del convolution.inputs[key].arguments[:]
        convolution.inputs[key].arguments.add().value.CopyFrom(new)
    convolution.inputs["x"].CopyFrom(source)
