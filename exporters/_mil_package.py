"""A ``.mlpackage`` folder: its description, its program and its constants, as plain values.

Half precision is kept as float32 numbers that float16 can represent (see ``_mil.py``), 16-bit unsigned as int32.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import MissingToolchainError, ModelFileError

from ._mil_blob import WeightFile, unpack_bits

__all__ = ["Package", "Type", "Value", "model_proto", "read_package"]

Value: TypeAlias = Any
"""A tensor, a text, or a tuple of texts."""

# MIL data type -> (its NumPy type when stored byte by byte, the torch type that the evaluator holds it in).
_STORAGE: dict[str, tuple[str, torch.dtype]] = {
    "BOOL": ("?", torch.bool),
    "FLOAT16": ("<f2", torch.float32),
    "FLOAT32": ("<f4", torch.float32),
    "FLOAT64": ("<f8", torch.float64),
    "INT8": ("i1", torch.int8),
    "INT16": ("<i2", torch.int16),
    "INT32": ("<i4", torch.int32),
    "INT64": ("<i8", torch.int64),
    "UINT8": ("u1", torch.uint8),
    "UINT16": ("<u2", torch.int32),
    "UINT32": ("<u4", torch.int64),
}
# Types of less than a byte -> (bits, signed).
_PACKED = {
    "INT4": (4, True),
    "UINT1": (1, False),
    "UINT2": (2, False),
    "UINT3": (3, False),
    "UINT4": (4, False),
    "UINT6": (6, False),
}
_NAMES = {"BOOL": "bool", "STRING": "str"}
_CONTAINERS = {"dictionaryType": "DICTIONARY", "listType": "LIST"}


@dataclass(frozen=True)
class Type:
    """Declared type of a value.

    Attributes:
        kind: MIL's name of the element type (``FLOAT32``), ``STRING``, ``DICTIONARY`` or ``LIST``.
        shape: Sizes; -1 where the program leaves one open; None for texts, dictionaries and lists.
        state: Whether it is a place that lasts from call to call, of that type.
    """

    kind: str
    shape: tuple[int, ...] | None
    state: bool = False

    @property
    def storage(self) -> torch.dtype | None:
        """The torch type that holds it; None for texts and dictionaries."""
        if self.kind in _PACKED:
            return torch.int8 if _PACKED[self.kind][1] else torch.uint8
        return _STORAGE[self.kind][1] if self.kind in _STORAGE else None

    @property
    def dtype(self) -> str:
        """NumPy's name: ``float32``."""
        return _NAMES.get(self.kind, self.kind.lower())


