"""Weights in 4 bits, block by block, for ONNX Runtime's own MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgekd.errors import ExportError

from ._onnx_graph import add_constant, array_of, replace_node

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["multiply_instead_of_gemm", "quantize_blocks"]

BLOCK = 32
"""Numbers that share a scale. Larger blocks save little (a scale is 4 of 20 bytes) and lose more."""

_IN_FLOAT = 1  # MatMulNBits' accuracy level: float products; 4 would quantize activations too, and be another precision


def multiply_instead_of_gemm(graph: ir.Graph) -> int:
    """Turn Gemm with a constant weight into MatMul and Add: MatMulNBits takes the place of MatMul only.

    Returns:
        How many were turned.
    """
    turned = 0
    for node in [node for node in graph if node.op_type == "Gemm"]:
        weight, names = array_of(node.inputs[1]), node.attributes
        plain = all(names[name].value == 1 for name in ("alpha", "beta") if name in names)
        if weight is None or not plain or ("transA" in names and names["transA"].as_int()):
            continue
        if "transB" in names and names["transB"].as_int():
            weight = np.ascontiguousarray(weight.T)
        assert node.inputs[1] is not None
        product = ir.node("MatMul", [node.inputs[0], add_constant(graph, f"{node.inputs[1].name}_turned", weight)])
        product.outputs[0].name = f"{node.outputs[0].name}_product"
        graph.insert_before(node, product)
        result = product.outputs[0]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            total = ir.node("Add", [result, node.inputs[2]])
            total.outputs[0].name = f"{node.outputs[0].name}_sum"
            graph.insert_before(node, total)
            result = total.outputs[0]
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        replace_node(graph, node, result)
        turned += 1
    return turned


def quantize_blocks(model: ModelProto) -> ModelProto:
    """Constant sides of matrix products and tables that rows are gathered from, in 4 bits with a scale and zero point
    for each :data:`BLOCK` numbers along the input axis.

    Raises:
        ExportError: The model has none.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tables = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    gathers = [node for node in model.graph.node if node.op_type == "Gather"]
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=4,
        block_size=BLOCK,
        is_symmetric=False,
        accuracy_level=_IN_FLOAT,
        op_types_to_quantize=("MatMul", "Gather"),
        nodes_to_exclude=[node.name for node in gathers if node.input[0] not in tables],  # turns of positions
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    quantizer.process()
    quantized: ModelProto = quantizer.model.model
    if not any(node.op_type in ("MatMulNBits", "GatherBlockQuantized") for node in quantized.graph.node):
        raise ExportError(
            "w4 quantizes matrix products and embeddings, and this model has none with constant weights; "
            "take w8 or w8a8, which quantize convolutions too"
        )
    return quantized
