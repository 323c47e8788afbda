"""More cases for the MIL evaluator (see ``mil_cases.py``): recurrence, loops, lists, scattering, images.

Recurrence and sampling are held against PyTorch's own layers, which the evaluator does not use; what is written at
indices against NumPy's ``ufunc.at``; the rest against loops, or against numbers that Apple publishes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from mil_cases import Array, C, X, case, interpolated, normal, positive
from mil_cases_nn import W2, X2, convolve, spread

__all__: list[str] = []


def ints(*values: Any) -> Array:
    return np.array(values, np.int32)


# Convolution with weights that are computed, and the paddings of its transpose ---------------------------------------

case(
    "conv_with_a_computed_weight",
    [X2, W2],
    lambda mb, x, w: mb.conv(x=x, weight=mb.mul(x=w, y=2.0), pad_type="same"),
    convolve(X2, 2 * W2, None, [1, 1], [(1, 1), (1, 1)], [1, 1], 1),
    tolerance=2e-5,
)
WS = normal(4, 2, 3, 4)
SPREAD = spread(X2, WS, [2, 2], [1, 1], 1)  # (15, 14); twice the input is (14, 12)
case(
    "conv_transpose_same",
    [X2],
    lambda mb, x: mb.conv_transpose(x=x, weight=WS, strides=[2, 2], pad_type="same"),
    SPREAD[:, :, :14, 1:13],
    tolerance=1e-5,
)
WN = normal(4, 2, 1, 2)
case(
    "conv_transpose_same_with_a_narrow_kernel",
    [X2],
    lambda mb, x: mb.conv_transpose(x=x, weight=WN, strides=[2, 2], pad_type="same"),
    np.pad(spread(X2, WN, [2, 2], [1, 1], 1), ((0, 0), (0, 0), (0, 1), (0, 0))),
    tolerance=1e-5,
)
WT3 = normal(2, 2, 2, 2, 2)
X3 = normal(1, 2, 2, 3, 2)
case(
    "conv_transpose_3d",
    [X3],
    lambda mb, x: mb.conv_transpose(x=x, weight=WT3, strides=[1, 2, 1]),
    spread(X3, WT3, [1, 2, 1], [1, 1, 1], 1),
    tolerance=1e-5,
)


# Recurrence ---------------------------------------------------------------------------------------------------------

STEPS, H0, C0 = normal(5, 2, 3), normal(2, 4), normal(2, 4)


def torch_layer(layer: nn.Module, *states: Array, backwards: bool = False) -> list[Array]:
    """What PyTorch's layer makes of the steps; its states get an axis for the layer."""
    x = torch.from_numpy(STEPS[::-1].copy() if backwards else STEPS)
    given = [torch.from_numpy(state).unsqueeze(0) for state in states]
    with torch.no_grad():
        sequence, last = layer(x, given[0] if len(given) == 1 else tuple(given))
    ends = list(last) if isinstance(last, tuple) else [last]
    whole = sequence.flip(0) if backwards else sequence
    return [whole.numpy(), *(end[0].numpy() for end in ends)]


def weights(layer: Any, suffix: str = "", order: tuple[int, ...] = (0,)) -> dict[str, Array]:
    """A layer's weights in MIL's order of gates, both biases added."""

    def ordered(tensor: torch.Tensor) -> Array:
        parts = tensor.detach().chunk(len(order))
        return torch.cat([parts[i] for i in order]).numpy()

    both = getattr(layer, f"bias_ih_l0{suffix}") + getattr(layer, f"bias_hh_l0{suffix}")
    return {
        "weight_ih": ordered(getattr(layer, f"weight_ih_l0{suffix}")),
        "weight_hh": ordered(getattr(layer, f"weight_hh_l0{suffix}")),
        "bias": ordered(both),
    }


