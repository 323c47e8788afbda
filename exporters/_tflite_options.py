"""What TFLite alone can be told, and what integer inputs and outputs make of a program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from edgekd.errors import UsageError
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import retrace
from edgekd.protocols import Arrays, Options
from edgekd.types import Student

__all__ = ["TFLiteOptions"]

Edge = Literal["float32", "int8", "int16"]


class TFLiteOptions(Options):
    """``[export.tflite]``; see docs/tflite.md."""

    inference_input_type: Edge = Field(
        default="float32",
        description="Type of inputs: int8 in w8a8 and w4a8, int16 in w8a16, without a QUANTIZE before.",
    )
    inference_output_type: Edge = Field(
        default="float32", description="Type of outputs, as for inputs, without a DEQUANTIZE after."
    )
    batch: str = Field(
        default="1", description="Batch sizes that the file is for: 1, a list as 1,4,8, or a range as 1..8."
    )
    int4_convolutions: bool = Field(
        default=False, description="Store weights of convolutions in 4 bits too in w4a8: smaller, but without XNNPACK."
    )
    prefill: str = Field(
        default="",
        description="Tokens that each prefill signature of a language model reads, as 8,64; by default up to 128.",
    )
    signature: str = Field(
        default="serving_default", min_length=1, description="Name of the signature that an app calls."
    )

    def applied(self, student: Student, samples: Arrays) -> tuple[Student, Arrays]:
        """The program between its quantized edges, and the samples as it takes them.

        Raises:
            UsageError: An input or output is not quantized at once, or to another type.
        """
        if (self.inference_input_type, self.inference_output_type) == ("float32", "float32"):
            return student, samples
        from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the operators

        operators = torch.ops.quantized_decomposed
        program = student.program
        module = program.module(check_guards=False)
        samples, dtypes = dict(samples), {}
        if self.inference_input_type != "float32":
            places = [node for node in module.graph.nodes if node.op == "placeholder"]
            for spec, node in zip(input_specs(program), places, strict=True):
                if spec.dtype != "float32":
                    continue
                readers = list(node.users)
                steps = {user.args[1:] for user in readers if user.target is operators.quantize_per_tensor.default}
                if len(steps) != 1 or any(user.target is not operators.quantize_per_tensor.default for user in readers):
                    raise UsageError(_refusal("input", spec.name, self.inference_input_type, "not only quantized"))
                (step,) = steps
                dtypes[spec.name] = _checked("input", spec.name, self.inference_input_type, step[4])
                for user in readers:
                    user.replace_all_uses_with(node)
                    module.graph.erase_node(user)
                if spec.name in samples:
                    values = torch.from_numpy(np.ascontiguousarray(samples[spec.name], np.float32))
                    samples[spec.name] = operators.quantize_per_tensor.default(values, *step).numpy()
        if self.inference_output_type != "float32":
            output = next(node for node in module.graph.nodes if node.op == "output")
            for spec, node in zip(output_specs(program), list(output.all_input_nodes), strict=True):
                if spec.dtype != "float32":
                    continue
                if node.target is not operators.dequantize_per_tensor.default:
                    raise UsageError(_refusal("output", spec.name, self.inference_output_type, "computed in float"))
                _checked("output", spec.name, self.inference_output_type, node.args[5])
                output.replace_input_with(node, node.args[0])
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        changed = retrace(module, program, dtypes=dtypes)
        meanings = {spec.name: spec.meaning for spec in (*student.card.inputs, *student.card.outputs)}
        inputs, outputs = (
            tuple(replace(spec, meaning=meanings.get(spec.name, "")) for spec in specs)
            for specs in (input_specs(changed), output_specs(changed))
        )
        return Student(changed, replace(student.card, inputs=inputs, outputs=outputs)), samples


def _checked(what: str, name: str, asked: str, found: torch.dtype) -> torch.dtype:
    if str(found) != f"torch.{asked}":
        raise UsageError(_refusal(what, name, asked, f"quantized to {str(found).removeprefix('torch.')}"))
    return found


def _refusal(what: str, name: Any, asked: str, found: str) -> str:
    return (
        f"tflite inference_{what}_type={asked}: {what} {name!r} is {found}; int8 goes with w8a8 and w4a8, int16 with "
        "w8a16, where a layer reads or gives it"
    )
