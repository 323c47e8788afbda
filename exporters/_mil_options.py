"""What Core ML alone can be told, and what that makes of a program: pixels in, probabilities out, several shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field
from torch.export import ExportedProgram

from edgekd.errors import UsageError
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import retrace
from edgekd.protocols import Arrays, Options
from edgekd.types import LOGITS, Student, TensorSpec

__all__ = ["SYSTEMS", "CoreMLOptions", "Pixels", "pixels", "probabilities"]

SYSTEMS = ("iOS15", "iOS16", "iOS17", "iOS18")
"""Deployment targets, oldest first."""


class CoreMLOptions(Options):
    """``[export.coreml]``; see docs/coreml.md."""

    minimum_deployment_target: Literal["iOS15", "iOS16", "iOS17", "iOS18"] = Field(
        default="iOS17", description="Oldest system that the package is for; macOS 12, 13, 14 and 15 came with them."
    )
    half: bool = Field(
        default=False, description="Compute in half precision where weights are compressed, as the Neural Engine does."
    )
    image: bool = Field(
        default=False,
        description="Take images (CVPixelBuffer) and do scale, mean and std of the preprocessing in the package.",
    )
    classifier: bool = Field(
        default=False, description="Give the label and the probabilities of all labels instead of logits."
    )
    batch: str = Field(
        default="1", description="Batch sizes that the package takes: 1, a list as 1,4,8, or a range as 1..8."
    )
    length: str = Field(
        default="", description="Sizes of a second open axis (a sequence): a list or a range as for batch."
    )
    sparse: bool = Field(
        default=False, description="Store weights with enough zeros without them, with palettes and int8 too."
    )
    group_size: int = Field(
        default=16, ge=0, description="Channels that share a palette on iOS 18; 0 is one palette for each weight."
    )
    block_size: int = Field(default=32, ge=1, description="Numbers that share a scale in w4.")

    def applied(self, student: Student, samples: Arrays) -> tuple[Student, Arrays]:
        """The program that the package must compute, and the samples as it takes them.

        Raises:
            UsageError: The student's card does not have what an option needs.
        """
        if self.classifier:
            student = _with_probabilities(student)
        if not self.image:
            return student, samples
        found = pixels(student)
        raw = {name: found.of(array) if name == found.name else array for name, array in samples.items()}
        return _with_pixels(student, found), raw


@dataclass(frozen=True)
class Pixels:
    """How an image becomes an input: value = (pixel · scale − mean) / std, channel by channel.

    Attributes:
        name: Of the input, (batch, channels, height, width).
        layout: ``RGB``, ``BGR`` or ``GRAYSCALE``.
        scale: Of a pixel of 0 to 255.
        mean, std: One number for each channel.
    """

    name: str
    layout: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of(self, values: np.ndarray) -> np.ndarray:
        """The pixels that inputs came from, float32; no whole numbers where the inputs are not from pixels."""
        mean, std = (np.array(v, np.float64).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        raw: np.ndarray = ((values * std + mean) / self.scale).astype(np.float32)
        return raw


def pixels(student: Student) -> Pixels:
    """What the card says of the student's image.

    Raises:
        UsageError: There is not one image among the inputs, or the card does not say how it is prepared.
    """
    specs = [s for s in student.card.inputs if s.dtype == "float32" and len(s.shape) == 4 and s.shape[1] in (1, 3)]
    if len(specs) != 1:
        shapes = ", ".join(f"{s.name} {s.shape}" for s in student.card.inputs)
        raise UsageError(f"coreml image=true takes one float32 input (batch, 1 or 3, height, width); there is {shapes}")
    spec, told = specs[0], student.card.preprocessing
    channels = spec.shape[1]
    # edgekd's names, or those of a Hugging Face preprocessor_config.json.
    scale = told.get("scale", told.get("rescale_factor"))
    mean, std = (_per_channel(told.get(key, told.get(f"image_{key}")), channels) for key in ("mean", "std"))
    if scale is None or mean is None or std is None:
        raise UsageError(
            f"coreml image=true takes scale, mean and std (one or {channels} numbers) from the card's preprocessing; "
            f"it has {', '.join(told) or 'nothing'}"
        )
    layout = "GRAYSCALE" if channels == 1 else str(told.get("channels", "RGB")).upper()
    if layout not in ("GRAYSCALE", "RGB", "BGR"):
        raise UsageError(f"coreml image=true knows the channels RGB and BGR; the card's preprocessing has {layout!r}")
    return Pixels(spec.name, layout, float(scale), mean, std)


def _per_channel(value: Any, channels: int) -> tuple[float, ...] | None:
    numbers = [value] if isinstance(value, int | float) else value
    if not isinstance(numbers, list | tuple) or len(numbers) not in (1, channels):
        return None
    return tuple(float(number) for number in numbers) * (channels // len(numbers))


def probabilities(student: Student) -> TensorSpec:
    """The output that holds one number for each label.

    Raises:
        UsageError: There is none, or the card has no labels.
    """
    labels, outputs = student.card.labels, student.card.outputs
    marked = [s for s in outputs if s.meaning in (LOGITS, _PROBABILITIES)] or list(outputs)
    if not labels:
        raise UsageError("coreml classifier=true takes the labels from the card; it has none")
    if len(marked) != 1 or marked[0].shape[1:] != (len(labels),):
        shapes = ", ".join(f"{s.name} {s.shape}" for s in outputs)
        raise UsageError(f"coreml classifier=true takes one output (batch, {len(labels)}) of logits; there is {shapes}")
    return marked[0]


_PROBABILITIES = "probabilities"


def _with_probabilities(student: Student) -> Student:
    """Softmax in the graph, so that what Core ML calls a probability is one."""
    import torch

    logits = probabilities(student)
    if logits.meaning == _PROBABILITIES:
        return student
    names = [spec.name for spec in output_specs(student.program)]

    def change(module: torch.fx.GraphModule) -> None:
        output = next(node for node in module.graph.nodes if node.op == "output")
        value = _flat(output.args[0])[names.index(logits.name)]
        with module.graph.inserting_before(output):
            softmax = module.graph.call_function(torch.ops.aten.softmax.int, (value, -1))
        output.args = (_replaced(output.args[0], value, softmax),)

    program = _rewritten(student.program, change)
    outputs = tuple(replace(s, meaning=_PROBABILITIES) if s.name == logits.name else s for s in student.card.outputs)
    return Student(program, replace(student.card, outputs=outputs))


def _with_pixels(student: Student, found: Pixels) -> Student:
    """The preprocessing in front, exact for every channel: an image input of Core ML has one scale for all."""
    import torch

    shape = (1, -1, 1, 1)
    scale = torch.tensor([found.scale / std for std in found.std], dtype=torch.float64).float().reshape(shape)
    bias = torch.tensor([-m / s for m, s in zip(found.mean, found.std, strict=True)]).reshape(shape)

    def change(module: torch.fx.GraphModule) -> None:
        specs = input_specs(student.program)
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        image = places[[spec.name for spec in specs].index(found.name)]
        for name, constant in (("pixel_scale", scale), ("pixel_bias", bias)):
            module.register_buffer(name, constant)
        with module.graph.inserting_after(places[-1]):
            first = module.graph.get_attr("pixel_scale")
        with module.graph.inserting_after(first):
            second = module.graph.get_attr("pixel_bias")
        with module.graph.inserting_after(second):
            scaled = module.graph.call_function(torch.ops.aten.mul.Tensor, (image, first))
        with module.graph.inserting_after(scaled):
            value = module.graph.call_function(torch.ops.aten.add.Tensor, (scaled, second))
        image.replace_all_uses_with(value, delete_user_cb=lambda user: user is not scaled)

    return Student(_rewritten(student.program, change), student.card)


def _rewritten(program: ExportedProgram, change: Any) -> ExportedProgram:
    module = program.module(check_guards=False)
    change(module)
    module.graph.lint()
    module.recompile()
    return retrace(module, program)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list | tuple) else [value]


def _replaced(value: Any, old: Any, new: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, old, new) for item in value)
    return new if value is old else value