@dataclass(frozen=True)
class Package:
    """An opened package.

    Attributes:
        path: The ``.mlpackage`` folder.
        model: The ``Model`` message, whose type is an ML Program.
        folder: Where the model file lies; weight files are named relative to it.
    """

    path: Path
    model: Any
    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "_files", {})

    def type_of(self, proto: Any) -> Type:
        """Read a ``ValueType`` message."""
        which = proto.WhichOneof("type")
        if which == "stateType":
            return replace(self.type_of(proto.stateType.wrappedType), state=True)
        if which != "tensorType":
            return Type(_CONTAINERS.get(which, str(which)), None)
        tensor = proto.tensorType
        kind = model_proto().MIL__pb2.DataType.Name(tensor.dataType)
        if kind == "STRING":
            return Type(kind, None)
        if kind not in _STORAGE and kind not in _PACKED:
            raise ModelFileError(f"{self.path} has values of type {kind}, which the evaluator does not know")
        return Type(kind, tuple(int(d.constant.size) if d.HasField("constant") else -1 for d in tensor.dimensions))

    def value_of(self, proto: Any) -> Value:
        """Read a ``Value`` message, from the message itself or from the weight file.

        Raises:
            ModelFileError: The weights are damaged, or fewer than declared.
        """
        if proto.WhichOneof("value") == "immediateValue" and proto.immediateValue.WhichOneof("value") == "list":
            return tuple(self.value_of(item) for item in proto.immediateValue.list.values)
        declared = self.type_of(proto.type)
        if declared.kind == "STRING":
            return proto.immediateValue.tensor.strings.values[0]
        if declared.shape is None or -1 in declared.shape:
            raise ModelFileError(f"{self.path} has a constant without a fixed shape")
        count = math.prod(declared.shape)
        if proto.WhichOneof("value") == "blobFileValue":
            array = self._weights(proto.blobFileValue.fileName).read(proto.blobFileValue.offset, count)
        else:
            array = self._immediate(proto.immediateValue.tensor, declared, count)
        tensor = torch.from_numpy(np.array(array.reshape(declared.shape), order="C", copy=True, dtype=_native(array)))
        return tensor.to(declared.storage)

    def _immediate(self, proto: Any, declared: Type, count: int) -> np.ndarray:
        which = proto.WhichOneof("value")
        if which == "bytes" and declared.kind in _PACKED:
            bits, signed = _PACKED[declared.kind]
            return unpack_bits(np.frombuffer(proto.bytes.values, np.uint8), bits, count, signed=signed)
        if which == "bytes":
            data = proto.bytes.values
            array = np.frombuffer(data[: len(data) // _width(declared) * _width(declared)], _STORAGE[declared.kind][0])
        elif which is None:
            array = np.zeros(0, np.float32)  # an empty constant is written as no value at all
        else:
            array = np.array(getattr(proto, which).values, dtype=_STORAGE[declared.kind][0])
        if array.size != count:
            raise ModelFileError(f"{self.path} has a constant of {array.size} values that declares {count}")
        return array

    def _weights(self, name: str) -> WeightFile:
        files: dict[str, WeightFile] = self._files  # type: ignore[attr-defined]
        if name not in files:
            files[name] = WeightFile(_inside(self.folder, name.removeprefix("@model_path/"), self.path))
        return files[name]


def read_package(path: Path) -> Package:
    """Open a saved package.

    Args:
        path: A ``.mlpackage`` folder.

    Raises:
        ModelFileError: It is missing, damaged, or not a package with an ML Program.
        MissingToolchainError: coremltools, which brings the format's messages, is not installed.
    """
    manifest_path = path / "Manifest.json"
    if not path.exists():
        raise ModelFileError(f"no Core ML package at {path}")
    if not manifest_path.is_file():
        raise ModelFileError(f"{path} is not a Core ML package: it has no Manifest.json")
    try:
        manifest = json.loads(manifest_path.read_bytes())
        relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{manifest_path} is damaged: {type(error).__name__}: {error}") from error
    file = _inside(path / "Data", relative, path)
    if not file.is_file():
        raise ModelFileError(f"{path} is damaged: its manifest names {relative}, which is not there")
    model = model_proto().Model()
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # DecodeError, whose module differs between protobuf versions
        if type(error).__name__ != "DecodeError":
            raise
        raise ModelFileError(f"{file} is truncated or not a Core ML model: {error}") from error
    kind = model.WhichOneof("Type")
    if kind != "mlProgram":
        raise ModelFileError(f"{path} holds a {kind or 'model without content'}; the evaluator runs ML Programs")
    return Package(path, model, file.parent)


def model_proto() -> ModuleType:
    """coremltools' compiled ``Model.proto``, without importing coremltools itself where that can be spared.

    ``import coremltools`` takes seconds (it pulls transformers and scikit-learn) and warns of every version it was not
    tested with; the messages need neither. protobuf gives one class per message, however often the file is loaded.

    Raises:
        MissingToolchainError: coremltools is not installed.
    """
    if "coremltools.proto" in sys.modules:
        return importlib.import_module("coremltools.proto.Model_pb2")
    name = "_edgekd_coremltools_proto"
    if name not in sys.modules:
        spec = importlib.util.find_spec("coremltools")
        if spec is None or not spec.submodule_search_locations:
            raise MissingToolchainError("reading a Core ML package", "coremltools", "coreml")
        folder = Path(spec.submodule_search_locations[0]) / "proto"
        light = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert light is not None
        assert light.loader is not None
        module = importlib.util.module_from_spec(light)
        sys.modules[name] = module
        light.loader.exec_module(module)
    return importlib.import_module(f"{name}.Model_pb2")


def _inside(folder: Path, relative: str, package: Path) -> Path:
    """A path that a package names, which must not lead out of it."""
    file = (folder / relative).resolve()
    if not file.is_relative_to(package.resolve()):
        raise ModelFileError(f"{package} names a file outside itself: {relative}")
    return file


def _width(declared: Type) -> int:
    return np.dtype(_STORAGE[declared.kind][0]).itemsize


def _native(array: np.ndarray) -> np.dtype:
    """A type that torch takes: 16- and 32-bit unsigned in the next signed one."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        return np.dtype(np.int64)
    return array.dtype.newbyteorder("=")


def tensor_shape(value: Value) -> tuple[int, ...]:
    """Shape of a value; () for texts."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()
