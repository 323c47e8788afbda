"""A program to the bytes of a LiteRT model, by litert-torch.

These are the steps of ``litert_torch.convert``, taken one by one for three reasons: it would trace the program once
more, it calls inputs ``args_0`` and outputs ``output_0``, and it has no way to ask for ``strict_qdq_mode``, which
translates quantize and dequantize nodes one for one (the mode that it does offer turns float inputs and outputs into
int8, and quantizes operators that the program leaves in float). Tried with litert-torch 0.10.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from edgekd.errors import ExportError
from edgekd.quiet import quiet as silence
from edgekd.quiet import quiet_native

__all__ = ["Signature", "convert", "first_line", "quiet", "requantize"]


@dataclass(frozen=True)
class Signature:
    """A program under a name, which an app calls.

    Attributes:
        name: Of the signature.
        program: With every axis fixed. It is consumed: the converter rewrites its graph.
        inputs, outputs: Names in the signature, in the order of the program's.
    """

    name: str
    program: ExportedProgram
    inputs: Sequence[str]
    outputs: Sequence[str]


def convert(signatures: Sequence[Signature], *, keep_64_bit: bool) -> bytes:
    """The content of a ``.tflite`` file; weights that several signatures read are in it once.

    Args:
        signatures: The first one is what the file computes for those who ask for no signature.
        keep_64_bit: Keep 64-bit numbers; else they become 32-bit.

    Raises:
        ExportError: The converter refuses; the message names the operator.
    """
    with quiet():
        from litert_converter.mlir import passmanager
        from litert_converter.mlir._mlir_libs import converter_api_ext
        from litert_torch import backend, fx_infra
        from litert_torch._convert import core
        from litert_torch.backend import inline_consts

        _teach_layout()
        context = backend.export_utils.create_ir_context()
        plugins = [inline_consts.InlineConstsContext(enable_resource_constants=False)]
        lowered = []
        for signature in signatures:
            for node in signature.program.graph.nodes:
                # The converter makes tensor names out of this: without it they hold Python classes, and the same
                # program gives other bytes after it was saved and loaded.
                node.meta["nn_module_stack"] = {"": ("", node.name)}
            try:
                program = fx_infra.graph_utils.reset_from_node_meta(signature.program)
                table = fx_infra.decomp.pre_convert_decomp()
                program = core._run_convert_passes(fx_infra.safe_run_decompositions(program, table, can_skip=False))
                made = backend.export.exported_program_to_mlir(
                    program, ir_context=context, lowering_context_plugins=plugins
                )
            except Exception as error:
                raise ExportError(f"litert-torch cannot translate the program: {_reason(error, '')}") from error
            lowered.append(made.module)
        with quiet_native() as said:
            try:
                for module, signature in zip(lowered, signatures, strict=True):
                    converter_api_ext.set_signature(
                        module.operation,
                        signature_name=signature.name,
                        input_names=list(signature.inputs),
                        output_names=list(signature.outputs),
                    )
                module = converter_api_ext.merge_modules(lowered)
                config = converter_api_ext.ConvertToTFLConfig()
                config.model_origin_framework = "PYTORCH"
                config.strict_qdq_mode = True
                config.unsafe_fuse_dynamic_shaped_broadcast = True  # no shape is dynamic here
                config.canonicalizing_inf_as_min_max_float = False  # litert-torch did so already
                config.enable_x64 = keep_64_bit
                with context:
                    converter_api_ext.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
                content: bytes = converter_api_ext.export_flatbuffer_to_bytes(getattr(module, "operation", module))
            except Exception as error:
                raise ExportError(f"LiteRT's converter refuses the program: {_reason(error, said())}") from error
    return content


def _teach_layout() -> None:
    """Tell litert-torch how to pad with the channels last: it would transpose before and after each padding."""
    from litert_torch._convert.fx_passes.optimize_layout_transposes_pass import layout_rewrite

    operator = torch.ops.aten.constant_pad_nd.default
    if operator in layout_rewrite.rewriters:
        return

    @layout_rewrite.rewriters.register(operator)
    def pad_channels_last(node: Node) -> None:
        amounts = [*node.args[1], *[0] * 8][:8]  # pairs, the last axis first: W H C N
        node.update_arg(1, [*amounts[4:6], *amounts[0:4], *amounts[6:8]])


def requantize(content: bytes, precision: str) -> bytes:
    """A float model in ``fp16`` (weights stored in half) ``w8d8`` or ``w4d8`` (dynamic range), by ai-edge-quantizer.

    Raises:
        ExportError: The quantizer refuses.
    """
    with quiet():
        from ai_edge_quantizer import quantizer, recipe
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.qtyping import (
            ComputePrecision,
            OpQuantizationConfig,
            TensorDataType,
            TensorQuantizationConfig,
            TFLOperationName,
        )

        try:
            work = quantizer.Quantizer(bytearray(content))
            if precision == "fp16":
                half = TensorQuantizationConfig(num_bits=16, dtype=TensorDataType.FLOAT)
                work.update_quantization_recipe(
                    regex=".*",
                    operation_name=TFLOperationName.ALL_SUPPORTED,
                    op_config=OpQuantizationConfig(
                        weight_tensor_config=half, compute_precision=ComputePrecision.FLOAT, explicit_dequantize=True
                    ),
                    algorithm_key=AlgorithmName.FLOAT_CASTING,
                )
            elif precision == "w4d8":
                work.load_quantization_recipe(recipe.dynamic_wi4b32_afp32())
                for kind, scope in _without_blocks(content):
                    work.add_dynamic_config(f"^{re.escape(scope)}$", TFLOperationName(kind), num_bits=8)
            else:
                work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
            with quiet_native():
                return bytes(work.quantize().quantized_model)
        except Exception as error:
            raise ExportError(f"ai-edge-quantizer cannot write {precision}: {_reason(error, '')}") from error


BLOCK = 32
"""Numbers that share a scale in ``w4d8``."""


def _without_blocks(content: bytes) -> Iterator[tuple[str, str]]:
    """Linear layers and embeddings whose inputs do not come in whole blocks: operator, and the name that the quantizer
    has for it."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import get_op_scope

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    names = {schema.BuiltinOperator.FULLY_CONNECTED: "FULLY_CONNECTED"}
    names[schema.BuiltinOperator.EMBEDDING_LOOKUP] = "EMBEDDING_LOOKUP"
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            kind = names.get(max(code.builtinCode, code.deprecatedBuiltinCode))
            if kind is not None and graph.tensors[operator.inputs[1]].shape[-1] % BLOCK:
                yield kind, get_op_scope(operator, graph.tensors)


def _reason(error: Exception, said: str) -> str:
    """One line of what a converter says, with the operator in it."""
    text = f"{error}\n{said}"
    for pattern in (r"Lowering not found: (\S+)", r"error: (?:failed to legalize operation )?'([^']+)'"):
        found = re.search(pattern, text)
        if found:
            return f"operator {found.group(1)} is not supported"
    line = first_line(text) or type(error).__name__
    operator = _operator_in_work(error)
    return f"operator {operator}: {line}" if operator else line


def _operator_in_work(error: Exception) -> str:
    """The operator that was being translated when an error was raised, which the error itself often doesn't tell."""
    operator = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("node", "n"):
            node = frame.f_locals.get(name)
            if isinstance(node, Node) and node.op == "call_function":
                operator = str(node.target)
    return operator


def first_line(text: str) -> str:
    """The first line that tells of an error, else the first that tells anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")


@contextmanager
def quiet() -> Iterator[None]:
    """``edgekd.quiet``, litert-torch's progress lines off stdout, and what it says when it is imported off stderr."""
    with silence():
        with quiet_native():  # of oneDNN, on processors with AVX-512
            from litert_torch._config import config

        shown, config.show_progress = config.show_progress, False
        try:
            yield
        finally:
            config.show_progress = shown
