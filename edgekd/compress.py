"""Compression: a student in, a student out, whose program holds int8 weights and, for ``w8a8``, static scales.

The numbers are decided here, once; the exporters translate them. ``fp16`` and ``w8d8`` change nothing that a program
could hold, so the exporters make them from an ``fp32`` student.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekd.errors import DataError, NumericalError, UsageError
from edgekd.fold import (
    CONVOLUTIONS,
    LINEAR,
    TRANSPOSED,
    attribute,
    clean,
    folded_module,
    free_name,
    is_transposed,
    set_constant,
)
from edgekd.models import bind_inputs, example_inputs, input_specs, program_bytes, retrace
from edgekd.protocols import Arrays
from edgekd.quiet import quiet
from edgekd.types import Calibration, Precision, Student

__all__ = ["OBSERVER_NAMES", "PORTABLE", "choose_int8", "compress", "quantize_static", "quantize_weights"]

PORTABLE: tuple[Precision, ...] = ("w8", "w8a8")
"""Precisions that are programs: decided here, once for all targets. The exporters make the others from ``fp32``."""

OBSERVER_NAMES = ("minmax", "percentile")

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default: 1, _ATEN.addmm.default: 2, _ATEN.matmul.default: 1}
_TURNS = {_ATEN.t.default, _ATEN.permute.default, _ATEN.transpose.int, _ATEN.numpy_T.default}
_CALIBRATION_BATCH = 32  # bounds the memory of a large convnet


def compress(
    student: Student, precision: Precision, calibration: Arrays | None = None, observer: str = "minmax"
) -> Student:
    """The student in a precision that a program can hold: ``fp32`` (as it is), ``w8`` or ``w8a8``.

    Args:
        student: In ``fp32``.
        precision: ``fp16`` and ``w8d8`` are made by the exporters.
        calibration: Samples by input name, samples on the first axis; ``w8a8`` needs them.
        observer: How ``w8a8`` takes a range from the samples, one of :data:`OBSERVER_NAMES`.

    Raises:
        UsageError: The precision is none of these, the student is compressed already, or ``w8a8`` has no samples.
        DataError: The samples do not fit the inputs.
        NumericalError: The samples, or what the student makes of them, are not finite.
    """
    if precision == "fp32":
        return student
    if precision == "w8":
        return quantize_weights(student)
    if precision == "w8a8":
        if calibration is None:
            raise UsageError("w8a8 takes its scales from real samples and none were given; pass calibration data")
        return quantize_static(student, calibration, observer)
    if precision in ("fp16", "w8d8"):
        raise UsageError(f"{precision} is made by the exporter from an fp32 program; here are fp32, w8, w8a8")
    raise UsageError(f"no precision called {precision!r} to compress to; there are fp32, w8, w8a8")


def quantize_weights(student: Student) -> Student:
    """Weights of convolutions, linear layers and embeddings in int8 (``w8``); everything is still computed in float.

    Symmetric, one scale an output channel (an embedding: one a row), ``max |w| / 127``, −127..127. Biases and norms
    stay float. Batch norm is folded first. An embedding is often most of a text model, so it is no exception.

    Raises:
        UsageError: The student is compressed already, or has no such weights.
        NumericalError: A weight is not finite.
    """
    _refuse_compressed(student, "w8")
    module = folded_module(student.program)
    _quantize_weights(module)
    return _finish(student, module, "w8", None)


def quantize_static(student: Student, calibration: Arrays, observer: str = "minmax") -> Student:
    """Weights and activations in int8 with static scales (``w8a8``), by :mod:`edgekd.quantizer`.

    Batch norm is folded first. Weights that no runtime computes with in integers (embeddings, transposed
    convolutions) are in int8 as in :func:`quantize_weights`.

    Args:
        student: In ``fp32``.
        calibration: Real samples by input name, samples on the first axis; some hundred are enough.
        observer: One of :data:`OBSERVER_NAMES`.

    Raises:
        UsageError: There is no such observer, or the student is compressed already or has no weights to quantize.
        DataError: The samples do not fit the inputs.
        NumericalError: A sample, a weight, or what the student makes of the samples is not finite.
    """
    if observer not in OBSERVER_NAMES:
        raise UsageError(f"no observer called {observer!r}; there are {', '.join(OBSERVER_NAMES)}")
    _refuse_compressed(student, "w8a8")
    samples = _checked(student.program, calibration)
    module = folded_module(student.program)
    names = _weight_names(module)
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from edgekd.quantizer import PortableQuantizer

        prepared = prepare_pt2e(module, PortableQuantizer(observer))
        _observe(prepared, student.program, samples)
        converted = convert_pt2e(prepared, fold_quantize=True)
    _name_constants(converted, names)
    _round_biases(converted)
    _quantize_weights(converted)
    count = len(next(iter(samples.values())))
    return _finish(student, converted, "w8a8", Calibration(_fingerprint(samples), count, observer))


def choose_int8(program: ExportedProgram, precisions: Collection[Precision]) -> tuple[Precision, str]:
    """The int8 precision that suits a model, out of those that a target has, and one sentence why.

    A convnet gets static ``w8a8``. A model of attention and linear layers gets dynamic ``w8d8``, because outliers
    spoil static scales there, or ``w8`` where the target has no ``w8d8``.

    Args:
        program: In ``fp32``.
        precisions: Of the exporter.

    Raises:
        UsageError: The target has no int8 precision.
    """
    share = _convolution_share(program)
    convnet = share >= 0.5
    kind = f"{share:.0%} of its multiply-accumulates are convolutions"
    order: tuple[Precision, ...] = ("w8a8", "w8") if convnet else ("w8d8", "w8")
    reasons = {
        "w8a8": f"{kind}: a convnet, which static int8 activations suit",
        "w8d8": f"{kind}: mostly matrix products, which keep their accuracy with dynamic int8 activations",
        "w8": f"{kind}; the target has no {order[0]}, so only the weights are int8",
    }
    for precision in order:
        if precision in precisions:
            return precision, reasons[precision]
    raise UsageError(f"int8 was asked, and the target has only {', '.join(precisions)}")


def _convolution_share(program: ExportedProgram) -> float:
    """Share of the multiply-accumulates that convolutions do, 0 for a model without any."""
    from torch.utils.flop_counter import FlopCounterMode

    from edgekd.models import call_arguments

    args, kwargs = call_arguments(program, example_inputs(program, 1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        program.module()(*args, **kwargs)
    counts = counter.get_flop_counts().get("Global", {})
    total = sum(counts.values())
    convolutions = sum(count for operator, count in counts.items() if "conv" in str(operator))
    return convolutions / total if total else 0.0


def _refuse_compressed(student: Student, precision: str) -> None:
    if student.card.precision != "fp32":
        raise UsageError(f"{precision} needs an fp32 program; {student.card.name!r} is {student.card.precision}")


def _finish(student: Student, module: GraphModule, precision: Precision, calibration: Calibration | None) -> Student:
    if not any(buffer.dtype == torch.int8 for buffer in clean(module).buffers()):
        raise UsageError(
            f"{precision} quantizes float32 weights of convolutions, linear layers and embeddings, and "
            f"{student.card.name!r} has none; keep it in fp32"
        )
    program = retrace(module, student.program)
    settings = json.dumps([precision, dataclasses.asdict(calibration) if calibration else None], sort_keys=True)
    step = hashlib.sha256(settings.encode() + program_bytes(student.program)).hexdigest()
    card = dataclasses.replace(
        student.card,
        precision=precision,
        calibration=calibration,
        lineage=(*student.card.lineage, f"compress: {step}"),
    )
    return Student(program, card)


def _quantize_weights(module: GraphModule) -> None:
    """Put int8 constants and a dequantize node in the place of every float weight, in place."""
    done: dict[str, tuple[Node, int]] = {}
    for node in list(module.graph.nodes):
        found = _weight(node)
        if found is None:
            continue
        reader, position, axis = found
        constant = reader.args[position]
        assert isinstance(constant, Node)
        name = str(constant.target)
        weight = attribute(module, name).detach()
        if weight.dtype != torch.float32 or weight.ndim < 2:
            continue
        if name in done:
            axis = done[name][1]  # read twice (tied embeddings): quantized once
        integers, scales = _int8(weight, axis, name)
        dequantized = _dequantize(module, name, reader, integers, scales, axis)
        reader.update_arg(position, dequantized)
        done[name] = dequantized, axis
    clean(module)


def _weight(node: Node) -> tuple[Node, int, int] | None:
    """The node that reads the constant weight of a layer, the position of the weight, and the axis of its channels."""
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS | LINEAR:
        position, axis = 1, 0
    elif node.target in TRANSPOSED or node.target is _ATEN.convolution.default:
        position, axis = 1, int(is_transposed(node))
    elif node.target is _ATEN.embedding.default:
        position, axis = 0, 0
    elif node.target in _PRODUCTS:
        position, axis = _PRODUCTS[node.target], 1
        inner = node.args[position]
        while isinstance(inner, Node) and inner.target in _TURNS:
            node, position, axis = inner, 0, 1 - axis
            inner = node.args[0]
    else:
        return None
    weight = node.args[position]
    return (node, position, axis) if isinstance(weight, Node) and weight.op == "get_attr" else None


def _int8(weight: Tensor, axis: int, name: str) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"weight {name!r} is not finite, so it has no int8 form; train the student again")
    others = [other for other in range(weight.ndim) if other != axis]
    largest = weight.abs().amax(dim=others)
    # A channel of zeros: any scale gives zeros, and this one is what PT2E's observers give.
    scales = (largest / 127).clamp_min(torch.finfo(torch.float32).eps)
    shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
    integers = torch.round(weight / scales.reshape(shape)).clamp(-127, 127).to(torch.int8)
    return integers, scales


def _dequantize(module: GraphModule, name: str, reader: Node, integers: Tensor, scales: Tensor, axis: int) -> Node:
    """A node that computes the float weight, before the node that reads it."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

    zeros = torch.zeros(len(scales), dtype=torch.int64)
    parts = {"int8": integers, "scale": scales, "zero_point": zeros}
    nodes = [_constant(module, f"{name}_{suffix}", value, reader) for suffix, value in parts.items()]
    with module.graph.inserting_before(reader):
        return module.graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_channel.default, (*nodes, axis, -127, 127, torch.int8)
        )


