"""Static int8: a float module in, the same module with quantize and dequantize nodes out, scales from real samples.

The module is ``edgekd.programs.fold.folded_module`` of a program; :func:`edgekd.programs.tracing.retrace`
makes it a program again.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from edgekd.errors import DataError, NumericalError
from edgekd.programs.fold import attribute, clean, free_name, set_constant
from edgekd.programs.models import bind_inputs, call_arguments, flatten_outputs, input_specs
from edgekd.programs.weights import constant, finite, weight_names
from edgekd.protocols import Arrays
from edgekd.quiet import quiet

__all__ = [
    "checked_samples",
    "copied",
    "fingerprint_of",
    "interpret",
    "output_error",
    "outputs_of",
    "round_biases",
    "static_module",
]

_BATCH = 32  # bounds the memory of a large convnet


def static_module(
    module: GraphModule,
    program: ExportedProgram,
    samples: Arrays,
    observer: str,
    weight_bits: int = 8,
    keep_float: Collection[str] = (),
    activation_bits: int = 8,
) -> GraphModule:
    """Quantize layers with integer activations; the float module is left as it is.

    Args:
        module: Float, batch norm folded.
        program: What it was made from; says how it is called.
        samples: Of :func:`checked_samples`.
        observer: One of ``edgekd.compression.compressed.OBSERVER_NAMES``.
        weight_bits: 8 or 4; scales of 4-bit weights have the smallest squared error.
        keep_float: Names of the weights whose layers stay float.
        activation_bits: 8, or 16 for the range that 8 bits would cover, symmetric around zero.

    Returns:
        With biases in float (:func:`round_biases`) and weights that no runtime computes with in integers in float too.

    Raises:
        NumericalError: A weight, or what the module makes of the samples, is not finite.
    """
    names = weight_names(module)
    for name in names.values():
        finite(attribute(module, name), name)
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from edgekd.compression.quantizer import PortableQuantizer

        quantizer = PortableQuantizer(observer, weight_bits, frozenset(keep_float))
        prepared = prepare_pt2e(copied(module), quantizer)
        outputs_of(prepared, program, samples, "the student's outputs for calibration samples")
        converted = convert_pt2e(prepared, fold_quantize=True)
    _name_constants(converted, names)
    if activation_bits == 16:
        _widen_activations(converted)
    return converted


def _widen_activations(module: GraphModule) -> None:
    """Int16 activations in place of int8, in place: no zero point, which no runtime takes there."""
    operators = torch.ops.quantized_decomposed
    for node in module.graph.nodes:
        if node.target not in (operators.quantize_per_tensor.default, operators.dequantize_per_tensor.default):
            continue
        _, scale, zero, low, high, dtype = node.args
        if dtype == torch.int8 and node.args[0].op != "get_attr":
            scale = max(abs(low - zero), abs(high - zero)) * scale / 32767
            node.args = (node.args[0], scale, 0, -32768, 32767, torch.int16)
    module.recompile()


def copied(module: GraphModule) -> GraphModule:
    """A module with constants of its own."""
    with warnings.catch_warnings():  # torch 2.13 warns of its own deprecated use of LeafSpec
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(module)


def outputs_of(
    module: torch.nn.Module, program: ExportedProgram, samples: Arrays, what: str = "outputs of samples"
) -> list[np.ndarray]:
    """All samples through a rewritten module of a program, in small batches; one array an output.

    Raises:
        DataError: The number of samples is no multiple of the program's fixed batch.
        NumericalError: An output is not finite.
    """
    specs = input_specs(program)
    count = len(samples[specs[0].name])
    fixed = max((spec.shape[0] for spec in specs if spec.shape), default=1)
    step = _BATCH if fixed == -1 else fixed
    if fixed != -1 and count % step:
        raise DataError(f"the model takes {step} samples at a time; the calibration data has {count}")
    parts: list[list[np.ndarray]] = []
    with torch.no_grad():
        for start in range(0, count, step):
            batch = [torch.from_numpy(np.ascontiguousarray(samples[s.name][start : start + step])) for s in specs]
            args, kwargs = call_arguments(program, batch)
            outputs = flatten_outputs(module(*args, **kwargs))
            for output in outputs:
                if output.is_floating_point() and not bool(torch.isfinite(output).all()):
                    raise NumericalError(f"{what} {start}..{min(start + step, count) - 1} are not finite")
            parts.append([output.numpy() for output in outputs])
    return [np.concatenate(batches) for batches in zip(*parts, strict=True)]


def interpret(interpreter: Interpreter, program: ExportedProgram, samples: Arrays, count: int) -> list[Tensor]:
    """The first samples, at once, through a module that is run node by node; its outputs in order.

    Args:
        count: How many; a program of fixed batch takes its own number.
    """
    specs = input_specs(program)
    fixed = max((spec.shape[0] for spec in specs if spec.shape), default=1)
    count = count if fixed == -1 else fixed
    batch = [torch.from_numpy(np.ascontiguousarray(samples[spec.name][:count])) for spec in specs]
    flat = pytree.tree_leaves(call_arguments(program, batch))
    with torch.no_grad():
        return flatten_outputs(interpreter.run(*flat, enable_io_processing=False))


def output_error(reference: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Mean over the outputs of the squared error as a share of the reference's variance around zero; 0 when equal."""
    shares = [
        float(np.square(b.astype(np.float64) - a).mean() / max(float(np.square(a.astype(np.float64)).mean()), 1e-30))
        for a, b in zip(reference, found, strict=True)
        if np.issubdtype(a.dtype, np.floating)
    ]
    return sum(shares) / max(1, len(shares))