torch.manual_seed(0)
RNN, RELU_RNN, LSTM = nn.RNN(3, 4), nn.RNN(3, 4, nonlinearity="relu"), nn.LSTM(3, 4)
BOTH = nn.LSTM(3, 4, bidirectional=True)
case(
    "rnn",
    [STEPS, H0],
    lambda mb, x, h: mb.rnn(x=x, initial_h=h, output_sequence=True, **weights(RNN)),
    *torch_layer(RNN, H0),
)
case(
    "rnn_backwards_with_relu",
    [STEPS, H0],
    lambda mb, x, h: mb.rnn(x=x, initial_h=h, direction="reverse", activation="relu", **weights(RELU_RNN)),
    torch_layer(RELU_RNN, H0, backwards=True)[0][:1],  # the step that is computed last is the first
    torch_layer(RELU_RNN, H0, backwards=True)[1],
)
IFOZ = (0, 1, 3, 2)  # PyTorch has the cell before the output gate
case(
    "lstm",
    [STEPS, H0, C0],
    lambda mb, x, h, c: mb.lstm(x=x, initial_h=h, initial_c=c, output_sequence=True, **weights(LSTM, order=IFOZ)),
    *torch_layer(LSTM, H0, C0),
)
case(
    "lstm_backwards",
    [STEPS, H0, C0],
    lambda mb, x, h, c: mb.lstm(x=x, initial_h=h, initial_c=c, direction="reverse", **weights(LSTM, order=IFOZ)),
    torch_layer(LSTM, H0, C0, backwards=True)[0][:1],
    *torch_layer(LSTM, H0, C0, backwards=True)[1:],
)
H2, C2 = normal(2, 8), normal(2, 8)


def both_ways() -> list[Array]:
    states = [torch.from_numpy(np.stack([s[:, :4], s[:, 4:]])) for s in (H2, C2)]
    with torch.no_grad():
        sequence, ends = BOTH(torch.from_numpy(STEPS), tuple(states))
    return [sequence.numpy(), *(torch.cat([end[0], end[1]], -1).numpy() for end in ends)]


case(
    "lstm_both_ways",
    [STEPS, H2, C2],
    lambda mb, x, h, c: mb.lstm(
        x=x,
        initial_h=h,
        initial_c=c,
        direction="bidirectional",
        output_sequence=True,
        **weights(BOTH, order=IFOZ),
        **{f"{key}_back": value for key, value in weights(BOTH, "_reverse", IFOZ).items()},
    ),
    *both_ways(),
)


def sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


WI, WH, WB, PEEP = normal(16, 3), normal(16, 4), normal(16), normal(12)


def peephole_lstm() -> list[Array]:
    """Apple's description: the input and forget gates look at the cell before, the output gate at the new one."""
    h, c, sequence = H0, C0, []
    for x in STEPS:
        i, f, o, z = np.split(x @ WI.T + h @ WH.T + WB, 4, -1)
        before = c
        c = sigmoid(f + PEEP[4:8] * before) * before + sigmoid(i + PEEP[:4] * before) * np.tanh(z)
        h = sigmoid(o + PEEP[8:] * c) * np.tanh(c)
        sequence.append(h)
    return [np.stack(sequence), h, c]


case(
    "lstm_with_peepholes",
    [STEPS, H0, C0],
    lambda mb, x, h, c: mb.lstm(
        x=x, initial_h=h, initial_c=c, weight_ih=WI, weight_hh=WH, bias=WB, peephole=PEEP, output_sequence=True
    ),
    *peephole_lstm(),
    tolerance=1e-5,
)
GI, GH, GB = normal(12, 3), normal(12, 4), normal(12)


def core_ml_gru(steps: Array) -> tuple[list[Array], Array]:
    """Not PyTorch's: one bias, outside of the reset gate; gates in the order reset, output, update."""
    h, sequence = H0, []
    for x in steps:
        ri, oi, zi = np.split(x @ GI.T + GB, 3, -1)
        rh, oh, zh = np.split(h @ GH.T, 3, -1)
        r, z = sigmoid(ri + rh), sigmoid(zi + zh)
        h = (1 - z) * np.tanh(oi + r * oh) + z * h
        sequence.append(h)
    return sequence, h


