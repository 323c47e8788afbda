"""Writing a ``.mlpackage`` so that the same program always gives the same bytes.

coremltools writes random identifiers into the manifest, the date into the metadata, and map entries in an order that
depends on Python's hash seed. Here the identifiers follow from what they name, the date is left out, and maps are
sorted. The weight file is the same every time already, and is copied as it is.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import ExportError

__all__ = ["rename_features", "write_package"]

_AUTHOR = "com.apple.CoreML"
_DATE_KEY = "com.github.apple.coremltools.conversion_date"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://apple.github.io/coremltools/mlpackage")


def write_package(model: Any, weights: Path | None, path: Path) -> None:
    """Write a package folder.

    Args:
        model: The ``Model`` message; its date is removed in place.
        weights: Folder with the weight files that the program names, or None when it has none.
        path: Where; what stands there is replaced.
    """
    model.description.metadata.userDefined.pop(_DATE_KEY, None)
    if path.exists():
        shutil.rmtree(path)
    folder = path / "Data" / _AUTHOR
    folder.mkdir(parents=True)
    (folder / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    items = {"model.mlmodel": "CoreML Model Specification"}
    if weights is not None and any(weights.iterdir()):
        items["weights"] = "CoreML Model Weights"
        (folder / "weights").mkdir()
        for file in sorted(weights.iterdir()):
            shutil.copyfile(file, folder / "weights" / file.name)
    entries = {
        _identifier(name): {
            "author": _AUTHOR,
            "description": description,
            "name": name,
            "path": f"{_AUTHOR}/{name}",
        }
        for name, description in items.items()
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": _identifier("model.mlmodel"),
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def rename_features(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the inputs and outputs of a program these names, in its order, in place.

    Args:
        model: The ``Model`` message with an ML Program of one function, ``main``.
        inputs, outputs: The new names, one each; an output that a program gives twice is one output of a package.
            States, and the label and probabilities of a classifier, are none of them.

    Raises:
        ExportError: There are more or fewer inputs or outputs than names.
    """
    function = model.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    # What a classifier gives keeps the names by which Core ML knows it.
    labelled = (model.description.predictedFeatureName, model.description.predictedProbabilitiesName)
    names: dict[str, str] = {}
    for what, present, wanted in (
        ("inputs", [value.name for value in function.inputs if not value.type.HasField("stateType")], inputs),
        ("outputs", [name for name in block.outputs if name not in labelled], outputs),
    ):
        present, wanted = list(dict.fromkeys(present)), list(dict.fromkeys(wanted))  # a value may be given out twice
        if len(present) != len(wanted):
            raise ExportError(
                f"the program has the {what} {', '.join(wanted)}; Core ML's converter made {', '.join(present)} of them"
            )
        names.update(zip(present, wanted, strict=True))
    taken = _names(function, block)
    for name in sorted(set(names.values()) - set(names)):
        if name in taken:  # an inner value has the name that an output shall have
            fresh = f"{name}_inner"
            while fresh in taken:
                fresh += "_"
            names[name] = fresh
            taken.add(fresh)
    _rename(function, block, names)
    for feature in (*model.description.input, *model.description.output):
        feature.name = names.get(feature.name, feature.name)
    _sort(model.description.input, inputs)
    _sort(model.description.output, [*outputs, *labelled])


def _names(function: Any, block: Any) -> set[str]:
    names = {value.name for value in function.inputs}
    return names | {value.name for operation in block.operations for value in operation.outputs}


def _rename(function: Any, block: Any, names: Mapping[str, str]) -> None:
    values: Iterable[Any] = (*function.inputs, *(value for op in block.operations for value in op.outputs))
    for value in values:
        value.name = names.get(value.name, value.name)
    for operation in block.operations:
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = names.get(binding.name, binding.name)
    renamed = [names.get(name, name) for name in block.outputs]
    del block.outputs[:]
    block.outputs.extend(renamed)


def _sort(features: Any, order: Sequence[str]) -> None:
    features.sort(key=lambda feature: order.index(feature.name))


def _identifier(name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, name)).upper()
