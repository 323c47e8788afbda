"""PyTorch's LSTM as Core ML's ``lstm``: one operator a layer, however long the sequence is.

torch's own decomposition writes every step of the sequence into the program, and coremltools 9.0 expects TorchScript's
three named outputs of an LSTM, which an exported program does not have. GRU stays step by step: Core ML's ``gru`` is
PyTorch's only since iOS 18, and is reported to be wrong on all but the CPU
(https://github.com/webmachinelearning/webnn/issues/689), which no evaluator can see.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["LSTM", "decomposed_lstm", "register_translation"]

LSTM = torch.ops.aten.lstm.input
_NAME = "edgekd::lstm_layer"


@torch.library.custom_op(_NAME, mutates_args=())
def _layer(
    x: Tensor, initial_h: Tensor, initial_c: Tensor, weights: list[Tensor], directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer over (steps, batch, inputs); its states are (batch, directions · hidden), as Core ML has them."""
    states = tuple(torch.stack(state.chunk(directions, -1)) for state in (initial_h, initial_c))
    has_biases = len(weights) == 4 * directions
    y, h, c = torch.lstm(x, states, weights, has_biases, 1, 0.0, False, directions == 2, False)
    return y, torch.cat(list(h), -1), torch.cat(list(c), -1)


@_layer.register_fake
def _(
    x: Tensor, initial_h: Tensor, initial_c: Tensor, weights: list[Tensor], directions: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], x.shape[1], initial_h.shape[-1]),
        torch.empty_like(initial_h),
        torch.empty_like(initial_c),
    )


def decomposed_lstm(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """``aten.lstm.input`` as layers that stay whole; one with projections (``proj_size``) goes torch's own way."""
    directions = 2 if bidirectional else 1
    count = len(weights) // layers
    if count != directions * (4 if has_biases else 2):
        from torch._decomp.decompositions import lstm_impl

        return lstm_impl(x, states, weights, has_biases, layers, dropout, train, bidirectional, batch_first)
    sequence = x.transpose(0, 1) if batch_first else x
    ends: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in range(layers):
        first = directions * layer
        h, c = (torch.cat([state[first + i] for i in range(directions)], -1) for state in states)
        sequence, *last = torch.ops.edgekd.lstm_layer(
            sequence, h, c, weights[count * layer : count * (layer + 1)], directions
        )
        for end, state in zip(ends, last, strict=True):
            end += state.chunk(directions, -1)
    return sequence.transpose(0, 1) if batch_first else sequence, torch.stack(ends[0]), torch.stack(ends[1])


def register_translation() -> None:
    """Teach coremltools' converter the layer; once a process is enough."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY, register_torch_op

    if _TORCH_OPS_REGISTRY.get_func(_NAME) is not None:
        return

    def lstm_layer(context: Any, node: Any) -> None:
        x, initial_h, initial_c, weights, directions = _get_inputs(context, node, expected=5)
        values = [weight.val for weight in weights]
        if any(value is None for value in values):
            raise ValueError("an LSTM whose weights are computed; Core ML takes constants")
        arguments: dict[str, Any] = {"x": x, "initial_h": initial_h, "initial_c": initial_c}
        count = len(values) // directions.val
        for suffix, start in (("", 0), ("_back", count))[: directions.val]:
            for key, value in zip(("weight_ih", "weight_hh"), values[start : start + 2], strict=True):
                arguments[key + suffix] = _reordered(value)
            if count == 4:
                arguments["bias" + suffix] = _reordered(values[start + 2] + values[start + 3])
        direction = "bidirectional" if directions.val == 2 else "forward"
        context.add(mb.lstm(**arguments, direction=direction, output_sequence=True, name=node.name), node.name)

    register_torch_op(torch_alias=[_NAME])(lstm_layer)


def _reordered(values: np.ndarray) -> np.ndarray:
    """PyTorch's gates (input, forget, cell, output) in Core ML's order (input, forget, output, cell)."""
    i, f, g, o = np.split(values, 4)
    return np.concatenate([i, f, o, g])