case(
    "gru",
    [STEPS, H0],
    lambda mb, x, h: mb.gru(x=x, initial_h=h, weight_ih=GI, weight_hh=GH, bias=GB, output_sequence=True),
    np.stack(core_ml_gru(STEPS)[0]),
    core_ml_gru(STEPS)[1],
    tolerance=1e-5,
)
case(
    "gru_backwards",
    [STEPS, H0],
    lambda mb, x, h: mb.gru(
        x=x, initial_h=h, weight_ih=GI, weight_hh=GH, bias=GB, output_sequence=True, direction="reverse"
    ),
    np.stack(core_ml_gru(STEPS[::-1])[0][::-1]),
    core_ml_gru(STEPS[::-1])[1],
    tolerance=1e-5,
)
GRU, RNZ = nn.GRU(3, 4), (0, 2, 1)  # PyTorch has the update before the new gate


def gru_weights() -> dict[str, Array]:
    both = weights(GRU, order=RNZ)
    parts = [GRU.bias_hh_l0.detach().numpy().reshape(3, 4), GRU.bias_ih_l0.detach().numpy().reshape(3, 4)]
    return {**both, "bias": parts[0][[0, 2, 1]].reshape(-1), "input_bias": parts[1][[0, 2, 1]].reshape(-1)}


case(
    "gru_of_pytorch",
    [STEPS, H0],
    lambda mb, x, h: mb.gru(x=x, initial_h=h, output_sequence=True, reset_after=True, **gru_weights()),
    *torch_layer(GRU, H0),
    opset="iOS18",
)


# Conditions, loops, lists -------------------------------------------------------------------------------------------

for _sign, _wanted in ((1.0, X + 1), (-1.0, X * 2)):
    case(
        f"cond_{'true' if _sign > 0 else 'false'}",
        [X, np.array([_sign], np.float32)],
        lambda mb, x, s: mb.cond(
            pred=mb.squeeze(x=mb.greater(x=s, y=0.0)),
            _true_fn=lambda: mb.add(x=x, y=1.0),
            _false_fn=lambda: mb.mul(x=x, y=2.0),
        ),
        _wanted.astype(np.float32),
    )
case(
    "while_loop",
    [np.ones((2, 3), np.float32), ints(5)],
    lambda mb, x, n: mb.while_loop(
        _cond=lambda i, total: mb.less(x=i, y=mb.squeeze(x=n)),
        _body=lambda i, total: (mb.add(x=i, y=1), mb.add(x=total, y=mb.mul(x=total, y=x))),
        loop_vars=(0, x),
    ),
    np.array(5, np.int32),
    np.full((2, 3), 32.0, np.float32),
)
case(
    "while_loop_that_never_runs",
    [np.ones((2, 3), np.float32), ints(0)],
    lambda mb, x, n: mb.while_loop(
        _cond=lambda i, total: mb.less(x=i, y=mb.squeeze(x=n)),
        _body=lambda i, total: (mb.add(x=i, y=1), mb.add(x=total, y=x)),
        loop_vars=(0, x),
    )[1],
    np.ones((2, 3), np.float32),
)
ROWS = normal(4, 3)


def reversed_rows(mb: Any, x: Any) -> Any:
    """The rows of x in a list, written backwards in a loop, and read in order."""
    rows = mb.make_list(init_length=4, elem_shape=(3,), dtype="fp32")

    def body(i: Any, ls: Any) -> tuple[Any, Any]:
        row = mb.gather(x=x, indices=i, axis=0)
        return mb.add(x=i, y=1), mb.list_write(ls=ls, index=mb.sub(x=3, y=i), value=row)

    _, rows = mb.while_loop(_cond=lambda i, ls: mb.less(x=i, y=4), _body=body, loop_vars=(0, rows))
    return (
        mb.list_gather(ls=rows, indices=[0, 1, 2, 3]),
        mb.list_read(ls=rows, index=2),
        mb.list_length(ls=rows),
    )


