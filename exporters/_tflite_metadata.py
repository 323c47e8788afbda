"""The card's facts inside a ``.tflite`` file: a ZIP archive behind the flatbuffer, where LiteRT's own tools put theirs.

The flatbuffer itself has TensorFlow Lite's own metadata (``TFLMetadata``), which Android Studio and the Task Library
read: names and meanings of inputs and outputs, and which of the archive's files holds the labels.
https://github.com/tensorflow/tflite-support/blob/master/tensorflow_lite_support/metadata/metadata_schema.fbs

A flatbuffer is read from its start and a ZIP archive from its end, so both readers find what is theirs:
``unzip -p model.tflite metadata.json``.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import ModelFileError
from edgekd.types import Card, Json, Precision, TensorSpec

from ._tflite_edit import with_metadata

__all__ = ["check_intact", "read_metadata", "write_with_metadata"]

_NAME, _LABELS = "metadata.json", "labels.txt"
_TENSOR_AXIS_LABELS = 2  # of AssociatedFileType
_ENTRY = b"PK\x03\x04"
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a ZIP archive can tell: the same card gives the same bytes


def write_with_metadata(
    path: Path,
    content: bytes,
    card: Card,
    precision: Precision,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    more: Json,
) -> None:
    """Write a model with the facts of its card behind it.

    Args:
        path: Of the file.
        content: The flatbuffer.
        card: Of the program it was written from.
        precision: Of the file.
        inputs, outputs: As the file declares them; what they mean is taken from the card.
        more: Facts beside those of the card.
    """
    content = with_metadata(content, "TFLITE_METADATA", _tensorflow_metadata(card, inputs, outputs))
    meanings = {spec.name: spec.meaning for spec in (*card.inputs, *card.outputs)}
    facts: Json = {
        **more,
        "name": card.name,
        "precision": precision,
        "inputs": [{**spec.to_json(), "meaning": meanings.get(spec.name, "")} for spec in inputs],
        "outputs": [{**spec.to_json(), "meaning": meanings.get(spec.name, "")} for spec in outputs],
        "labels": list(card.labels),
        "preprocessing": card.preprocessing,
        "model_bytes": len(content),
        "model_sha256": hashlib.sha256(content).hexdigest(),
    }
    entries = {_NAME: json.dumps(facts, indent=1, sort_keys=True)}
    if card.labels:
        entries[_LABELS] = "".join(" ".join(label.split()) + "\n" for label in card.labels)
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:
        for name, text in entries.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, text)


def _tensorflow_metadata(card: Card, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bytes:
    """The table ``ModelMetadata`` of TensorFlow Lite's schema, version 1.0.0 of which knows all that is in it."""
    from flatbuffers import Builder

    builder = Builder(1024)

    def table(fields: dict[int, int], size: int, kind: int = 0) -> int:
        """A table of so many fields, by their places in the schema; ``kind`` is the type of an associated file."""
        builder.StartObject(size)
        for place, offset in fields.items():
            builder.PrependUOffsetTRelativeSlot(place, offset, 0)
        if kind:
            builder.PrependInt8Slot(2, kind, 0)
        return int(builder.EndObject())

    def vector(offsets: list[int]) -> int:
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())

    meanings = {spec.name: spec.meaning for spec in (*card.inputs, *card.outputs)}

    def tensor(spec: TensorSpec, labelled: bool) -> int:
        fields = {0: builder.CreateString(spec.name), 1: builder.CreateString(meanings.get(spec.name, ""))}
        if labelled:
            label_file = {0: builder.CreateString(_LABELS), 1: builder.CreateString("Names of the classes, in order.")}
            fields[6] = vector([table(label_file, 5, kind=_TENSOR_AXIS_LABELS)])
        return table(fields, 7)

    count = len(card.labels)
    labelled = [spec.name for spec in outputs if count and spec.shape[-1:] == (count,)][:1]
    tensors = {
        2: [tensor(spec, False) for spec in inputs],
        3: [tensor(spec, spec.name in labelled) for spec in outputs],
    }
    graph = table({place: vector(found) for place, found in tensors.items()}, 9)
    graphs, name, version = vector([graph]), builder.CreateString(card.name), builder.CreateString("1.0.0")
    builder.Finish(table({0: name, 3: graphs, 7: version}, 8), b"M001")
    return bytes(builder.Output())


def read_metadata(path: Path) -> dict[str, Any]:
    """What :func:`write_with_metadata` wrote: ``name``, ``precision``, ``inputs``, ``outputs``, ``labels``,
    ``preprocessing``, and the size and sha256 of the flatbuffer; empty when the file holds no ``metadata.json``.

    Raises:
        ModelFileError: The archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if _NAME not in archive.namelist():
                return {}
            facts = json.loads(archive.read(_NAME))
    except zipfile.BadZipFile as error:
        if zipfile.is_zipfile(path) or _ENTRY + b"\x14" in path.read_bytes()[-(1 << 20) :]:
            raise ModelFileError(
                f"{path} is damaged: the metadata behind the model cannot be read ({error})"
            ) from error
        return {}
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged: its metadata is not JSON ({error})") from error
    return facts if isinstance(facts, dict) else {}


def check_intact(path: Path) -> None:
    """Whether a file is a ``.tflite`` file, and, where its metadata has a checksum, whether a bit was lost.

    LiteRT checks the structure of a file, and not its weights.

    Raises:
        ModelFileError: It is missing, of another format, truncated or changed.
    """
    if not path.is_file():
        raise ModelFileError(f"no model file at {path}")
    content = path.read_bytes()
    if content[4:8] != b"TFL3":
        raise ModelFileError(f"{path} is not a TFLite file: it does not start like one")
    facts = read_metadata(path)
    if "model_sha256" not in facts:
        return
    size = int(facts["model_bytes"])
    if hashlib.sha256(content[:size]).hexdigest() != facts["model_sha256"]:
        raise ModelFileError(f"{path} is damaged: the model's sha256 is not the one that was written behind it")
