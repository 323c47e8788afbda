"""``keras:file.keras`` (or a ``.h5`` without code in it), run by Keras 3 on PyTorch unless ``KERAS_BACKEND`` says else.

A Keras file can hold code: Lambda layers as marshalled bytecode, and names of modules to import. ``safe_mode`` refuses
the first in ``.keras`` files; what it does not look at is looked at here before anything is loaded.
"""

from __future__ import annotations

import json
import os
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import MissingToolchainError, ModelFileError, UsageError, first_line
from edgekd.protocols import Arrays, ModelRequest, OriginOptions
from edgekd.quiet import quiet
from edgekd.recipes.places import file_fault

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.teaching import Answer, Teacher

__all__ = ["ORIGIN"]


class _Keras:
    requires = ("keras", "h5py")
    extra = "keras"
    options = OriginOptions
    fault = staticmethod(file_fault)

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        """Features are what its layers return, by name; images with channels first, as PyTorch has them."""
        from edgekd.data.channels_last import bind_images
        from edgekd.store import hash_path
        from edgekd.teachers.sources import answer_by_name
        from edgekd.teaching import Teacher
        from edgekd.types import TensorSpec

        path = asked.folder / asked.place
        model = _loaded(path)
        import keras

        specs = tuple(
            TensorSpec(
                x.name,
                tuple(-1 if size is None else size for size in x.shape),
                keras.backend.standardize_dtype(x.dtype),
            )
            for x in model.inputs
        )
        layers = {layer.name: layer for layer in model.layers}
        if unknown := [tap for tap in asked.taps if tap not in layers]:
            last = ", ".join(list(layers)[-6:])
            raise UsageError(f"{asked.reference} has no layer {unknown[0]!r} for a feature; its last are {last}")
        whole = keras.Model(model.inputs, [model.outputs[0], *(layers[tap].output for tap in asked.taps)])

        def outputs(arrays: Arrays) -> Answer:
            bound = bind_images(specs, arrays)
            with quiet():
                made = whole.predict_on_batch([bound[spec.name] for spec in specs])
            returned = [np.asarray(array) for array in (made if isinstance(made, list | tuple) else [made])]
            named = {"output": returned[0]}
            for tap, feature in zip(asked.taps, returned[1:], strict=True):
                last = getattr(layers[tap], "data_format", keras.config.image_data_format()) == "channels_last"
                named[tap] = feature.transpose(0, 3, 1, 2) if feature.ndim == 4 and last else feature
            return answer_by_name(asked, named)

        return Teacher(outputs, hash_path(path)[:16], int(model.count_params()), None, path.stat().st_size)


def _loaded(path: Path) -> Any:
    _refuse_code(path)
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with quiet():
            import keras

            return keras.models.load_model(path, compile=False, safe_mode=True)
    except ModuleNotFoundError as error:
        raise MissingToolchainError(f"'keras:{path.name}'", str(error.name), "tensorflow") from error
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelFileError(f"{path} cannot be loaded by Keras: {lines[0]}") from error


def _refuse_code(path: Path) -> None:
    """Look at the configuration only.

    Raises:
        ModelFileError: It holds code, names modules other than Keras' own, or is no Keras file.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
        else:
            import h5py

            with h5py.File(path, "r") as file:
                config = json.loads(file.attrs["model_config"])
    except Exception as error:
        raise ModelFileError(f"{path} is no .keras file and no .h5 with a model: {first_line(error)}") from error
    for table in _tables(config):
        name, module = table.get("class_name"), table.get("module")
        if name in ("Lambda", "__lambda__", "TorchModuleWrapper"):
            raise ModelFileError(f"{path} holds code ({name}), which is never run; save it without {name} layers")
        if isinstance(module, str) and module.split(".")[0] not in ("keras", "builtins"):
            raise ModelFileError(f"{path} names {module}.{name}, which is not Keras' own and is never imported")


def _tables(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(table for inner in value.values() for table in _tables(inner))]
    if isinstance(value, list):
        return [table for inner in value for table in _tables(inner)]
    return []


ORIGIN = _Keras()