def _constant(module: GraphModule, name: str, value: Tensor, before: Node) -> Node:
    """A node that reads a constant: the one of that name where it is the same, else a new one."""
    present = dict(module.named_buffers(remove_duplicate=False))
    while name in present:
        if torch.equal(present[name], value):
            with module.graph.inserting_before(before):
                return module.graph.get_attr(name)
        name += "_"
    return set_constant(module, name, value, before)


def _checked(program: ExportedProgram, calibration: Arrays) -> dict[str, np.ndarray]:
    specs = input_specs(program)
    samples = bind_inputs(specs, calibration)
    counts = {len(array) for array in samples.values()}
    if len(counts) != 1 or counts == {0}:
        found = ", ".join(f"{name} has {len(array)}" for name, array in samples.items())
        raise DataError(f"calibration takes the same number of samples for every input, at least one; {found}")
    for name, array in samples.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise NumericalError(f"calibration input {name!r} is not finite at sample {bad}; leave such samples out")
    return samples


def _observe(prepared: GraphModule, program: ExportedProgram, samples: dict[str, np.ndarray]) -> None:
    """Show all samples to the observers."""
    from edgekd.models import call_arguments, flatten_outputs

    specs = input_specs(program)
    count = len(samples[specs[0].name])
    fixed = max((spec.shape[0] for spec in specs if spec.shape), default=1)
    step = _CALIBRATION_BATCH if fixed == -1 else fixed
    if fixed != -1 and count % step:
        raise DataError(f"the model takes {step} samples at a time; the calibration data has {count}")
    with torch.no_grad():
        for start in range(0, count, step):
            batch = [torch.from_numpy(np.ascontiguousarray(samples[s.name][start : start + step])) for s in specs]
            args, kwargs = call_arguments(program, batch)
            for output in flatten_outputs(prepared(*args, **kwargs)):
                if output.is_floating_point() and not bool(torch.isfinite(output).all()):
                    last = min(start + step, count) - 1
                    raise NumericalError(
                        f"the student's outputs for calibration samples {start}..{last} are not finite"
                    )


