"""``torchvision:name``: a classifier of torchvision, with its weights from a file or from the library's cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import UsageError
from edgekd.protocols import Arrays, ModelRequest
from edgekd.teachers.named_weights import (
    RANDOM,
    NamedOptions,
    cached_fault,
    class_count,
    library,
    load_file_into,
    near_names,
    read_state,
)
from edgekd.teaching import Preprocessing

if TYPE_CHECKING:
    from torch import nn

    from edgekd.teaching import Teacher

__all__ = ["ORIGIN"]


class _Torchvision:
    requires = ("torchvision",)
    extra = "timm"
    options = NamedOptions

    def fault(self, place: str, folder: Path) -> str:
        return "" if place else "torchvision: needs the name of a model, as torchvision:resnet18"

    def module(self, asked: ModelRequest) -> nn.Module:
        """Fresh, unless weights are named."""
        models, classes = self._known(asked), class_count(asked)
        told = {} if classes is None else {"num_classes": classes}
        if asked.options.weights in self._members(asked):
            return self._pretrained(asked)
        module: nn.Module = models.get_model(asked.place, weights=None, **told)
        if asked.options.weights in (None, RANDOM):
            return module
        return load_file_into(module, asked.folder / asked.options.weights, asked)

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        from edgekd.teachers.sources import module_teacher

        module = self._pretrained(asked) if asked.options.weights is None else self.module(asked)
        return module_teacher(module, asked, example)

    def preprocessing(self, asked: ModelRequest) -> Preprocessing:
        """What torchvision evaluates these weights with (``weights.transforms()``); of a file, the default's."""
        settings = self._weights(asked).transforms()
        return Preprocessing(
            channels=3,
            resize=settings.resize_size[0],
            size=settings.crop_size[0],
            interpolation=settings.interpolation.value,
            mean=tuple(settings.mean),
            std=tuple(settings.std),
        )

    def _known(self, asked: ModelRequest) -> Any:
        models = library("torchvision.models")
        known = models.list_models(module=models)
        if asked.place not in known:
            raise UsageError(f"torchvision has no classifier {asked.place!r}; {near_names(asked.place, known)}")
        return models

    def _members(self, asked: ModelRequest) -> Any:
        """torchvision's weights of a model, by name: ``IMAGENET1K_V1`` …"""
        return self._known(asked).get_model_weights(asked.place).__members__

    def _weights(self, asked: ModelRequest) -> Any:
        members = self._members(asked)
        return members.get(asked.options.weights or "", members["DEFAULT"])

    def _pretrained(self, asked: ModelRequest) -> nn.Module:
        """With torchvision's weights, which its own code puts in place once they are known to be nothing else."""
        import torch

        weights = self._weights(asked)
        path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        missing = [] if path.is_file() else [path]
        classes = len(weights.meta["categories"])
        if fault := cached_fault(asked.reference, missing, classes, len(asked.labels)):
            raise UsageError(fault)
        read_state(path)  # torch.hub unpickles without looking; a file that this reads holds tensors alone
        module: nn.Module = library("torchvision.models").get_model(asked.place, weights=weights)
        return module


ORIGIN = _Torchvision()
