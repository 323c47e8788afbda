"""Quantization-aware training: the quantized program is trained with its rounding in place, then frozen again.

It starts from the static program, whatever calibration and corrections made of it, and ends in a program of the same
form: the same nodes and activation scales, other weights, weight scales and biases. So every exporter takes it.

In training a weight is float, rounded on the way to its layer, and gradients pass the rounding unchanged (straight
through; Bengio et al. 2013, arXiv:1308.3432). The scale of each channel is learned with it, as a factor on where it
started (after LSQ, Esser et al. 2020, arXiv:1902.08153).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekd.compression.compressed import calibration_of, check_observer, finished, refuse_compressed
from edgekd.compression.corrections import Static, StaticPlan, static_of
from edgekd.compression.static import checked_samples, copied, round_biases
from edgekd.precisions import WEIGHT_BITS
from edgekd.programs.fold import attribute
from edgekd.programs.models import call_arguments, flatten_outputs
from edgekd.programs.weights import float_weight, put_integers
from edgekd.protocols import Arrays
from edgekd.types import Precision, Student

__all__ = ["FakeQuantized", "QuantizedWeight", "train_quantized"]

_OPERATORS = torch.ops.quantized_decomposed


def train_quantized(
    student: Student,
    precision: Precision,
    calibration: Arrays,
    fits: Sequence[Callable[[nn.Module], None]],
    observer: str = "minmax",
    corrections: Sequence[str] = ("auto",),
) -> tuple[Student, list[Student]]:
    """Static int8, and the same program after each of several trainings.

    Args:
        student: In ``fp32``.
        precision: One of ``edgekd.precisions.WEIGHT_BITS``.
        calibration: See :func:`edgekd.compression.compress.quantize_static`.
        fits: Each trains a module in place, which takes the student's inputs in order and returns logits (batch,
            classes). It starts from the same weights every time, so an interrupted one goes on from its checkpoint.

    Returns:
        The static student and the trained ones; all are of the same form.

    Raises:
        UsageError, DataError, NumericalError: As :func:`edgekd.compression.compress.quantize_static`.
    """
    check_observer(observer)
    refuse_compressed(student, precision)
    samples = checked_samples(student.program, calibration)
    static = static_of(student.program, samples, StaticPlan(observer, WEIGHT_BITS[precision], tuple(corrections)))
    put_integers(static.module)
    trained = []
    for fit in fits:
        trainable = FakeQuantized(static, student.program)
        fit(trainable)
        trained.append(trainable.frozen())

    def frozen(module: GraphModule, *steps: str) -> Student:
        round_biases(module)
        return finished(student, module, precision, calibration_of(samples, observer, (*static.applied, *steps)))

    return frozen(static.module), [frozen(module, "qat") for module in trained]


class QuantizedWeight(nn.Module):
    """A weight that its layer sees rounded.

    Args:
        weight: Float; the start.
        scales: One a channel; the start.
        axis: Of the channels.
        largest: Integer at the end of the range: 127 or 7.
    """

    def __init__(self, weight: Tensor, scales: Tensor, axis: int, largest: int) -> None:
        super().__init__()
        self.axis, self.largest = axis, largest
        self.weight = nn.Parameter(weight.detach().clone())
        self.factor = nn.Parameter(torch.zeros_like(scales))  # of the scale, as its logarithm: steps are relative
        self.register_buffer("start", scales.detach().clone())

    def scales(self) -> Tensor:
        """Of the channels, (channels,)."""
        start = self.get_buffer("start")
        return (start * self.factor.exp()).clamp_min(torch.finfo(torch.float32).eps)

    def integers(self) -> Tensor:
        """The weight in steps of its scales; gradients pass the rounding and stop where it saturates."""
        steps = (self.weight / self._along(self.scales())).clamp(-self.largest, self.largest)
        return steps + (steps.round() - steps).detach()

    def forward(self) -> Tensor:
        return self.integers() * self._along(self.scales())

    def _along(self, scales: Tensor) -> Tensor:
        return scales.reshape([-1 if other == self.axis else 1 for other in range(self.weight.ndim)])


class FakeQuantized(nn.Module):
    """A static module that can be trained; takes the student's inputs in order and returns its first output.

    Args:
        static: Quantized; it is not changed.
        program: What it was made from: says how it is called.
    """

    def __init__(self, static: Static, program: ExportedProgram) -> None:
        super().__init__()
        self._static, self._program = [static.module], [program]  # in lists: no submodules
        module = copied(static.module)
        self.weights: dict[str, QuantizedWeight] = {}  # by the name of the constant that they become
        nodes = [n for n in module.graph.nodes if n.target is _OPERATORS.dequantize_per_channel.default]
        for node in nodes:
            self._train_weight(module, static.source, node)
        for node in list(module.graph.nodes):
            if node.target is _OPERATORS.quantize_per_tensor.default:
                node.target, node.args = torch.fake_quantize_per_tensor_affine, node.args[:5]
            elif node.target is _OPERATORS.dequantize_per_tensor.default:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        # A new module: PT2E forbids train() on the one that it made.
        self.net = GraphModule(module, module.graph)
        for parameter in self.net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(self, *inputs: Tensor) -> Tensor:
        args, kwargs = call_arguments(self._program[0], inputs)
        return flatten_outputs(self.net(*args, **kwargs))[0]

    def frozen(self) -> GraphModule:
        """The static module with what was learned in the place of its weights, scales and biases."""
        module = copied(self._static[0])
        learned = dict(self.net.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if name in learned:
                    parameter.copy_(learned[name])
            for node in module.graph.nodes:
                if node.target is _OPERATORS.dequantize_per_channel.default:
                    integers, scales = (attribute(module, str(source.target)) for source in node.args[:2])
                    weight = self.weights[str(node.args[0].target)]
                    integers.copy_(weight.integers().round().to(torch.int8))
                    scales.copy_(weight.scales())
        return module

    def _train_weight(self, module: GraphModule, source: GraphModule, node: Node) -> None:
        """Put a trainable weight in the place of integers and their dequantize node."""
        name = str(node.args[0].target)
        if name not in self.weights:
            scales = attribute(module, str(node.args[1].target))
            weight = float_weight(module, source, node)  # it loses nothing to rounding yet
            self.weights[name] = QuantizedWeight(weight, scales, int(node.args[3]), int(node.args[5]))
            module.add_submodule(f"quantized_{len(self.weights)}", self.weights[name])
        position = list(self.weights).index(name) + 1
        with module.graph.inserting_before(node):
            called = module.graph.call_module(f"quantized_{position}")
        node.replace_all_uses_with(called)
        module.graph.erase_node(node)