def _weight_names(module: GraphModule) -> dict[str, str]:
    """By the name of each layer's node, the name of its weight."""
    names = {}
    for node in module.graph.nodes:
        found = _weight(node)
        if found is not None:
            names[node.name] = str(found[0].args[found[1]].target)
    return names


def _name_constants(module: GraphModule, names: dict[str, str]) -> None:
    """Call what PT2E calls ``_frozen_param0``, ``_scale_0``, ``_zero_point_0`` after the weight, in place."""
    for layer in list(module.graph.nodes):
        if layer.name not in names:
            continue
        for source in layer.all_input_nodes:
            if source.target is torch.ops.quantized_decomposed.dequantize_per_channel.default:
                for position, suffix in enumerate(("int8", "scale", "zero_point")):
                    value = attribute(module, str(source.args[position].target))
                    source.update_arg(position, _constant(module, f"{names[layer.name]}_{suffix}", value, source))
    clean(module)


def _round_biases(module: GraphModule) -> None:
    """Round the bias of every integer layer to a multiple of the product of its two scales, in place.

    Runtimes hold it as such an integer and round it when they load the file; rounded here, all compute with the same.
    """
    operators = torch.ops.quantized_decomposed
    for layer in list(module.graph.nodes):
        sources = {source.target: source for source in layer.all_input_nodes if source.op == "call_function"}
        data = sources.get(operators.dequantize_per_tensor.default)
        weight = sources.get(operators.dequantize_per_channel.default)
        biases = [source for source in layer.all_input_nodes if source.op == "get_attr"]
        if data is None or weight is None or len(biases) != 1:
            continue
        bias = attribute(module, str(biases[0].target)).detach()
        scales = attribute(module, str(weight.args[1].target)).double() * data.args[1]
        if bias.shape != scales.shape:
            continue
        rounded = (torch.round(bias.double() / scales) * scales).to(bias.dtype)
        name = free_name(module, f"{biases[0].target}_rounded")
        layer.replace_input_with(biases[0], set_constant(module, name, rounded, layer, parameter=True))
    clean(module)


def _fingerprint(samples: dict[str, np.ndarray]) -> str:
    """sha256 over names, types, shapes and values, in order."""
    digest = hashlib.sha256()
    for name, array in samples.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
