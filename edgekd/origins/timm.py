"""``timm:name``: an architecture of timm, with its weights from a file or from the library's cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

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


class TimmOptions(NamedOptions):
    """What a model of timm is told."""

    classes: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Width of its last layer; by default one for each label. 0 leaves it out, for embeddings."
    )


class _Timm:
    requires = ("timm", "torchvision", "huggingface_hub")
    extra = "timm"
    options = TimmOptions

    def fault(self, place: str, folder: Path) -> str:
        return "" if place else "timm: needs the name of a model, as timm:mobilenetv3_small_100"

    def module(self, asked: ModelRequest) -> nn.Module:
        """Fresh, unless weights are named."""
        timm, told = self._known(asked), self._classes(asked)
        module: nn.Module = timm.create_model(asked.place, pretrained=False, **told)
        if asked.options.weights in (None, RANDOM):
            return module
        return load_file_into(module, asked.folder / asked.options.weights, asked)

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        from edgekd.teachers.sources import module_teacher

        module = self._pretrained(asked) if asked.options.weights is None else self.module(asked)
        return module_teacher(module, asked, example)

    def preprocessing(self, asked: ModelRequest) -> Preprocessing:
        """What timm evaluates the model with (``resolve_data_config``)."""
        self._known(asked)
        settings = library("timm.data").resolve_data_config(pretrained_cfg=self._settings(asked))
        channels, height, width = settings["input_size"]
        if height != width or settings["crop_mode"] not in ("center", "squash"):
            raise UsageError(
                f"{asked.reference} takes {height} by {width} pixels, cropped by {settings['crop_mode']!r}; say "
                "preprocessing beside its model: only squares from the centre are known"
            )
        return Preprocessing(
            channels=channels,
            resize=math.floor(height / settings["crop_pct"]),
            size=height,
            interpolation=settings["interpolation"],
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
        )

    def _known(self, asked: ModelRequest) -> Any:
        timm = library("timm")
        if not timm.is_model(asked.place):
            raise UsageError(f"timm has no model {asked.place!r}; {near_names(asked.place, timm.list_models())}")
        return timm

    def _classes(self, asked: ModelRequest) -> dict[str, int]:
        wanted = class_count(asked) if asked.options.classes is None else asked.options.classes
        return {} if wanted is None else {"num_classes": wanted}

    def _settings(self, asked: ModelRequest) -> dict[str, Any]:
        """timm's own facts of a model with these weights."""
        found = library("timm.models").get_pretrained_cfg(asked.place)
        if found is None:
            raise UsageError(f"timm knows no weights for {asked.place!r}")
        settings: dict[str, Any] = found.to_dict()
        return settings

    def _pretrained(self, asked: ModelRequest) -> nn.Module:
        """With timm's weights, which its own code puts in place once they are read."""
        timm, settings, told = self._known(asked), self._settings(asked), self._classes(asked)
        path, looked_for = _cached(settings)
        labels = told.get("num_classes", 0)  # with no classes wanted, timm leaves the last layer out
        if fault := cached_fault(asked.reference, looked_for, settings["num_classes"], labels):
            raise UsageError(fault)
        assert path is not None
        overlay = {"state_dict": read_state(path), "custom_load": False}
        module: nn.Module = timm.create_model(asked.place, pretrained=True, pretrained_cfg_overlay=overlay, **told)
        return module


def _cached(settings: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The file of a model's weights in the caches of huggingface_hub and torch.hub, or where it was looked for."""
    looked_for = []
    if repository := settings.get("hf_hub_id"):
        from huggingface_hub import constants, try_to_load_from_cache

        own = settings.get("hf_hub_filename")
        for name in (own,) if own else ("model.safetensors", "pytorch_model.bin"):
            found = try_to_load_from_cache(repository, name)
            if isinstance(found, str):
                return Path(found), []
        looked_for.append(f"{repository} in {constants.HF_HUB_CACHE}")
    if address := settings.get("url"):
        import torch

        path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
        if path.is_file():
            return path, []
        looked_for.append(str(path))
    return None, looked_for or ["there are none"]


ORIGIN = _Timm()
