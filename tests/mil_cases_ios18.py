"""Cases of the operators that came with iOS 18 (see ``mil_cases.py``): attention, compressed weights, slices."""

from __future__ import annotations

from typing import Any

import numpy as np

from mil_cases import Array, C, case, normal
from mil_cases_nn import DENSE, KEPT, MASK, attention

__all__: list[str] = []

IOS18 = "iOS18"


def of(kind: str, values: Any) -> Array:
    """Values of coremltools' type of that name (``uint2``)."""
    from coremltools.converters.mil.mil import types

    result: Array = np.asarray(values).astype(types.nptype_from_builtin(types.string_to_builtin(kind)))
    return result


Q, K, V = normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 6)
FLOAT_MASK = normal(3, 5)
case(
    "scaled_dot_product_attention",
    [Q, K, V],
    lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
    attention(Q, K, V, 0.0),
    tolerance=1e-5,
    opset=IOS18,
)
case(
    "scaled_dot_product_attention_with_a_float_mask",
    [Q, K, V, FLOAT_MASK],
    lambda mb, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
    attention(Q, K, V, FLOAT_MASK),
    tolerance=1e-5,
    opset=IOS18,
)
case(
    "scaled_dot_product_attention_with_a_boolean_mask",
    [Q, K, V, FLOAT_MASK],
    lambda mb, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mb.greater(x=m, y=-0.5)),
    attention(Q, K, V, np.where(FLOAT_MASK > -0.5, 0.0, -1e30)),
    tolerance=1e-5,
    opset=IOS18,
)

UPDATE = normal(1, 2, 2, 3)
UPDATED = C.copy()
UPDATED[1:2, :2, 3:0:-2, ::2] = UPDATE
case(
    "slice_update",
    [C, UPDATE],
    lambda mb, x, u: mb.slice_update(
        x=x,
        update=u,
        begin=[1, 0, 3, 0],
        end=[2, 2, 0, 0],
        stride=[1, 1, -2, 2],
        begin_mask=[False, True, False, False],
        end_mask=[False, False, False, True],
    ),
    UPDATED,
    opset=IOS18,
)
SQUEEZED = C.copy()
SQUEEZED[1, :, -1, 2:4] = C[0, :, 0, :2]
case(
    "slice_update_of_one_place_of_an_axis",
    [C, C[0, :, 0, :2]],
    lambda mb, x, u: mb.slice_update(
        x=x,
        update=u,
        begin=[1, 0, -1, 2],
        end=[0, 0, 0, 4],
        end_mask=[False, True, False, False],
        squeeze_mask=[True, False, True, False],
    ),
    SQUEEZED,
    opset=IOS18,
)

DATA = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
BLOCK_SCALES = np.array([[0.5, 2.0], [1.0, 0.25]], np.float32)
SPREAD_SCALES = np.kron(BLOCK_SCALES, np.ones((2, 2))).astype(np.float32)
W44 = normal(1, 4, 4)
case(
    "constexpr_blockwise_shift_scale",
    [W44],
    lambda mb, x: mb.add(x=x, y=mb.constexpr_blockwise_shift_scale(data=of("int4", DATA), scale=BLOCK_SCALES)),
    W44 + DATA * SPREAD_SCALES,
    opset=IOS18,
)
case(
    "constexpr_blockwise_shift_scale_with_offset",
    [W44],
    lambda mb, x: mb.add(
        x=x,
        y=mb.constexpr_blockwise_shift_scale(data=DATA, scale=BLOCK_SCALES, offset=np.full((2, 2), -1, np.int8)),
    ),
    W44 + (DATA + 1.0) * SPREAD_SCALES,
    opset=IOS18,
)
# The two examples of Apple's description of constexpr_lut_to_dense.
ZERO = np.zeros(1, np.float32)
TWO_TABLES = np.array([[[[1], [5], [9], [13]]], [[[2], [10], [18], [26]]]], np.float32)
case(
    "constexpr_lut_to_dense_with_a_table_per_group",
    [ZERO],
    lambda mb, x: mb.add(
        x=x,
        y=mb.constexpr_lut_to_dense(
            indices=of("uint2", [[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]]), lut=TWO_TABLES
        ),
    ),
    np.array([[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]], np.float32),
    opset=IOS18,
)
VECTORS = np.array([[1, 2, 3], [-1, -2, -3]], np.float32).reshape(1, 1, 1, 2, 3)
case(
    "constexpr_lut_to_dense_of_vectors",
    [ZERO],
    lambda mb, x: mb.add(
        x=x,
        y=mb.constexpr_lut_to_dense(
            indices=of("uint1", [[[0, 0], [1, 0]], [[1, 1], [0, 0]]]), lut=VECTORS, vector_axis=np.int32(1)
        ),
    ),
    np.array(
        [
            [[1, 1], [2, 2], [3, 3], [-1, 1], [-2, 2], [-3, 3]],
            [[-1, -1], [-2, -2], [-3, -3], [1, 1], [2, 2], [3, 3]],
        ],
        np.float32,
    ),
    opset=IOS18,
)
case(
    "constexpr_sparse_to_dense_of_typed_bits",
    [ZERO],
    lambda mb, x: mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=KEPT, mask=of("uint1", MASK))),
    DENSE,
    opset=IOS18,
)
# Apple's examples of the sparse-to-sparse operators.
SPARSE_MASK = [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]]
LOOKED_UP = np.array([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 3], [0, 3, 2, 0, 2, 0], [0, 0, 0, 3, 0, 0]], np.float32)


def looked_up_where_kept(mb: Any, x: Any, table: Array, **options: Any) -> Any:
    mask, data = mb.constexpr_lut_to_sparse(
        indices_mask=of("uint1", SPARSE_MASK),
        indices_nonzero_data=of("uint1", [0, 1, 1, 0, 1, 1, 0, 0, 1]),
        lut=table,
        **options,
    )
    return mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask))


case(
    "constexpr_lut_to_sparse",
    [ZERO],
    lambda mb, x: looked_up_where_kept(mb, x, np.array([2, 3], np.float32).reshape(1, 1, 2, 1)),
    LOOKED_UP,
    opset=IOS18,
)
case(
    "constexpr_lut_to_sparse_of_vectors",
    [ZERO],
    lambda mb, x: looked_up_where_kept(
        mb, x, np.array([[2, 2], [3, 3]], np.float32).reshape(1, 1, 2, 2), vector_axis=np.int32(0)
    ),
    LOOKED_UP.repeat(2, 0),
    opset=IOS18,
)


def scaled_where_kept(mb: Any, x: Any) -> Any:
    mask, data = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=of("uint1", [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]]),
        nonzero_data=np.array([10, 11, 3, 4, 5, 6, 7, 8, 9], np.int8),
        scale=np.array([[0.1, 0.2, 0.3, 0.4]], np.float32),
        offset=np.array([[1, 2, 3, 4]], np.int8),
    )
    return mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask))


case(
    "constexpr_sparse_blockwise_shift_scale",
    [ZERO],
    scaled_where_kept,
    np.array([[0.9, 1.8, 0, 0], [0.2, 0.4, 0.6, 0], [0, 0, 0.9, 1.2], [0.7, 1.4, 0, 0]], np.float32),
    opset=IOS18,
)
