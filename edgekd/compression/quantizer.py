"""edgekd's quantizer: quantize and dequantize where ONNX Runtime, Core ML and LiteRT all fuse them, float elsewhere.

A tensor is *quantized* when it comes out of an operator that every one of the three runs in integers:

- a convolution or a linear layer with constant weights, together with the activation that alone reads it;
- pooling, relu, and operators that only move numbers, when what they read is quantized;
- addition, multiplication and concatenation, when all that they read is quantized.

So the residual stream of a transformer, which starts at a layer norm or an embedding, is never quantized, while that of
a residual convnet is. Operators that only move numbers, max pooling, windowed average pooling and concatenation have
one scale for all that they read and write: LiteRT demands it. A global average has a scale of its own: its range is
far smaller than that of what it averages.

Importing this module imports torchao; see :func:`edgekd.compression.compress.quantize_static`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from edgekd.compression.observers import OBSERVERS, WeightMseObserver
from edgekd.programs.fold import pads_with_zero
from edgekd.programs.layers import CONVOLUTIONS, LINEAR, is_transposed

__all__ = ["PortableQuantizer"]

_ATEN = torch.ops.aten
_KEY = "quantization_annotation"

_MATRIX_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default, _ATEN.matmul.default}
_ACTIVATIONS = {_ATEN.relu.default, _ATEN.relu6.default, _ATEN.hardtanh.default, _ATEN.clamp.default}
_ELEMENTWISE = {_ATEN.add.Tensor, _ATEN.mul.Tensor}
_CONCATENATIONS = {_ATEN.cat.default, _ATEN.concat.default}
_AVERAGES = {_ATEN.avg_pool1d.default, _ATEN.avg_pool2d.default}
_ADAPTIVE = {_ATEN.adaptive_avg_pool1d.default, _ATEN.adaptive_avg_pool2d.default}
_MOVES = {
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.reshape.default,
    _ATEN.flatten.using_ints,
    _ATEN.unflatten.int,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.unsqueeze.default,
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.t.default,
    _ATEN.contiguous.default,
    _ATEN.clone.default,
    _ATEN.slice.Tensor,
    _ATEN.select.int,
    _ATEN.expand.default,
    _ATEN.channel_shuffle.default,
    _ATEN.pixel_shuffle.default,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.upsample_nearest2d.default,
    _ATEN.max_pool1d.default,
    _ATEN.max_pool2d.default,
}


class PortableQuantizer(Quantizer):
    """Annotates a module for :func:`torchao.quantization.pt2e.quantize_pt2e.prepare_pt2e`.

    Weights: int8, symmetric, one scale an output channel, −127..127 (4 bits: −7..7). Activations: int8, affine, one
    scale a tensor, −128..127. Biases stay float: every runtime quantizes them itself, with the product of the two
    scales.
    """

    def __init__(self, observer: str = "minmax", weight_bits: int = 8, keep_float: Collection[str] = ()) -> None:
        """See :func:`edgekd.compression.static.static_module`."""
        super().__init__()
        self.weight_bits = weight_bits
        self.keep_float = keep_float
        self.activation = QuantizationSpec(
            dtype=torch.int8,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=OBSERVERS[observer],
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        quantized: dict[Node, None] = {}  # in the order of the graph
        for node in model.graph.nodes:
            if node.op == "call_function" and node not in quantized:
                self._annotate_node(node, quantized)
        for node in reversed(model.graph.nodes):
            # Moving quantized numbers towards a float operator gains nothing: there the float value is moved.
            if node in quantized and node.target in _MOVES and not any(_KEY in user.meta for user in node.users):
                del node.meta[_KEY], quantized[node]
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing is annotated that could be refused."""

    def _annotate_node(self, node: Node, quantized: dict[Node, None]) -> None:
        inputs = [argument for argument in node.all_input_nodes if _is_float(argument)]
        weight = weight_axis(node)
        if weight is not None and _constant_name(weight[0]) in self.keep_float:
            return
        if weight is not None:
            data = node.args[1] if node.target is _ATEN.addmm.default else node.args[0]
            assert isinstance(data, Node)
            self._set(node, {data: self.activation, weight[0]: _weight_spec(weight[1], self.weight_bits)}, quantized)
        elif not inputs or any(argument not in quantized for argument in inputs):
            return
        elif node.target in _MOVES | _AVERAGES | _CONCATENATIONS or _is_windowed(node) or pads_with_zero(node):
            self._share(node, inputs, quantized)
        elif node.target in _ACTIVATIONS or node.target in _ADAPTIVE or _is_global_mean(node):
            self._set(node, {inputs[0]: self.activation}, quantized)
        elif node.target in _ELEMENTWISE and all(isinstance(argument, Node) for argument in node.args[:2]):
            self._set(node, dict.fromkeys(inputs, self.activation), quantized)

    def _set(self, node: Node, inputs: dict[Node, Any], quantized: dict[Node, None]) -> None:
        """Annotate an operator, and with it the activation that alone reads it."""
        output = node
        users = list(node.users)
        if node.target not in _ACTIVATIONS and len(users) == 1 and users[0].target in _ACTIVATIONS:
            output = users[0]
            if len(output.all_input_nodes) > 1:  # a clamp by tensors
                output = node
        if output is not node:
            node.meta[_KEY] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
            output.meta[_KEY] = QuantizationAnnotation(output_qspec=self.activation, _annotated=True)
        else:
            node.meta[_KEY] = QuantizationAnnotation(inputs, self.activation, _annotated=True)
        quantized[output] = None

    def _share(self, node: Node, inputs: list[Node], quantized: dict[Node, None]) -> None:
        """Annotate an operator that has one scale for all that it reads and writes."""
        first = SharedQuantizationSpec((inputs[0], node))
        specs: dict[Node, Any] = {inputs[0]: self.activation} | dict.fromkeys(inputs[1:], first)
        node.meta[_KEY] = QuantizationAnnotation(specs, first, _annotated=True)
        quantized[node] = None


