"""``savedmodel:folder``: a TensorFlow SavedModel, by its signature ``serving_default``.

A SavedModel holds no pickle, but a graph, whose operators may read and write files; one with such an operator outside
its own checkpoint is refused before it is loaded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import DataError, ModelFileError, first_line
from edgekd.protocols import Arrays, ModelRequest, OriginOptions
from edgekd.quiet import quiet

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.teaching import Answer, Teacher

__all__ = ["ORIGIN"]

_FILES = frozenset(
    {"ReadFile", "WriteFile", "PyFunc", "PyFuncStateless", "EagerPyFunc", "LoadLibrary", "MatchingFiles", "PrintV2"}
)
"""Operators that touch files or call Python. Those of the checkpoint (SaveV2, RestoreV2) are in every SavedModel."""

SIGNATURE = "serving_default"


class _SavedModel:
    requires = ("tensorflow",)
    extra = "tensorflow"
    options = OriginOptions

    def fault(self, place: str, folder: Path) -> str:
        known = (folder / place / "saved_model.pb").is_file()
        return "" if known else f"no SavedModel {place!r} beside the recipe (a folder with saved_model.pb)"

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        """Features are further outputs of the signature, by name; images with channels first, as PyTorch has them."""
        from edgekd.data.channels_last import bind_images
        from edgekd.store import hash_path, size_of
        from edgekd.teachers.sources import answer_by_name
        from edgekd.teaching import Teacher
        from edgekd.types import TensorSpec

        path = asked.folder / asked.place
        _refuse_files(path)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        try:
            with quiet():
                import tensorflow as tf

                loaded = tf.saved_model.load(str(path))
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelFileError(f"{path} cannot be loaded as a SavedModel: {lines[0]}") from error
        if SIGNATURE not in loaded.signatures:
            raise ModelFileError(
                f"{path} has no signature {SIGNATURE}; it has {', '.join(loaded.signatures) or 'none'}"
            )
        signature = loaded.signatures[SIGNATURE]
        specs = tuple(
            TensorSpec(name, tuple(-1 if size is None else size for size in spec.shape), spec.dtype.name)
            for name, spec in signature.structured_input_signature[1].items()
        )
        parameters = sum(int(np.prod(variable.shape)) for variable in signature.variables)

        def outputs(arrays: Arrays) -> Answer:
            bound = bind_images(specs, arrays)
            try:
                made = signature(**{name: tf.constant(array) for name, array in bound.items()})
            except Exception as error:
                raise DataError(f"teacher {asked.reference!r}: {first_line(error)}") from error
            named = {name: tensor.numpy() for name, tensor in made.items()}
            wanted = {name: _channels_first(array) if name in asked.taps else array for name, array in named.items()}
            return answer_by_name(asked, _logits_first(wanted, asked))

        return Teacher(outputs, hash_path(path)[:16], parameters, None, size_of(path))


def _logits_first(outputs: dict[str, np.ndarray], asked: ModelRequest) -> dict[str, np.ndarray]:
    """A signature's outputs have no order: those that are no features are what the teacher says."""
    own = [name for name in outputs if name not in asked.taps]
    if len(own) != 1:
        raise DataError(
            f"{asked.reference} has the outputs {', '.join(outputs)}; which are the logits cannot be told, "
            "since only one output may be no feature"
        )
    return {own[0]: outputs[own[0]], **outputs}


def _channels_first(feature: np.ndarray) -> np.ndarray:
    return feature.transpose(0, 3, 1, 2) if feature.ndim == 4 else feature


def _refuse_files(path: Path) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    graph = saved_model_pb2.SavedModel()
    try:
        graph.ParseFromString((path / "saved_model.pb").read_bytes())
    except Exception as error:
        raise ModelFileError(f"{path / 'saved_model.pb'} cannot be read: {first_line(error)}") from error
    for meta in graph.meta_graphs:
        nodes = [*meta.graph_def.node, *(node for f in meta.graph_def.library.function for node in f.node_def)]
        found = sorted({node.op for node in nodes} & _FILES)
        if found:
            raise ModelFileError(f"{path} uses {', '.join(found)}: it touches files or calls Python, and is never run")


ORIGIN = _SavedModel()