case("make_list_and_write_in_a_loop", [ROWS], reversed_rows, ROWS[::-1], ROWS[1], np.array(4, np.int32))
case(
    "list_scatter",
    [ROWS],
    lambda mb, x: mb.list_gather(
        ls=mb.list_scatter(ls=mb.make_list(init_length=4, elem_shape=(3,)), indices=[2, 0, 3, 1], value=x),
        indices=[0, 1, 2, 3],
    ),
    ROWS[[1, 3, 0, 2]],
)


# Writing at indices -------------------------------------------------------------------------------------------------

_MODES: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
}  # fmt: skip
D34, U24, U34, U2 = positive(3, 4), positive(2, 4), positive(3, 2), positive(2)
ROWS20, PAIRS, ALONG32 = ints(2, 0), ints([0, 1], [2, 3]), ints([0, 3], [1, 2], [3, 0])


def written(data: Array, where: Any, updates: Array, ufunc: Any) -> Array:
    result = data.copy()
    if ufunc is None:
        result[where] = updates
    else:
        ufunc.at(result, where, updates)
    return result


for _mode, _ufunc in {**_MODES, "update": None}.items():
    case(
        f"scatter_{_mode}",
        [D34, ROWS20, U24],
        lambda mb, d, i, u, mode=_mode: mb.scatter(data=d, indices=i, updates=u, axis=0, mode=mode),
        written(D34, ROWS20, U24, _ufunc),
    )
    case(
        f"scatter_nd_{_mode}",
        [D34, PAIRS, U2],
        lambda mb, d, i, u, mode=_mode: mb.scatter_nd(data=d, indices=i, updates=u, mode=mode),
        written(D34, (PAIRS[:, 0], PAIRS[:, 1]), U2, _ufunc),
    )
    case(
        f"scatter_along_axis_{_mode}",
        [D34, ALONG32, U34],
        lambda mb, d, i, u, mode=_mode: mb.scatter_along_axis(data=d, indices=i, updates=u, axis=-1, mode=mode),
        written(D34, (np.arange(3)[:, None], ALONG32), U34, _ufunc),
    )
case(
    "scatter_add_twice_to_one_place",
    [D34, ints(1, 1)],
    lambda mb, d, i: mb.scatter(data=d, indices=i, updates=U34, axis=1, mode="add"),
    written(D34.T.copy(), ints(1, 1), U34.T, np.add).T,
)
case(
    "scatter_nd_of_rows_of_integers",
    [ints([1, 2], [3, 4], [5, 6]), ints([2], [0])],
    lambda mb, d, i: mb.scatter_nd(data=d, indices=i, updates=ints([9, 9], [8, 8]), mode="update"),
    ints([8, 8], [3, 4], [9, 9]),
)
case(
    "scatter_counts_negative_indices_from_the_end_before_ios17",
    [D34, ints(-1, 0), U24],
    lambda mb, d, i, u: mb.scatter(data=d, indices=i, updates=u, axis=0, mode="add"),
    written(D34, ints(2, 0), U24, np.add),
    opset="iOS16",
)
case(
    "non_zero",
    [ints([0, 3, 0], [-1, 0, 2])],
    lambda mb, x: mb.non_zero(x=x),
    ints([0, 1], [1, 0], [1, 2]),
)
case(
    "reverse_sequence",
    [C[:, 0], ints(3, 1)],
    lambda mb, x, n: mb.reverse_sequence(x=x, lengths=n, seq_axis=1, batch_axis=0),
    np.stack([C[0, 0][[2, 1, 0, 3]], C[1, 0]]),
)
case(
    "sliding_windows",
    [X],
    lambda mb, x: mb.sliding_windows(x=x, axis=-1, size=2, stride=2),
    np.stack([X[..., :2], X[..., 2:]], 2),
)
case(
    "reshape_like",
    [X.reshape(2, 3, 2, 2), normal(2, 3, 4), normal(1, 4)],
    lambda mb, x, a, b: mb.reshape_like(x=x, ref_tensors=(a, b), begins=(0, 1), ends=(2, 0), end_masks=(False, True)),
    X,
)
case("slice_by_index_of_nothing", [X], lambda mb, x: mb.slice_by_index(x=x, begin=[0, 2, 0], end=[2, 2, 4]), X[:, 2:2])

