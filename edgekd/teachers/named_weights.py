"""Architectures by name: what the origins ``timm:`` and ``torchvision:`` share. Nothing is ever downloaded."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from edgekd.errors import ModelFileError, UsageError, first_line
from edgekd.protocols import ModelRequest, OriginOptions
from edgekd.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "RANDOM",
    "NamedOptions",
    "cached_fault",
    "class_count",
    "library",
    "load_file_into",
    "near_names",
    "read_state",
]

RANDOM = "random"
"""In place of a file: the weights that the architecture is initialised with."""


class NamedOptions(OriginOptions):
    """What an architecture by name is told."""

    weights: str | None = Field(
        None,
        description="A .safetensors or .pth file beside the recipe, or random. Left out, a teacher has the library's "
        "weights from its cache, and a student starts afresh.",
    )


def library(name: str) -> Any:
    """A library of models, imported.

    Raises:
        UsageError: It is installed, but not for this PyTorch.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except (RuntimeError, OSError, ImportError) as error:
        # torchvision of one build does not load beside torch of another: https://github.com/pytorch/vision/issues/9085
        raise UsageError(
            f"{name} cannot be imported ({first_line(error)}); torch {_version('torch')} and torchvision "
            f"{_version('torchvision')} must be of one build, as pip installs them together"
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def near_names(name: str, known: Sequence[str]) -> str:
    """What was meant, perhaps."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4)
    return f"near names: {', '.join(near)}" if near else f"it has {len(known)}, as {', '.join(list(known)[:4])}"


def class_count(asked: ModelRequest) -> int | None:
    """Width of the last layer of weights that are not the library's: one for each label; None without labels."""
    return len(asked.labels) or None


def cached_fault(reference: str, looked_for: Sequence[Path | str], classes: int, labels: int) -> str:
    """Why the library's own weights cannot serve; empty when they can.

    Args:
        looked_for: Where they were looked for and are not; empty when they were found.
        classes: That they were trained for.
        labels: Of the recipe.
    """
    if looked_for:
        places = " or ".join(str(place) for place in looked_for)
        return (
            f"{reference}: its weights are not in the library's cache ({places}), and nothing is downloaded; load them "
            'once with the library itself, or say weights = "file.safetensors" or weights = "random" beside the model'
        )
    if labels and labels != classes:
        return (
            f"{reference}: the library's weights are for {classes} classes, and there are {labels} labels; "
            'weights = "file.safetensors" beside the model names weights for these'
        )
    return ""


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or a file of ``torch.save``, of which no pickled code is run.

    Raises:
        ModelFileError: There is no such file, it is damaged, or it holds anything but tensors.
    """
    import torch

    if not path.is_file():
        raise ModelFileError(f"no weights at {path}; a .safetensors or .pth file beside the recipe is expected")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelFileError(f"{path} cannot be read as weights: {first_line(error)}") from error
    for key in ("state_dict", "model"):  # as training scripts wrap them
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelFileError(f"{path} holds no state dict (tensors by name)")
    return dict(found)


def load_file_into(module: nn.Module, path: Path, asked: ModelRequest) -> nn.Module:
    """Put the weights of a file into a module, all of them.

    Raises:
        ModelFileError: See :func:`read_state`; or they are of another architecture or number of classes.
    """
    found, own = read_state(path), module.state_dict()
    wrong = [
        f"{name} is {tuple(found[name].shape)} and not {tuple(own[name].shape)}" if name in found else f"no {name}"
        for name in own
        if name not in found or found[name].shape != own[name].shape
    ]
    wrong += [f"{name} has no place" for name in found if name not in own]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ModelFileError(f"{path.name} does not fit {asked.reference}: {wrong[0]}{more}")
    module.load_state_dict(found)
    return module