def weight_axis(node: Node) -> tuple[Node, int] | None:
    """The constant weight of a layer that all three runtimes run in integers, and the axis of its output channels."""
    if node.op != "call_function" or not node.args:
        return None
    if node.target in CONVOLUTIONS | LINEAR or (
        node.target is _ATEN.convolution.default and not is_transposed(node) and len(node.args[3]) < 4
    ):
        position, axis = 1, 0
    elif node.target in _MATRIX_PRODUCTS:
        position, axis = (2 if node.target is _ATEN.addmm.default else 1), 1
    else:
        return None
    weight = node.args[position]
    if not isinstance(weight, Node) or not _is_float(weight):
        return None
    constant = weight
    if position and axis == 1:
        value = weight.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim != 2:
            return None
        while constant.target in {_ATEN.t.default, _ATEN.permute.default, _ATEN.transpose.int}:
            constant = constant.args[0]
    return (weight, axis) if constant.op == "get_attr" else None


def _constant_name(weight: Node) -> str:
    """Name of the constant that a weight is, however it was turned."""
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    return str(weight.target)


def _weight_spec(axis: int, bits: int) -> QuantizationSpec:
    largest = 2 ** (bits - 1) - 1
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-largest,
        quant_max=largest,
        qscheme=torch.per_channel_symmetric,
        ch_axis=axis,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver if bits == 8 else WeightMseObserver,
    )


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _is_windowed(node: Node) -> bool:
    """Whether a node is an adaptive pool that does not average everything into one."""
    if node.target not in _ADAPTIVE:
        return False
    sizes = node.args[1]
    return any(size != 1 for size in (sizes if isinstance(sizes, list | tuple) else (sizes,)))


def _is_global_mean(node: Node) -> bool:
    """Whether a mean is a global average pool, as many convnets write it."""
    if node.target is not _ATEN.mean.dim:
        return False
    value = node.args[0].meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 4:
        return False
    return sorted(axis % 4 for axis in node.args[1]) == [2, 3]
