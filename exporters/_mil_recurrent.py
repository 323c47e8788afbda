"""Recurrent operators of ML Programs: rnn, gru and lstm, step by step over the first axis.

Written from Apple's description of MIL (coremltools' operator reference), in torch; parameters carry MIL's names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import ExportError

from ._mil_registry import operator

Activation = Callable[[Tensor], Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _activation(name: str) -> Activation:
    if name not in _ACTIVATIONS:  # MIL also allows hard_sigmoid and scaled_tanh, but does not say with which numbers
        raise ExportError(f"has the activation {name!r}; the evaluator knows {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _order(length: int, direction: str) -> list[int]:
    if direction not in ("forward", "reverse"):
        raise ExportError(f"has the unknown direction {direction!r}")
    return list(range(length)) if direction == "forward" else list(reversed(range(length)))


def _sequence(steps: dict[int, Tensor], order: list[int], output_sequence: bool) -> Tensor:
    """Every step in the order of time, or the one that was computed last."""
    return torch.stack([steps[t] for t in sorted(order)]) if output_sequence else steps[order[-1]].unsqueeze(0)


@operator()
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """h = activation(W_ih x + W_hh h + b); ``x`` is (steps, batch, inputs)."""
    act, h, order = _activation(activation), initial_h, _order(x.shape[0], direction)
    steps = {}
    for t in order:
        h = act(F.linear(x[t], weight_ih, bias) + F.linear(h, weight_hh))
        steps[t] = h
    return _sequence(steps, order, output_sequence), h


@operator(later={"reset_after": "CoreML8", "input_bias": "CoreML8"})
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates in the order reset, output, update; o = activation(W_io x + r ⊙ (W_ho h) + b_o).

    ``reset_after`` takes the bias into the brackets, and ``input_bias`` is added outside of them: PyTorch's GRU.
    """
    if input_bias is not None and not reset_after:
        raise ExportError("has input_bias without reset_after, which is not described")
    gate, act, h = _activation(recurrent_activation), _activation(activation), initial_h
    order = _order(x.shape[0], direction)
    steps = {}
    for t in order:
        from_input = F.linear(x[t], weight_ih, input_bias if reset_after else bias).chunk(3, -1)
        from_state = F.linear(h, weight_hh, bias if reset_after else None).chunk(3, -1)
        reset = gate(from_input[0] + from_state[0])
        update = gate(from_input[2] + from_state[2])
        new = act(from_input[1] + reset * from_state[1])
        h = (1 - update) * new + update * h
        steps[t] = h
    return _sequence(steps, order, output_sequence), h


@operator()
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates in the order input, forget, output, cell; both directions side by side on the last axis."""
    if clip is not None:
        raise ExportError("clips its cell; MIL does not say before or after the state is added")
    acts = (_activation(recurrent_activation), _activation(cell_activation), _activation(activation))
    if direction != "bidirectional":
        return _lstm(x, initial_h, initial_c, weight_ih, weight_hh, bias, peephole, direction, output_sequence, acts)
    if weight_ih_back is None or weight_hh_back is None:
        raise ExportError("runs in both directions without weights for the way back")
    (h, h_back), (c, c_back) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    there = _lstm(x, h, c, weight_ih, weight_hh, bias, peephole, "forward", output_sequence, acts)
    back = _lstm(
        x, h_back, c_back, weight_ih_back, weight_hh_back, bias_back, peephole_back, "reverse", output_sequence, acts
    )
    sequence, h, c = (torch.cat(pair, -1) for pair in zip(there, back, strict=True))
    return sequence, h, c


def _lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    direction: str,
    output_sequence: bool,
    activations: tuple[Activation, Activation, Activation],
) -> tuple[Tensor, Tensor, Tensor]:
    gate, cell, act = activations
    p_input, p_forget, p_output = (0.0, 0.0, 0.0) if peephole is None else peephole.chunk(3)
    order = _order(x.shape[0], direction)
    steps = {}
    for t in order:
        i, f, o, z = (F.linear(x[t], weight_ih, bias) + F.linear(h, weight_hh)).chunk(4, -1)
        before = c
        c = gate(f + p_forget * before) * before + gate(i + p_input * before) * cell(z)
        h = gate(o + p_output * c) * act(c)
        steps[t] = h
    return _sequence(steps, order, output_sequence), h, c
