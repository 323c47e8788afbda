"""``onnx:file``, run by ONNX Runtime. Any tensor of the graph can be a feature: it is made one more output."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd import plugins
from edgekd.errors import ModelFileError, UsageError, first_line
from edgekd.protocols import Arrays, ModelRequest, OriginOptions
from edgekd.recipes.places import file_fault

if TYPE_CHECKING:
    from edgekd.teaching import Answer, Teacher

__all__ = ["ORIGIN"]


class _Onnx:
    requires = ("onnx", "onnxruntime")
    extra = "onnx"
    options = OriginOptions
    fault = staticmethod(file_fault)

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        from edgekd.programs.models import bind_inputs
        from edgekd.store import fingerprint, hash_path
        from edgekd.teachers.sources import answer_by_name
        from edgekd.teaching import Teacher

        path = asked.folder / asked.place
        exporter = plugins.load_exporter("onnx")
        runner = exporter.load(path) if not asked.taps else _with_outputs(exporter, path, asked)
        batch = runner.inputs[0].shape[0]

        def outputs(arrays: Arrays) -> Answer:
            bound = bind_inputs(runner.inputs, arrays)
            if batch == -1:
                return answer_by_name(asked, runner(bound))
            count = len(next(iter(bound.values())))
            steps = [runner({key: a[i : i + batch] for key, a in bound.items()}) for i in range(0, count, batch)]
            return answer_by_name(asked, {name: np.concatenate([step[name] for step in steps]) for name in steps[0]})

        beside, parameters = _weights(path)
        size = sum(part.stat().st_size for part in (path, *beside))
        whole = hash_path(path)[:16] if not beside else fingerprint([hash_path(part) for part in (path, *beside)])
        return Teacher(outputs, whole, parameters, None, size)


def _weights(path: Path) -> tuple[list[Path], int]:
    """The files beside the model that hold weights (large ones lie there), and how many weights there are."""
    import onnx

    tensors = onnx.load(path, load_external_data=False).graph.initializer
    places = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return [path.parent / place for place in sorted(places)], sum(int(np.prod(tensor.dims)) for tensor in tensors)


def _with_outputs(exporter: Any, path: Path, asked: ModelRequest) -> Any:
    """The file with some of its inner tensors as outputs behind its own."""
    import onnx

    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(path))
    except Exception as error:
        raise ModelFileError(f"{path} cannot be read as ONNX: {first_line(error)}") from error
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    own = {value.name for value in model.graph.output}
    made = {name for node in model.graph.node for name in node.output if name}
    for tap in asked.taps:
        if tap not in made:
            raise UsageError(f"{asked.reference} has no tensor {tap!r} for a feature; its last are {_last(model)}")
        if tap not in own:
            unknown = onnx.helper.make_tensor_value_info(tap, onnx.TensorProto.FLOAT, None)
            model.graph.output.append(known.get(tap, unknown))
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / path.name)
        return exporter.load(Path(folder) / path.name)


def _last(model: Any) -> str:
    names = [name for node in model.graph.node for name in node.output if name]
    return ", ".join(names[-6:])


ORIGIN = _Onnx()