S8 = np.arange(1, 17, dtype=np.float32).reshape(1, 8, 1, 2)
case(
    "depth_to_space",  # the example of Apple's description
    [S8],
    lambda mb, x: mb.depth_to_space(x=x, block_size=2),
    np.array([[[1, 5, 2, 6], [9, 13, 10, 14]], [[3, 7, 4, 8], [11, 15, 12, 16]]], np.float32)[None],
)
case(
    "space_to_depth",
    [np.array([[[1, 5, 2, 6], [9, 13, 10, 14]], [[3, 7, 4, 8], [11, 15, 12, 16]]], np.float32)[None]],
    lambda mb, x: mb.space_to_depth(x=x, block_size=2),
    S8,
)
SB = normal(2, 3, 3, 4)
SB_PADDED = np.pad(SB, ((0, 0), (0, 0), (1, 0), (0, 2)))
SB_OUT = np.concatenate([SB_PADDED[:, :, i::2, j::3] for i in range(2) for j in range(3)])
case(
    "space_to_batch",
    [SB],
    lambda mb, x: mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[1, 0], [0, 2]]),
    SB_OUT,
)
case(
    "batch_to_space",
    [SB_OUT],
    lambda mb, x: mb.batch_to_space(x=x, block_shape=[2, 3], crops=[[1, 0], [0, 2]]),
    SB,
)


# Images -------------------------------------------------------------------------------------------------------------

# Apple's own examples of the grid, Xin = 2 and the values 0 and 1, from the description of resize_bilinear.
GRIDS: dict[str, dict[int, list[float]]] = {
    "UNALIGN_CORNERS": {5: [0, 0.1, 0.5, 0.9, 1], 6: [0, 0, 1 / 3, 2 / 3, 1, 1]},
    "STRICT_ALIGN_CORNERS": {5: [0, 0.25, 0.5, 0.75, 1], 6: [0, 0.2, 0.4, 0.6, 0.8, 1]},
    "ALIGN_CORNERS": {5: [0, 0.25, 0.5, 0.75, 1], 6: [0, 0.2, 0.4, 0.6, 0.8, 1], 1: [0.5]},
    "DEFAULT": {5: [0, 0.4, 0.8, 1, 1], 6: [0, 1 / 3, 2 / 3, 1, 1, 1]},
    "OFFSET_CORNERS": {5: [0.1, 0.3, 0.5, 0.7, 0.9], 6: [1 / 12, 0.25, 5 / 12, 7 / 12, 0.75, 11 / 12]},
}
TWO = np.array([0, 1], np.float32).reshape(1, 1, 1, 2)
for _grid, _sizes in GRIDS.items():
    for _size, _points in _sizes.items():
        _line = np.array(_points, np.float32).reshape(1, 1, 1, -1)
        case(
            f"resize_bilinear_{_grid}_{_size}",
            [TWO],
            lambda mb, x, mode=_grid, n=_size: mb.resize_bilinear(
                x=x, target_size_height=1, target_size_width=n, sampling_mode=mode
            ),
            _line,
        )
        case(
            f"resize_{_grid}_{_size}",
            [TWO],
            lambda mb, x, mode=_grid, n=_size: mb.resize(
                x=x, shape=[0, n], resized_dims=np.uint32(2), sampling_mode=mode
            ),
            _line,
        )