def checked_samples(program: ExportedProgram, calibration: Arrays) -> dict[str, np.ndarray]:
    """Calibration data under the names of the inputs.

    Raises:
        DataError: It does not fit the inputs.
        NumericalError: A value is not finite.
    """
    samples = bind_inputs(input_specs(program), calibration)
    counts = {len(array) for array in samples.values()}
    if len(counts) != 1 or counts == {0}:
        found = ", ".join(f"{name} has {len(array)}" for name, array in samples.items())
        raise DataError(f"calibration takes the same number of samples for every input, at least one; {found}")
    for name, array in samples.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            bad = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise NumericalError(f"calibration input {name!r} is not finite at sample {bad}; leave such samples out")
    return samples


def fingerprint_of(samples: Arrays) -> str:
    """sha256 over names, types, shapes and values, in order."""
    digest = hashlib.sha256()
    for name, array in samples.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def round_biases(module: GraphModule) -> None:
    """Round the bias of every integer layer to a multiple of the product of its two scales, in place.

    Runtimes hold it as such an integer and round it when they load the file; rounded here, all compute with the same.
    With int16 data the step is that of int8 data, 256 times as large: small enough beside int8 weights.
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
        if data.args[5] == torch.int16:
            scales *= 256
        if bias.shape != scales.shape:
            continue
        rounded = (torch.round(bias.double() / scales) * scales).to(bias.dtype)
        name = free_name(module, f"{biases[0].target}_rounded")
        layer.replace_input_with(biases[0], set_constant(module, name, rounded, layer, parameter=True))
    clean(module)


def _name_constants(module: GraphModule, names: dict[str, str]) -> None:
    """Call what PT2E calls ``_frozen_param0``, ``_scale_0``, ``_zero_point_0`` after the weight, in place."""
    for layer in list(module.graph.nodes):
        if layer.name not in names:
            continue
        for source in layer.all_input_nodes:
            if source.target is torch.ops.quantized_decomposed.dequantize_per_channel.default:
                for position, suffix in enumerate(("int8", "scale", "zero_point")):
                    value = attribute(module, str(source.args[position].target))
                    source.update_arg(position, constant(module, f"{names[layer.name]}_{suffix}", value, source))
    clean(module)
