"""Bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2): rounding shifts the mean of a channel; undo it.

Empirical: the mean output of each channel is compared between the float and the quantized module on real samples. All
layers in a single pass: each is corrected before the layers after it see its output.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from edgekd.compression.static import interpret
from edgekd.programs.fold import attribute, clean, free_name, set_constant
from edgekd.programs.layers import CONVOLUTIONS, LINEAR
from edgekd.protocols import Arrays

__all__ = ["SAMPLES", "correct_biases"]

SAMPLES = 32
"""How many samples the means are taken from, at once: it bounds the memory."""


def correct_biases(converted: GraphModule, module: GraphModule, program: ExportedProgram, samples: Arrays) -> int:
    """Correct the biases of quantized layers, in place.

    Args:
        converted: Of :func:`edgekd.compression.static.static_module`.
        module: The float module that it was made from: their layers have the same names.
        program: Says how both are called.

    Returns:
        How many layers were corrected; one without a bias is left alone.
    """
    layers = _layers(converted)
    if not layers:
        return 0
    expected = _Means(module, layers)
    corrected = _Means(converted, layers, expected.means)  # filled by the run before
    interpret(expected, program, samples, SAMPLES)
    interpret(corrected, program, samples, SAMPLES)
    for node in list(converted.graph.nodes):
        if node.name in layers:
            bias = node.args[2]
            value = attribute(converted, str(bias.target)).detach() + corrected.shifts[node.name]
            name = free_name(converted, f"{bias.target}_corrected")
            node.update_arg(2, set_constant(converted, name, value, node, parameter=True))
    clean(converted)
    return len(layers)


class _Means(Interpreter):
    """Runs a module and takes the mean of each layer's channels; with expected means, shifts each layer to them."""

    def __init__(self, module: GraphModule, layers: dict[str, int], expected: dict[str, Tensor] | None = None) -> None:
        super().__init__(module)
        self.layers, self.expected = layers, expected
        self.means: dict[str, Tensor] = {}
        self.shifts: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.layers:
            axis = self.layers[n.name] % value.ndim
            mean = value.mean([other for other in range(value.ndim) if other != axis])
            self.means[n.name] = mean
            if self.expected is not None:
                shift = self.expected[n.name] - mean
                self.shifts[n.name] = shift
                value = value + shift.reshape([-1 if other == axis else 1 for other in range(value.ndim)])
        return value


def _layers(converted: GraphModule) -> dict[str, int]:
    """Quantized layers with a constant bias, and the axis of their channels."""
    found = {}
    for node in converted.graph.nodes:
        if node.op != "call_function" or node.target not in CONVOLUTIONS | LINEAR or len(node.args) < 3:
            continue
        bias = node.args[2]
        quantized = any("dequantize_per_channel" in str(source.target) for source in node.all_input_nodes)
        if quantized and isinstance(bias, Node) and bias.op == "get_attr":
            found[node.name] = 1 if node.target in CONVOLUTIONS else -1
    return found