case(
    "resize_one_of_the_last_axes_to_a_computed_size",
    [C, ints(3, 8)],
    lambda mb, x, n: mb.resize(x=x, shape=n, resized_dims=np.uint32(1), sampling_mode="STRICT_ALIGN_CORNERS"),
    interpolated(C, 3, [i * 4 / 7 for i in range(8)]),
)
case(
    "resize_to_the_nearest_pixel",  # Apple's test of coremltools: the second of three lies nearer to the last
    [np.array([-6.174, 9.371], np.float32).reshape(1, 1, 2, 1)],
    lambda mb, x: mb.resize(x=x, shape=[1, 1, 3, 2], resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"),
    np.array([[-6.174, -6.174], [9.371, 9.371], [9.371, 9.371]], np.float32)[None, None],
)
case(
    "resize_nearest_neighbor",
    [C],
    lambda mb, x: mb.resize_nearest_neighbor(x=x, target_size_height=6, target_size_width=3),
    C[:, :, [0, 0, 1, 2, 2, 3]][..., [0, 1, 3]],
)
SIXTEEN = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
BOXES = np.array([[0.1, 0.3, 1.3, 1.0], [0.5, 1.8, 1.0, 0.3], [0.0, 0.4, 0.6, 0.7]], np.float32)
CROPS = np.array([3.1, 5.2, 10, 10, 10, 7.9, 10, 13.9, 2.2, 3.1, 9.4, 10.3], np.float32)
case(
    "crop_resize",  # numbers of Core ML, from Apple's test of coremltools
    [SIXTEEN],
    lambda mb, x: mb.crop_resize(
        x=x, boxes=BOXES, box_indices=ints(0, 0, 0), target_height=2, target_width=2, normalized_coordinates=True,
        sampling_mode="ALIGN_CORNERS", pad_value=10.0,
    ),
    CROPS.reshape(3, 1, 2, 2),
    tolerance=1e-5,
)  # fmt: skip
case(
    "crop_resize_with_the_image_in_front_before_ios17",
    [SIXTEEN],
    lambda mb, x: mb.crop_resize(
        x=x, roi=np.pad(BOXES, ((0, 0), (1, 0))).reshape(3, 1, 5, 1, 1), target_height=2, target_width=2,
        normalized_coordinates=True, sampling_mode="ALIGN_CORNERS", pad_value=10.0,
    ),
    CROPS.reshape(3, 1, 1, 2, 2),
    tolerance=1e-5,
    opset="iOS16",
)  # fmt: skip
_CENTERED = np.array([1.5, 1.5, 1, 1], np.float32).reshape(1, 1, 4, 1, 1)
case(
    "crop_resize_of_every_image_before_ios17",
    [np.concatenate([SIXTEEN, SIXTEEN + 100])],
    lambda mb, x: mb.crop_resize(
        x=x, roi=_CENTERED, target_height=2, target_width=1, box_coordinate_mode="CENTER_SIZE_WIDTH_FIRST",
        sampling_mode="ALIGN_CORNERS",
    ),
    np.array([6.5, 10.5, 106.5, 110.5], np.float32).reshape(1, 2, 1, 2, 1),
    opset="iOS16",
)  # fmt: skip

IMAGE, GRID = normal(2, 3, 4, 5), (1.5 * normal(2, 6, 3, 2)).astype(np.float32)
for _mode in ("bilinear", "nearest"):
    for _theirs, _ours, _corners in (
        ("zeros", "constant", True),
        ("zeros", "constant", False),
        ("border", "border", True),
        ("reflection", "reflection", True),
        ("reflection", "symmetric", False),
    ):
        case(
            f"resample_{_mode}_{_ours}_{_corners}",
            [IMAGE, GRID],
            lambda mb, x, g, mode=_mode, padding=_ours, corners=_corners: mb.resample(
                x=x, coordinates=g, sampling_mode=mode, padding_mode=padding, padding_value=0.0,
                coordinates_mode="normalized_minus_one_to_one", align_corners=corners,
            ),
            nn.functional.grid_sample(
                torch.from_numpy(IMAGE), torch.from_numpy(GRID), _mode, _theirs, align_corners=_corners
            ).numpy(),
            tolerance=1e-5,
        )  # fmt: skip
case(
    "resample_at_pixels_with_a_padding_value",
    [IMAGE],
    lambda mb, x: mb.resample(
        x=x, coordinates=np.broadcast_to(ints([[1, 2], [4, 3], [5, 0]]), (2, 1, 3, 2)).copy(), sampling_mode="nearest",
        padding_mode="constant", padding_value=-7.0, coordinates_mode="unnormalized", align_corners=True,
    ),
    np.stack([IMAGE[:, :, 2, 1], IMAGE[:, :, 3, 4], np.full((2, 3), -7, np.float32)], -1)[:, :, None],
)  # fmt: skip
THETA = normal(2, 2, 3)
case(
    "affine",
    [IMAGE, THETA.reshape(2, 6)],
    lambda mb, x, t: mb.affine(
        x=x, transform_matrix=t, output_height=3, output_width=6, sampling_mode="bilinear", padding_mode="constant",
        padding_value=0.0, coordinates_mode="normalized_minus_one_to_one", align_corners=True,
    ),
    nn.functional.grid_sample(
        torch.from_numpy(IMAGE),
        nn.functional.affine_grid(torch.from_numpy(THETA), [2, 3, 3, 6], align_corners=True),
        align_corners=True,
    ).numpy(),
    tolerance=1e-5,
)  # fmt: skip

# Four boxes of 2 x 2: the second shifted by half (IoU 1/3), the third far away, the fourth on the first (IoU 1).
NMS_BOXES = np.array([[[0, 0, 2, 2], [1, 0, 2, 2], [9, 9, 2, 2], [0, 0, 2, 2]]], np.float32)
NMS_SCORES = np.array([[[0.9, 0.1], [0.2, 0.8], [0.3, 0.1], [0.1, 0.7]]], np.float32)


def suppressed(kept: list[int], most: int) -> list[Array]:
    """Boxes, scores and indices of those that stay, padded."""
    boxes, scores = np.zeros((1, most, 4), np.float32), np.zeros((1, most, 2), np.float32)
    boxes[0, : len(kept)], scores[0, : len(kept)] = NMS_BOXES[0, kept], NMS_SCORES[0, kept]
    return [boxes, scores, np.array([kept + [-1] * (most - len(kept))], np.int32)]


_NMS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "loose": ({"iou_threshold": 0.5, "score_threshold": 0.0}, [0, 1, 2]),
    "tight": ({"iou_threshold": 0.3, "score_threshold": 0.0}, [0, 2]),
    "by_score": ({"iou_threshold": 0.5, "score_threshold": 0.5}, [0, 1]),
    "by_class": ({"iou_threshold": 0.3, "score_threshold": 0.0, "per_class_suppression": True}, [0, 1, 2]),
}
for _name, (_options, _kept) in _NMS.items():
    case(
        f"non_maximum_suppression_{_name}",
        [NMS_BOXES, NMS_SCORES],
        lambda mb, b, s, options=_options: mb.non_maximum_suppression(boxes=b, scores=s, max_boxes=3, **options),
        *suppressed(_kept, 3),
        np.array([len(_kept)], np.int32),
        opset="iOS16",
    )
_LOOSE = suppressed([0, 1, 2], 5)
case(
    "non_maximum_suppression_with_the_boxes_last",
    [NMS_BOXES.transpose(0, 2, 1), NMS_SCORES.transpose(0, 2, 1)],
    lambda mb, b, s: mb.non_maximum_suppression(boxes=b, scores=s, max_boxes=5, iou_threshold=0.5),
    _LOOSE[0].transpose(0, 2, 1),
    _LOOSE[1].transpose(0, 2, 1),
    _LOOSE[2],
)
