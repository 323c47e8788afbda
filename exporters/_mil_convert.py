"""From a prepared program to coremltools' model: types of inputs and outputs, precision, and what an app reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.export import ExportedProgram

from edgekd.errors import ExportError, UsageError, first_line
from edgekd.programs.models import OPEN
from edgekd.types import Card, Precision, Student, TensorSpec

from ._mil_options import CoreMLOptions, pixels
from ._sizes import Sizes, check_open

__all__ = ["PROBABILITIES", "convert", "describe", "input_types", "label_output", "without_bars"]

PROBABILITIES = "edgekd.probabilities"
"""Metadata of a classifier: the program's output that became the label and the probabilities, as JSON (name, place)."""

_MOST_SHAPES = 128  # that an input of Core ML can list


def input_types(
    student: Student,
    specs: tuple[TensorSpec, ...],
    batch: Sizes,
    length: Sizes | None,
    options: CoreMLOptions,
) -> list[Any]:
    """Core ML's types of the inputs: images, and shapes with open axes.

    Raises:
        UsageError: The program's own shape is fixed where sizes were asked for, or open where none were.
    """
    import coremltools as ct

    check_open(student.program, "coreml", options.batch, options.length)
    found = pixels(student) if options.image else None
    types: list[Any] = []
    for spec in specs:
        shape = _shape(spec, batch, length)
        if found is not None and spec.name == found.name:
            types.append(ct.ImageType(spec.name, shape, color_layout=getattr(ct.colorlayout, found.layout)))
        else:
            types.append(ct.TensorType(spec.name, shape, dtype=np.float32 if spec.dtype == "float32" else np.int32))
    return types


def _shape(spec: TensorSpec, batch: Sizes, length: Sizes | None) -> Any:
    import coremltools as ct

    choices: list[Sizes] = []
    for axis, size in enumerate(spec.shape):
        choices.append(batch if axis == 0 else (length or ()) if size == OPEN else (size,))
    ranges = [isinstance(choice, range) for choice in choices]
    lists = [not isinstance(choice, range) and len(choice) > 1 for choice in choices]
    if any(ranges) and any(lists):
        raise UsageError(
            "Core ML has lists of shapes or ranges of sizes for an input, not both: batch and length differ"
        )
    if any(ranges):
        return ct.Shape(
            tuple(
                ct.RangeDim(choice[0], choice[-1], default=choice[0]) if isinstance(choice, range) else choice[0]
                for choice in choices
            )
        )
    shapes: list[tuple[int, ...]] = [()]
    for choice in choices:
        shapes = [(*shape, size) for shape in shapes for size in choice]
    if len(shapes) > _MOST_SHAPES:
        raise UsageError(f"Core ML takes lists of at most {_MOST_SHAPES} shapes; batch and length make {len(shapes)}")
    return ct.EnumeratedShapes(shapes, default=shapes[0]) if len(shapes) > 1 else shapes[0]


def label_output(program: ExportedProgram, card: Card, place: int) -> Any:
    """Core ML's classifier over one output of the program."""
    import coremltools as ct

    name = str(program.graph_signature.user_outputs[place])
    return ct.ClassifierConfig(list(card.labels), predicted_probabilities_output=name)


class _Types(list[Any]):
    """A classifier has a label more than it has types; coremltools 9.0 looks one up for it all the same.

    In ``backend/mil/load.py``, ``get_func_output``; it only asks whether that is an image.
    """

    def __getitem__(self, index: Any) -> Any:
        return None if isinstance(index, int) and index >= len(self) else super().__getitem__(index)


def convert(
    program: ExportedProgram,
    outputs: tuple[TensorSpec, ...],
    half: bool,
    options: CoreMLOptions,
    settings: dict[str, Any],
    path: Path,
    complaints: list[str],
) -> Any:
    import coremltools as ct

    compute = ct.transform.FP16ComputePrecision(op_selector=_fits_half) if half else ct.precision.FLOAT32
    types = _Types(ct.TensorType(dtype=np.float32 if s.dtype.startswith("float") else np.int32) for s in outputs)
    try:
        return ct.convert(
            program,
            convert_to="mlprogram",
            outputs=types,
            minimum_deployment_target=getattr(ct.target, options.minimum_deployment_target),
            compute_precision=compute,
            package_dir=str(path),
            skip_model_load=True,
            **settings,
        )
    except Exception as error:  # the converter raises every type there is
        where = next((line for text in reversed(complaints) for line in text.split("\n") if "converting" in line), "")
        where = where.partition("ERROR - ")[2].partition(" (located")[0]
        raise ExportError(
            f"Core ML's converter refuses{f' while {where}' if where else ''}: {first_line(error)}"
        ) from error


def _fits_half(operation: Any) -> bool:
    """Whether an operator of the converter's graph may be computed in half precision.

    The converter keeps constants beyond 65504 in single precision, except those beyond 1e38, which it takes for
    infinity. But a mask of ``(1 - mask) * -3.4e38`` multiplies that by zero, and zero times infinity is not a number.
    """
    if operation.op_type == "select":  # chooses the infinity, and computes nothing with it
        return True
    for value in operation.inputs.values():
        for variable in value if isinstance(value, list | tuple) else (value,):
            constant = getattr(variable, "val", None)
            if isinstance(constant, np.ndarray | np.floating) and np.issubdtype(constant.dtype, np.floating):
                sizes = np.abs(constant[np.isfinite(constant)] if isinstance(constant, np.ndarray) else constant)
                if np.max(sizes, initial=0.0) > np.finfo(np.float16).max:
                    return False
    return True


def describe(spec: Any, card: Card, precision: Precision, labelled: TensorSpec | None) -> None:
    """What an app needs to know, in the package itself; structured values are JSON."""
    spec.description.metadata.shortDescription = card.name
    facts = {
        "name": card.name,
        "precision": precision,
        "labels": json.dumps(list(card.labels), ensure_ascii=False) if card.labels else "",
        "preprocessing": json.dumps(card.preprocessing, ensure_ascii=False, sort_keys=True)
        if card.preprocessing
        else "",
    }
    if card.decoder is not None:
        facts |= {"context": str(card.decoder.context), "end_tokens": json.dumps(card.decoder.end_tokens)}
    for key, value in facts.items():
        if value:
            spec.description.metadata.userDefined[f"edgekd.{key}"] = value
    if labelled is not None:
        place = [output.name for output in card.outputs].index(labelled.name)
        spec.description.metadata.userDefined[PROBABILITIES] = json.dumps({"name": labelled.name, "place": place})
    meanings = {s.name: s.meaning for s in (*card.inputs, *card.outputs)}
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = meanings.get(feature.name, "")


@contextmanager
def without_bars() -> Iterator[None]:
    """coremltools without progress bars on the terminal."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline

    bars = [(ops, "_tqdm", ops._tqdm), (pass_pipeline, "tqdm", pass_pipeline.tqdm)]
    for module, name, _ in bars:
        setattr(module, name, _without_bar)
    try:
        yield
    finally:
        for module, name, bar in bars:
            setattr(module, name, bar)


def _without_bar(iterable: Any, **_: Any) -> Any:
    return iterable
